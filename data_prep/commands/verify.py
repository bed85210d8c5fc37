"""`igpt-data verify`."""

from pathlib import Path

import click

from data_prep.commands import PATH, WORKERS, Progress, local_workers
from igpt_ds.text import aligned


@click.command()
@click.argument("directory", type=PATH)
@WORKERS
def verify(directory: Path, workers: int) -> None:
    """Read a dataset again, every byte, and hold it against its manifest.

    \b
    Example:
      igpt-data verify DATA/train --workers 8
    """
    from data_prep.check.verify import verify as read_again
    from data_prep.workers.pool import pool
    from igpt_ds.dataset.manifest import Manifest

    manifest = Manifest.load(directory)
    with Progress("verify", unit="B") as progress:
        progress.start(sum(shard.bytes for shard in manifest.shards))
        with pool(local_workers(workers)) as executor:
            summary = read_again(directory, progress.tick, executor)
    rows = [
        ("dataset", f"{directory} ({manifest.split} split of {manifest.source})"),
        ("images", f"{manifest.rows:,} in {summary.views} view(s)"),
        ("labels", "none" if manifest.classes is None else f"{len(manifest.classes)} classes"),
        ("shards", f"{summary.shards:,}, {summary.bytes / 1e6:,.1f} MB, every sha256 right"),
        ("tokens", f"{manifest.sequence_length:,} a row ({manifest.resolution} x {manifest.resolution})"),
        ("palette", f"{summary.colours_used} of {manifest.palette['k']} colours used"),
        ("entropy", f"{summary.entropy:.4f} nats a token (of the tokens' frequencies)"),
        ("rejected", f"{manifest.rejected:,}"),
    ]
    click.echo(aligned(rows))
