"""`igpt-ds pretrain`."""

from pathlib import Path
from typing import Any

import click

from igpt_ds.commands import CONTEXT, run_of, training_options
from igpt_ds.options import Renamed


@click.command(context_settings=CONTEXT)
@click.option("--preset", metavar="NAME", help="tiny, demo, s, m, l, l48, xl, s-bert, ... or a file.toml.")
@click.option("--data", metavar="DIR", multiple=True, help="Folder with train/ and val/; give several to mix them.")
@click.option(
    "--from",
    "weights",
    cls=Renamed,
    former=["--init-from"],
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Begin a new run with these weights: a run, a checkpoint, or any format of igpt-ds convert.",
)
@training_options
def pretrain(
    preset: str | None,
    data: tuple[str, ...],
    weights: Path | None,
    run_path: Path | None,
    run_option: Path | None,
    overrides: tuple[str, ...],
    ds: str | None,
    fresh: bool,
    **options: Any,
) -> None:
    """Pre-train a model; a run that holds a checkpoint goes on by itself.

    \b
    On one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds pretrain RUN --preset l --data DATA
    On a CPU, in one process, 20 steps:
        igpt-ds pretrain RUN --preset tiny --data DATA --set training.steps=20 --set seed=1
    What a GPU would have to hold, without one:
        igpt-ds pretrain --preset l --data DATA --dry-run --nodes 4
    Begin with released weights, of the same shape; another resolution is interpolated:
        igpt-ds pretrain RUN --preset l48 --data DATA --from imagegpt-large
    The final run, on train/ and val/ of every DATA together; nothing is validated:
        igpt-ds pretrain RUN --preset s --data DATA --set data.fold_validation=true
    Go on with a run, its --preset, --data and --set taken from RUN/config.toml:
        igpt-ds pretrain RUN
    """
    from igpt_ds.train.begin import pretraining
    from igpt_ds.train.launch import launch

    run = run_of(run_path, run_option)
    asked = pretraining(preset, run, data, overrides, ds, weights, fresh)
    if text := launch(asked, run, fresh=fresh, **options):
        click.echo(text)
