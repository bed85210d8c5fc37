"""`igpt-data shards`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.commands import (
    MAX_REJECT_RATE,
    PATH,
    SOURCE_OPTION,
    Progress,
    place_of,
    refuse_inside,
    where_options,
)
from igpt_ds.options import Number
from igpt_ds.text import visible

if TYPE_CHECKING:
    from data_prep.shards.job import Results


@click.command()
@click.argument("source_name", metavar="SOURCE")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--palette", "palette_path", type=PATH, required=True, help="Palette from igpt-data palette.")
@click.option("--out", type=PATH, required=True, help="Directory for DATA/train, DATA/val and DATA/test.")
@click.option(
    "--split",
    "splits",
    type=click.Choice(["train", "val", "test"]),
    multiple=True,
    help="What to build; may be repeated.  [default: train, and val unless --holdout 0]",
)
@SOURCE_OPTION
@click.option("--resolution", type=click.IntRange(1, 1024), default=32, show_default=True, help="Side in pixels.")
@click.option(
    "--holdout",
    type=Number(0, 1, max_open=True),
    default=0.04,
    show_default=True,
    help="Share held out of the training images as DATA/val, chosen by a hash of the image's name; 0 for none.",
)
@click.option(
    "--views",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Differently cropped copies of each training image. Of a listed source more can be added later.",
)
@click.option("--no-crop", is_flag=True, help="Take whole square images: they are small already.")
@click.option("--no-augment", is_flag=True, help="Crop training images in the centre, as for validation.")
@click.option(
    "--exif",
    type=click.Choice(["apply", "ignore"]),
    default="apply",
    show_default=True,
    help="What to do with the EXIF orientation.",
)
@click.option(
    "--decoder",
    type=click.Choice(["pillow", "fast"]),
    default="pillow",
    show_default=True,
    help="How JPEGs are decoded: exactly, or at about twice the speed.",
)
@click.option(
    "--storage",
    type=click.Choice(["uint16", "packed9"]),
    default="uint16",
    show_default=True,
    help="Bits a token takes: 16, which other readers of WebDataset know, or 9.",
)
@click.option("--selection", type=PATH, help="Build only what this file from igpt-data select keeps.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of crops and order.")
@click.option("--rows-per-shard", type=click.IntRange(1, 1 << 24), default=16384, show_default=True)
@click.option(
    "--max-shards",
    type=click.IntRange(min=1),
    help="For a trial: only the first so many shards of each view, or the first so many input files. The same "
    "command without it continues.",
)
@MAX_REJECT_RATE
@click.option("--force", is_flag=True, help="Replace what OUT holds.")
@where_options
def shards(
    *,
    source_name: str,
    paths: tuple[str, ...],
    palette_path: Path,
    out: Path,
    splits: tuple[str, ...],
    options: dict[str, str],
    resolution: int,
    holdout: float,
    views: int,
    no_crop: bool,
    no_augment: bool,
    exif: str,
    decoder: str,
    storage: str,
    selection: Path | None,
    seed: int,
    rows_per_shard: int,
    max_shards: int | None,
    max_reject_rate: float,
    force: bool,
    **where: Any,
) -> None:
    """Build token shards from images: DATA/train, DATA/val and DATA/test.

    A build that was stopped continues when the same command is given again.

    \b
    Photographs in class folders, 4 % held out, 3 random crops of each training image:
      igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 \\
          --holdout 0.04 --views 3 --out DATA --workers 8
    Images that are 32 x 32 already:
      igpt-data shards image_folder IMAGES --palette palette.npy --no-crop --out DATA
    Web images on a Slurm cluster, cropped in the centre, up to 1 % of them unreadable:
      igpt-data shards img2dataset WEB --palette palette.npy --resolution 64 --holdout 0 \\
          --no-augment --max-reject-rate 0.01 --storage packed9 --out DATA \\
          --executor slurm --slurm-partition cpu --workers 8
    """
    from data_prep.selection.file import Selection
    from data_prep.shards.build import build
    from data_prep.shards.job import begin
    from data_prep.shards.plan import Settings
    from data_prep.sources import open_source, recorded
    from igpt_ds.dataset.palette import Palette

    settings = Settings(
        resolution,
        holdout,
        views,
        not no_crop,
        seed,
        rows_per_shard,
        augment=not no_augment,
        exif=exif,  # type: ignore[arg-type]
        decoder=decoder,  # type: ignore[arg-type]
        storage=storage,  # type: ignore[arg-type]
    )
    refuse_inside(source_name, paths, *(out / split for split in ("train", "val", "test")))
    with place_of(out / "jobs", where) as place:
        job = begin(
            open_source(source_name, paths, options, lambda: Palette.load(palette_path)),
            out,
            Palette.load(palette_path),
            settings,
            splits=tuple(dict.fromkeys(splits)) or None,  # type: ignore[arg-type]
            selection=Selection.open(selection) if selection else None,
            options=recorded(source_name, options),
            max_shards=max_shards,
            max_reject_rate=max_reject_rate,
            force=force,
        )
        with Progress("shards") as progress:
            built = build(job, place, progress)
    if built is None:
        click.echo(visible(f"{out}: {place.pending}"))
        return
    _tell(built, max_shards)
    if not splits and len(built) == 1:
        click.echo("no validation split, as --holdout 0 asks")
    if progress.done:
        click.echo(f"{progress.done:,} images read at {progress.rate:,.0f} images/s")


def _tell(built: "Results", max_shards: int | None) -> None:
    from igpt_ds.dataset.manifest import Manifest

    for directory, manifest in built:
        if manifest is None:
            rejected = Manifest.load(directory).rejected
            told = f" ({rejected:,} images were rejected)" if rejected else ""
            told = f"complete already, built by the same plan; nothing to do{told}"
            click.echo(visible(f"{directory}: {told}; where images have changed since, --force builds anew"))
            continue
        labels = "unlabelled" if manifest.classes is None else f"{len(manifest.classes)} classes"
        skipped = f", {manifest.rejected} rejected (see rejects.jsonl)" if manifest.rejected else ""
        trial = "; a trial: without --max-shards the same command continues" if max_shards else ""
        told = f"{manifest.rows:,} images ({labels}), {manifest.views} view(s), {len(manifest.shards)} shard(s)"
        click.echo(visible(f"{directory}: {told}{skipped}{trial}"))
