"""`igpt-data palette`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.commands import MAX_REJECT_RATE, PATH, Progress, table
from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from data_prep.rejects import Rejects


@click.command()
@click.argument("where", nargs=-1, required=True, metavar="[SOURCE] IMAGES")
@click.option("--k", type=int, default=512, show_default=True, help="Number of colours.")
@click.option("--out", type=PATH, required=True, help="File to write, e.g. palette.npy.")
@click.option(
    "--resolution",
    type=click.IntRange(min=1),
    help="Side of the images when they become tokens.  [default: 32, or their own with --no-crop]",
)
@click.option("--no-crop", is_flag=True, help="Take whole images: they are small already.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@MAX_REJECT_RATE
def palette(
    *,
    where: tuple[str, ...],
    k: int,
    out: Path,
    resolution: int | None,
    no_crop: bool,
    seed: int,
    max_reject_rate: float,
) -> None:
    """Fit a palette of k colours to images by k-means.

    The pixels are those of the images after the evaluation transform (shorter side 224, centre crop, then
    down to the resolution). SOURCE is image_folder unless named.

    \b
    Photographs, 512 colours at 32 x 32:
      igpt-data palette IMAGES --k 512 --out palette.npy
    Small images, each pixel as it is:
      igpt-data palette IMAGES --k 16 --no-crop --out palette.npy
    """
    from data_prep.fit_palette import run
    from data_prep.sources import open_source
    from data_prep.transforms import CROP, evaluation

    if len(where) > 2:
        raise click.UsageError(f"{where[2]}: unexpected argument: give [SOURCE] IMAGES")
    if not no_crop and resolution is not None and resolution > CROP:
        raise UserError(f"--resolution {resolution}: larger than the crop of {CROP} pixels: choose a smaller one")
    source = open_source(where[0] if len(where) == 2 else "image_folder", where[-1])
    transform = evaluation(resolution if no_crop else resolution or 32, not no_crop)
    with Progress("palette") as progress:
        progress.start(len(source.items()))
        fitted, distortion, unique, rejects = run(
            source, transform, k=k, seed=seed, out=out, max_reject_rate=max_reject_rate, tick=progress.tick
        )
    table(
        ("palette", str(out)),
        ("colours", f"{fitted.k} of {unique:,} unique"),
        ("distortion", f"{distortion.mse:.4e} squared distance a pixel, in [-1, 1] units"),
        ("", f"{distortion.rms_levels:.2f} levels of 255 root mean square a channel"),
        ("images", f"{rejects.total:,}{_rejected(rejects)}"),
        ("sha256", fitted.sha256),
    )


def _rejected(rejects: "Rejects") -> str:
    return f", {len(rejects.found)} rejected ({rejects.reasons()})" if rejects.found else ""
