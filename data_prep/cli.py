"""`igpt-data`: images to a palette, to token shards, and the shards checked.

Heavy imports stay inside the commands, so that --help answers at once.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from data_prep.rejects import Rejects

_PATH = click.Path(path_type=Path)
_REJECT_RATE = click.option(
    "--max-reject-rate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of images that may be skipped because they cannot be read.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Turn images into token shards for Image GPT.

    \b
    Images in class folders, to be trained on at 32 x 32:
      igpt-data palette IMAGES --k 512 --out palette.npy
      igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 \\
          --holdout 0.04 --out DATA
      igpt-data verify DATA/train
    """


@cli.command()
@click.argument("where", nargs=-1, required=True, metavar="[SOURCE] IMAGES")
@click.option("--k", type=int, default=512, show_default=True, help="Number of colours.")
@click.option("--out", type=_PATH, required=True, help="File to write, e.g. palette.npy.")
@click.option(
    "--resolution",
    type=click.IntRange(min=1),
    help="Side of the images when they become tokens.  [default: 32, or their own with --no-crop]",
)
@click.option("--no-crop", is_flag=True, help="Take whole images: they are small already.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@_REJECT_RATE
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
    with _Progress("palette") as progress:
        progress.start(len(source.items()))
        fitted, distortion, unique, rejects = run(
            source, transform, k=k, seed=seed, out=out, max_reject_rate=max_reject_rate, tick=progress.tick
        )
    _table(
        ("palette", str(out)),
        ("colours", f"{fitted.k} of {unique:,} unique"),
        ("distortion", f"{distortion.mse:.4e} squared distance a pixel, in [-1, 1] units"),
        ("", f"{distortion.rms_levels:.2f} levels of 255 root mean square a channel"),
        ("images", f"{rejects.total:,}{_rejected(rejects)}"),
        ("sha256", fitted.sha256),
    )


@cli.command()
@click.argument("source_name", metavar="SOURCE")
@click.argument("images")
@click.option("--palette", "palette_path", type=_PATH, required=True, help="Palette from igpt-data palette.")
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
@click.option("--out", type=_PATH, required=True, help="Directory for DATA/train and DATA/val.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of crops and order.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), default=16384, show_default=True)
@_REJECT_RATE
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
    with _Progress("shards") as progress:
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


@cli.command()
@click.argument("directory", type=_PATH)
def verify(directory: Path) -> None:
    """Read a dataset again, every byte, and hold it against its manifest.

    \b
    Example:
      igpt-data verify DATA/train
    """
    from data_prep.verify import verify as read_again
    from igpt_ds.manifest import Manifest

    manifest = Manifest.load(directory)
    with _Progress("verify", unit="B") as progress:
        progress.start(sum(shard.bytes for shard in manifest.shards))
        summary = read_again(directory, progress.tick)
    _table(
        ("dataset", f"{directory} ({manifest.split} split of {manifest.source})"),
        ("images", f"{manifest.rows:,} in {summary.views} view(s)"),
        ("labels", "none" if manifest.classes is None else f"{len(manifest.classes)} classes"),
        ("shards", f"{summary.shards:,}, {summary.bytes / 1e6:,.1f} MB, every sha256 right"),
        ("tokens", f"{manifest.sequence_length:,} a row ({manifest.resolution} x {manifest.resolution})"),
        ("palette", f"{summary.colours_used} of {manifest.palette['k']} colours used"),
        ("entropy", f"{summary.entropy:.4f} nats a token (of the tokens' frequencies)"),
        ("rejected", f"{manifest.rejected:,}"),
    )


class _Progress:
    """A progress bar on a terminal, nothing elsewhere; counts and times either way."""

    def __init__(self, what: str, unit: str = " images") -> None:
        self.what, self.unit = what, unit
        self.done, self.rate = 0, 0.0

    def __enter__(self) -> "_Progress":
        from tqdm import tqdm

        self.began = time.perf_counter()
        # disable=None: a bar on a terminal only.
        self.bar = tqdm(desc=self.what, unit=self.unit, unit_scale=self.unit == "B", disable=None, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.rate = self.done / max(time.perf_counter() - self.began, 1e-9)

    def start(self, total: int) -> None:
        self.began = time.perf_counter()
        self.bar.reset(total)

    def tick(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)


def _rejected(rejects: "Rejects") -> str:
    return f", {len(rejects.found)} rejected ({rejects.reasons()})" if rejects.found else ""


def _table(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        click.echo(f"{name:<12}{value}")


def main() -> None:
    """The console script: a user's mistake is one line on stderr and exit status 2."""
    try:
        sys.exit(cli(prog_name="igpt-data", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (UserError, click.ClickException) as error:
        message = str(error)
        if isinstance(error, click.UsageError) and error.ctx:
            message = f"{error.format_message().rstrip('.')}: see {error.ctx.command_path} --help"
        click.echo(f"igpt-data: {' '.join(message.splitlines())}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("igpt-data: interrupted; the same command again continues", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
