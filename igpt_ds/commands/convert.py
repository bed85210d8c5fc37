"""`igpt-ds convert`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from igpt_ds.checkpoint.safetensors_stream import Precision


@click.command(context_settings=CONTEXT)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, metavar="FORMAT", help="hf, native, npz or safetensors.")
@click.option("--dtype", "precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--step", type=click.IntRange(min=0), help="SRC is a run: the checkpoint of this step.")
@click.option(
    "--palette",
    "palette_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The colours as .npy, where SRC does not hold them (the released kmeans_centers.npy).",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="hf: of one file.")
def convert(
    source: Path,
    destination: Path,
    target: str,
    precision: str,
    step: int | None,
    palette_path: Path | None,
    max_shard_size: str,
) -> None:
    """Convert weights from one format into another, and report whether they are the same.

    \b
    SRC is recognised by its content: a run (its newest checkpoint), one checkpoint of any ZeRO stage and number of
    ranks, a Hugging Face ImageGPT directory, a safetensors file of ours, an .npz with the released names, or a
    TensorFlow checkpoint. No GPU is needed, and one parameter's memory is enough.
    \b
        igpt-ds convert RUN igpt-s --to hf
        igpt-ds convert imagegpt-small RUN --to native
        igpt-ds convert RUN weights --to safetensors --dtype bfloat16
        igpt-ds convert model.ckpt-1000000 igpt-s.npz --to npz --palette kmeans_centers.npy
    """
    from igpt_ds.weights.convert import convert as run

    report = run(
        source,
        destination,
        target,
        precision=cast("Precision", precision),
        step=step,
        palette_path=palette_path,
        shard_bytes=_bytes(max_shard_size),
    )
    click.echo(report.text())


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", text)
    unit = {"K": 1, "M": 2, "G": 3, "T": 4}
    if found:
        power = unit[found.group(2)[0]] if found.group(2) else 0
        size = int(float(found.group(1)) * (1024 if "i" in (found.group(2) or "") else 1000) ** power)
        if size:
            return size
    raise UserError(f"--max-shard-size {text}: is no size: write e.g. 5GB or 500MB")
