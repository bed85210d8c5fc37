"""`igpt-ds finetune`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT, training_options
from igpt_ds.errors import UserError


@click.command(context_settings=CONTEXT)
@click.option(
    "--from",
    "start",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Pre-training: a run, a checkpoint, or any format.",
)
@click.option("--from-scratch", "scratch", is_flag=True, help="Random weights: the model of --preset, or of --from.")
@click.option("--preset", metavar="NAME", help="With --from-scratch: tiny, s, m, l, ... or a file.toml.")
@click.option("--data", metavar="DIR", help="Folder with labelled train/ and val/.")
@click.option("--run", "run_path", metavar="RUN", type=click.Path(path_type=Path), help="Run directory.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact: finetune.layer=12, ...")
@click.option("--test", is_flag=True, help="At the end, test the best checkpoint once on DIR/test.")
@click.option(
    "--masks", type=click.IntRange(min=1), help="BERT: also the modal prediction of so many masks (paper: 5)."
)
@click.option("--ds", "ds_source", default="zero3", show_default=True, metavar="NAME", help="As pretrain.")
@training_options
def finetune(
    start: Path | None,
    scratch: bool,
    preset: str | None,
    data: str | None,
    run_path: Path | None,
    overrides: tuple[str, ...],
    test: bool,
    masks: int | None,
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
    """Fine-tune a model to classify; a run that holds a checkpoint goes on by itself.

    \b
    As the paper does for CIFAR, on one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds finetune --from runs/l --data cifar10 --run runs/l-cifar10 \\
            --set finetune.augmentation=crop_flip --test
    Without the generative loss, and from random weights:
        igpt-ds finetune --from RUN --data DATA --run A --set finetune.generative_weight=0
        igpt-ds finetune --from RUN --from-scratch --data DATA --run B --set finetune.dropout=0.1
    The final run, on train/ and val/ together, for as many steps as were best:
        igpt-ds finetune --from RUN --data DATA --run C --test --set finetune.fold_validation=true \\
            --set training.validate_every=0 --set training.steps=N
    Go on with a run:
        igpt-ds finetune --run A

    The rate is constant, a tenth of the pre-training's; validated once an epoch, it ends after 5 validations without a
    better accuracy, or after 50 epochs. The best checkpoint is kept; RUN/result.json tells its accuracy.
    """
    from igpt_ds.config.file import to_toml
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.planner.report import Machine
    from igpt_ds.run.directory import Run
    from igpt_ds.train import finetune as tuning
    from igpt_ds.train import job as jobs

    if run_path is None and not (print_config or dry_run):
        raise UserError("finetune: no --run: name the directory that the run is to write")
    run = Run(run_path) if run_path else None
    going_on = run if run is not None and run.config.exists() and not fresh else None
    config = tuning.choose_config(start, preset, going_on, data, overrides, scratch)
    if print_config:
        click.echo(to_toml(config), nl=False)
        return
    ranks = launched()
    world = planned_ranks if dry_run and planned_ranks else ranks.world
    per_node = gpus_per_node or min(world, 8) if dry_run else ranks.neighbours
    job = jobs.prepare(config, ds_source, world, ranks_per_node=per_node, test=test, masks=masks or 0)
    tuning.check_start(job.config, run, job.train_sets[0].palette.sha256)
    if run is None or dry_run:
        click.echo(jobs.dry_run(job, Machine(device)))
        return
    from igpt_ds.train.trainer import pretrain as train

    train(job, run, ranks, fresh=fresh, force=force, allow_change=allow_change, wandb_project=wandb_project)
