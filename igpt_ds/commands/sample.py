"""`igpt-ds sample`."""

from pathlib import Path
from typing import Any

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.options import PLACEMENT, Renamed
from igpt_ds.text import visible


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]")
@click.option("--images", cls=Renamed, former=["--n"], type=click.IntRange(min=1), help="How many.  [default: 16]")
@click.option("--out", "sheet", metavar="FILE", type=click.Path(path_type=Path), help="A sheet of all, as PNG.")
@click.option(
    "--npz", metavar="FILE", type=click.Path(path_type=Path), help="Pixels (arr_0) and tokens, as FID tools read them."
)
@click.option("--pngs", metavar="DIR", type=click.Path(path_type=Path), help="A new folder, with a PNG of each.")
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
    sheet: Path | None,
    npz: Path | None,
    pngs: Path | None,
    temperature: float,
    seed: int,
    top_k: int | None,
    top_p: float,
    device_map: str | None,
    max_memory: str | None,
    **options: Any,
) -> None:
    """Draw images, or complete given ones of which the model sees the upper rows.

    \b
    A grid of 16:
        igpt-ds sample RUN --images 16 --out samples.png
    Four completions each of 8 validation images, beside what was given and the original:
        igpt-ds sample RUN --images 8 --complete DATA --out completions.png
    Of your own pictures, from their first 10 rows, drawn less freely:
        igpt-ds sample RUN --picture a.png --picture b.png --rows 10 --top-p 0.95 --out completions.png
    What an FID is computed of, 50 000 images:
        igpt-ds sample RUN --images 50000 --npz samples.npz
    Divided over 8 GPUs, each with the whole network (iGPT-XL: 27 GB, half in bfloat16); the pictures are the same on
    any number:
        torchrun --nproc-per-node 8 -m igpt_ds -- sample RUN --images 64 --precision bfloat16 --out samples.png
    """
    from igpt_ds.model.sampling import Drawing
    from igpt_ds.samples.draw import Outputs, draw
    from igpt_ds.weights.placed import parse_placement

    out = Outputs(sheet, npz, pngs)
    placement = parse_placement(device_map, max_memory)
    step = draw(run_path, out, Drawing(seed, temperature, top_k, top_p), placement=placement, **options)
    if step is not None:
        click.echo(visible(f"written: {', '.join(map(str, out.named))} (step {step})"))


sample.params.extend(PLACEMENT)
