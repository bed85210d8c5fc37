"""`igpt-data verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.commands import PATH, WORKERS, Progress, local_workers
from igpt_ds.text import aligned

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from igpt_ds.dataset.manifest import Manifest


@click.command()
@click.argument("directory", metavar="DATA|DATA/SPLIT", type=PATH)
@WORKERS
def verify(directory: Path, workers: int) -> None:
    """Read a dataset again, every byte, and hold it against its manifest.

    \b
    All splits of a folder, or one:
      igpt-data verify DATA --workers 8
      igpt-data verify DATA/train --workers 8
    """
    from data_prep.workers.pool import pool
    from igpt_ds.dataset.manifest import Manifest, splits_in

    splits = splits_in(directory) or [directory]
    manifests = [Manifest.load(split) for split in splits]
    with Progress("verify", unit="B") as progress, pool(local_workers(workers)) as executor:
        progress.start(sum(shard.bytes for manifest in manifests for shard in manifest.shards))
        told = [
            _verified(split, manifest, progress, executor) for split, manifest in zip(splits, manifests, strict=True)
        ]
    click.echo("\n\n".join(told))


def _verified(directory: Path, manifest: "Manifest", progress: Progress, executor: "Executor | None") -> str:
    from data_prep.check.verify import verify as read_again

    summary = read_again(directory, progress.tick, executor)
    return aligned(
        [
            ("dataset", f"{directory} ({manifest.split} split of {manifest.source})"),
            ("images", f"{manifest.rows:,} in {summary.views} view(s)"),
            ("labels", "none" if manifest.classes is None else f"{len(manifest.classes)} classes"),
            ("shards", f"{summary.shards:,}, {summary.bytes / 1e6:,.1f} MB, every sha256 right"),
            ("tokens", f"{manifest.sequence_length:,} a row ({manifest.resolution} x {manifest.resolution})"),
            ("palette", f"{summary.colours_used} of {manifest.palette['k']} colours used"),
            ("entropy", f"{summary.entropy:.4f} nats a token (of the tokens' frequencies)"),
            ("rejected", f"{manifest.rejected:,}"),
        ]
    )
