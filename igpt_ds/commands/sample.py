"""`igpt-ds sample`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from igpt_ds.evals.features import Precision

DEFAULT = 16


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]")
@click.option("--n", "count", type=click.IntRange(min=1), help=f"Images.  [default: {DEFAULT}]")
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--temperature", default=1.0, show_default=True, help="Divides the logits; 0 takes the likeliest token.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0, max=2**31 - 1))
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens only.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens of this much probability."
)
@click.option("--complete", metavar="DIR", help="Complete the first images of this data.")
@click.option("--split", type=click.Choice(["val", "test", "train"]), help="With --complete: of it.  [default: val]")
@click.option(
    "--picture",
    "paths",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Complete this PNG of the model's resolution; give several to complete them all.",
)
@click.option("--rows", type=int, metavar="N", help="Rows of each image that are given.  [default: the upper half]")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def sample(
    run_path: Path,
    step: int | None,
    count: int | None,
    out: Path,
    temperature: float,
    seed: int,
    top_k: int | None,
    top_p: float,
    complete: str | None,
    split: str | None,
    paths: tuple[Path, ...],
    rows: int | None,
    precision: "Precision",
) -> None:
    """Draw images, or complete given ones of which the model sees the upper rows.

    \b
    A grid of 16:
        igpt-ds sample RUN --n 16 --out samples.png
    Four completions each of 8 validation images, beside what was given and the original:
        igpt-ds sample RUN --n 8 --complete DATA --out completions.png
    Of your own pictures, from their first 10 rows, drawn less freely:
        igpt-ds sample RUN --picture a.png --picture b.png --rows 10 --top-p 0.95 --out completions.png
    Divided over 8 GPUs, each with the whole network (iGPT-XL: 27 GB, half in bfloat16); the pictures are the same on
    any number:
        torchrun --nproc-per-node 8 -m igpt_ds -- sample RUN --n 64 --precision bfloat16 --out samples.png
    """
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.evals import samples
    from igpt_ds.evals.features import load_model
    from igpt_ds.loading.splits import open_split
    from igpt_ds.model.sampling import Drawing
    from igpt_ds.weights.base import config_of, palette_of
    from igpt_ds.weights.formats import open_weights

    if complete and paths:
        raise UserError("--picture: not beside --complete: complete the one or the other")
    if paths and count is not None:
        raise UserError("--n: not beside --picture, all of which are completed: leave it out")
    if split and not complete:
        raise UserError(f"--split {split}: without --complete there is no data: leave it out")
    if rows is not None and not (complete or paths):
        raise UserError(f"--rows {rows}: nothing is given: add --complete DIR or --picture FILE")
    drawing, ranks = Drawing(seed, temperature, top_k, top_p), launched()
    checkpoint = open_weights(run_path, step)
    config, palette = config_of(checkpoint), palette_of(checkpoint)
    if palette is None:
        raise UserError(f"{checkpoint.path}: no palette.npy: igpt-ds convert adds one: --to native --palette FILE")
    if not config.causal:
        raise UserError(f"{run_path}: is a BERT model: only next_pixel models draw images token by token")
    tokens = None
    if paths:
        tokens = samples.pictures(paths, config.sequence_length, palette)
    elif complete:
        dataset = open_split(complete, split or "val")
        tokens = samples.first_images(dataset, count or DEFAULT, config.sequence_length, palette)
    rows = round(config.sequence_length**0.5) // 2 if rows is None else rows
    if tokens is not None:
        samples.prefixes(tokens, rows)  # refused before the ranks meet
    with ranks.meeting():
        model = load_model(config, checkpoint, precision)
        if tokens is None:
            sheet = samples.free_samples(model, palette, count or DEFAULT, drawing, ranks)
        else:
            sheet = samples.completions(model, tokens, palette, rows, drawing, ranks)
    if sheet is not None:
        samples.save_png(sheet, out)
        click.echo(f"written: {out} (step {checkpoint.step})")
