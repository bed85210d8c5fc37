"""`igpt-data palette`."""

from pathlib import Path
from typing import Any

import click

from data_prep.commands import (
    MAX_REJECT_RATE,
    PATH,
    SOURCE_OPTION,
    Progress,
    place_of,
    refuse_inside,
    require_writable,
    where_options,
)
from igpt_ds.errors import UserError
from igpt_ds.options import Number, Renamed
from igpt_ds.text import aligned, visible


@click.command()
@click.argument("named", nargs=-1, required=True, metavar="[SOURCE] PATH...")
@click.option("--k", type=int, default=512, show_default=True, help="Number of colours.")
@click.option("--out", type=PATH, required=True, help="File to write, e.g. palette.npy.")
@SOURCE_OPTION
@click.option(
    "--resolution",
    type=click.IntRange(1, 1024),
    help="Side of the images when they become tokens.  [default: 32, or their own with --no-crop]",
)
@click.option("--no-crop", is_flag=True, help="Take whole images: they are small already.")
@click.option(
    "--share",
    cls=Renamed,
    former=["--sample"],
    type=Number(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the images to count, chosen by a hash of the image's name.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@MAX_REJECT_RATE
@where_options
def palette(
    *,
    named: tuple[str, ...],
    k: int,
    out: Path,
    options: dict[str, str],
    resolution: int | None,
    no_crop: bool,
    share: float,
    seed: int,
    max_reject_rate: float,
    **where: Any,
) -> None:
    """Fit a palette of k colours to the training images by k-means.

    The pixels are those of the images after the evaluation transform (shorter side 224, centre crop, then
    down to the resolution). SOURCE is image_folder unless named.

    \b
    Photographs, 512 colours at 32 x 32:
      igpt-data palette IMAGES --k 512 --out palette.npy --workers 8
    Small images, each pixel as it is:
      igpt-data palette IMAGES --k 16 --no-crop --out palette.npy
    A tenth of ImageNet's images on a Slurm cluster:
      igpt-data palette imagenet ILSVRC2012 --resolution 64 --share 0.1 --out palette.npy \\
          --executor slurm --slurm-partition cpu --wait
    """
    from data_prep.palette.count import colour_tasks
    from data_prep.palette.fit import check_k
    from data_prep.palette.job import fit_palette
    from data_prep.sources import names, open_source, recorded
    from igpt_ds.images.transforms import CROP, evaluation

    check_k(k)
    if not no_crop and resolution is not None and resolution > CROP:
        raise UserError(f"--resolution {resolution}: larger than the crop of {CROP} pixels: choose a smaller one")
    name, paths = (named[0], named[1:]) if named[0] in names() and len(named) > 1 else ("image_folder", named)
    refuse_inside(name, paths, out)
    require_writable(out)
    work = out.with_name(f"{out.name}.work")
    with place_of(work, where) as place, Progress("palette") as progress:
        source = open_source(name, paths, options)
        transform = evaluation(resolution if no_crop else resolution or 32, not no_crop)
        settled = recorded(name, options)
        tasks = colour_tasks(
            source, transform, work.resolve(), options=settled, sample=share, max_reject_rate=max_reject_rate
        )
        fitted = fit_palette(tasks, k=k, seed=seed, out=out, place=place, meter=progress)
    if fitted is None:
        click.echo(visible(f"{out}: {place.pending}"))
        return
    rejected = f", {fitted.rejected:,} rejected ({fitted.reasons})" if fitted.rejected else ""
    rows = [
        ("palette", str(out)),
        ("colours", f"{fitted.k} of {fitted.unique:,} unique"),
        ("distortion", f"{fitted.mse:.4e} squared distance a pixel, in [-1, 1] units"),
        ("", f"{fitted.rms_levels:.2f} levels of 255 root mean square a channel"),
        ("images", f"{fitted.images:,}{rejected}"),
        ("sha256", fitted.sha256),
    ]
    click.echo(aligned(rows))
