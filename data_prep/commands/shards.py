"""`igpt-data shards`."""

from pathlib import Path

import click

from data_prep.commands import MAX_REJECT_RATE, PATH, Progress


@click.command()
@click.argument("source_name", metavar="SOURCE")
@click.argument("images")
@click.option("--palette", "palette_path", type=PATH, required=True, help="Palette from igpt-data palette.")
@click.option("--resolution", type=click.IntRange(1, 1024), default=32, show_default=True, help="Side in pixels.")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.04,
    show_default=True,
    help="Share held out as DATA/val, chosen by a hash of the image's name; 0 for none.",
)
@click.option(
    "--views",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Differently cropped copies of each training image.",
)
@click.option("--no-crop", is_flag=True, help="Take whole square images: they are small already.")
@click.option("--out", type=PATH, required=True, help="Directory for DATA/train and DATA/val.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of crops and order.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), default=16384, show_default=True)
@MAX_REJECT_RATE
@click.option("--force", is_flag=True, help="Replace what OUT holds.")
def shards(
    *,
    source_name: str,
    images: str,
    palette_path: Path,
    resolution: int,
    holdout: float,
    views: int,
    no_crop: bool,
    out: Path,
    seed: int,
    rows_per_shard: int,
    max_reject_rate: float,
    force: bool,
) -> None:
    """Build token shards from images: DATA/train and DATA/val.

    A build that was stopped continues when the same command is given again.

    \b
    Photographs in class folders, 4 % held out, 3 random crops of each training image:
      igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 \\
          --holdout 0.04 --views 3 --out DATA
    Images that are 32 x 32 already:
      igpt-data shards image_folder IMAGES --palette palette.npy --no-crop --out DATA
    """
    from data_prep.build_shards import build
    from data_prep.plan import Settings
    from data_prep.sources import open_source
    from igpt_ds.palette import Palette

    source = open_source(source_name, images)
    settings = Settings(resolution, holdout, views, not no_crop, seed, rows_per_shard)
    loaded = Palette.load(palette_path)
    with Progress("shards") as progress:
        built = build(
            source,
            out,
            loaded,
            settings,
            max_reject_rate=max_reject_rate,
            force=force,
            tick=progress.tick,
            start=progress.start,
        )
    for directory, manifest in built:
        if manifest is None:
            click.echo(f"{directory}: complete already, built by the same plan; nothing to do")
            continue
        labels = "unlabelled" if manifest.classes is None else f"{len(manifest.classes)} classes"
        skipped = f", {manifest.rejected} rejected (see rejects.jsonl)" if manifest.rejected else ""
        click.echo(
            f"{directory}: {manifest.rows:,} images ({labels}), {manifest.views} view(s), "
            f"{len(manifest.shards)} shard(s){skipped}"
        )
    if len(built) == 1:
        click.echo("no validation split, as --holdout 0 asks")
    if progress.done:
        click.echo(f"{progress.done:,} images read at {progress.rate:,.0f} images/s")
