"""`igpt-ds sample`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--n", "count", default=16, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--temperature", default=1.0, show_default=True, help="Divides the logits; 0 takes the likeliest token.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0, max=2**31 - 1))
@click.option("--complete", metavar="DIR", help="Complete the upper half of the first images of this data's val/.")
def sample(run_path: Path, count: int, out: Path, temperature: float, seed: int, complete: str | None) -> None:
    """Draw images, or complete given ones.

    \b
    A grid of 16:
        igpt-ds sample RUN --n 16 --out samples.png
    Four completions each of 8 validation images, beside what was given and the original:
        igpt-ds sample RUN --n 8 --complete DATA --out completions.png
    """
    from igpt_ds.evals import samples
    from igpt_ds.evals.features import load_model
    from igpt_ds.formats import open_weights
    from igpt_ds.sources import open_split
    from igpt_ds.weights import config_of, palette_of

    checkpoint = open_weights(run_path)
    dataset = open_split(complete, "val") if complete else None
    palette = palette_of(checkpoint)
    if palette is None:
        raise UserError(f"{checkpoint.path}: no palette.npy: igpt-ds convert adds one: --to native --palette FILE")
    model = load_model(config_of(checkpoint), checkpoint)
    if dataset is None:
        sheet = samples.free_samples(model, palette, count, seed, temperature)
    else:
        sheet = samples.completions(model, dataset, palette, count, seed, temperature)
    samples.save_png(sheet, out)
    click.echo(f"written: {out} (step {checkpoint.step})")
