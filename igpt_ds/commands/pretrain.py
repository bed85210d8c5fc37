"""`igpt-ds pretrain`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT, training_options
from igpt_ds.errors import UserError


@click.command(context_settings=CONTEXT)
@click.option("--preset", metavar="NAME", help="tiny, demo, s, m, l, l48, xl, s-bert, ... or a file.toml.")
@click.option("--data", metavar="DIR", multiple=True, help="Folder with train/ and val/; give several to mix them.")
@click.option("--run", "run_path", metavar="RUN", type=click.Path(path_type=Path), help="Run directory.")
@click.option(
    "--init-from",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Begin a new run with these weights: a run, a checkpoint, or any format of igpt-ds convert.",
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset.")
@click.option(
    "--ds",
    "ds_source",
    default="zero3",
    show_default=True,
    metavar="NAME",
    help="ds_configs/NAME.json or a file.json.",
)
@training_options
def pretrain(
    preset: str | None,
    data: tuple[str, ...],
    run_path: Path | None,
    init_from: Path | None,
    overrides: tuple[str, ...],
    ds_source: str,
    fresh: bool,
    force: bool,
    allow_change: tuple[str, ...],
    wandb_project: str | None,
    print_config: bool,
    dry_run: bool,
    planned_ranks: int | None,
    gpus_per_node: int | None,
    device: str,
) -> None:
    """Pre-train a model; a run that holds a checkpoint goes on by itself.

    \b
    On one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds pretrain --preset l --data DATA --run RUN
    On a CPU, in one process, 20 steps:
        igpt-ds pretrain --preset tiny --data DATA --run RUN --set training.steps=20 --set seed=1
    What a GPU would have to hold, without one:
        igpt-ds pretrain --preset l --data DATA --dry-run --ranks 8
    Begin with released weights, of the same shape; another resolution is interpolated:
        igpt-ds pretrain --preset l48 --data DATA --run RUN --init-from imagegpt-large
    Go on with a run, its --preset, --data and --set taken from RUN/config.toml:
        igpt-ds pretrain --run RUN
    """
    from igpt_ds.config.file import to_toml
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.planner.report import Machine
    from igpt_ds.run.directory import Run
    from igpt_ds.train import job as jobs

    run = Run(run_path) if run_path else None
    config = jobs.choose_config(preset, run, data, overrides, init_from, fresh)
    if print_config:
        click.echo(to_toml(config), nl=False)
        return
    if run is None and not dry_run:
        raise UserError("pretrain: no --run: name the directory that the run is to write")
    ranks = launched()
    world = planned_ranks if dry_run and planned_ranks else ranks.world
    per_node = gpus_per_node or min(world, 8) if dry_run else ranks.neighbours
    job = jobs.prepare(config, ds_source, world, ranks_per_node=per_node)
    jobs.check_beginning(job, None if fresh else run)
    if run is None or dry_run:
        click.echo(jobs.dry_run(job, Machine(device)))
        return
    from igpt_ds.train.trainer import pretrain as run_pretrain

    run_pretrain(job, run, ranks, fresh=fresh, force=force, allow_change=allow_change, wandb_project=wandb_project)
