"""A training from its configuration: checked, and then shown, planned, or trained."""

from typing import Any

from igpt_ds.config.file import to_toml
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import launched
from igpt_ds.errors import UserError
from igpt_ds.planner.layout import gpus_of
from igpt_ds.planner.report import Machine
from igpt_ds.run.directory import Run
from igpt_ds.train.begin import check_weights, machine
from igpt_ds.train.job import dry_run as plan
from igpt_ds.train.job import prepare


def launch(
    config: Config,
    run: Run | None,
    ds: str | None = None,
    *,
    test: bool = False,
    masks: int | None = None,
    print_config: bool = False,
    dry_run: bool = False,
    nodes: int | None = None,
    planned_ranks: int | None = None,
    gpus_per_node: int | None = None,
    device: str = "h200",
    fresh: bool = False,
    **options: Any,
) -> str | None:
    """Train; every rank of a launch calls this.

    Args:
        run: None where nothing is trained.
        ds: see `igpt_ds.train.begin.machine`.
        test, masks: of a fine-tuning; see `Job`.
        nodes, gpus_per_node, device: the machines of a `dry_run`; planned_ranks: their GPUs in all.
        options: see `igpt_ds.train.trainer.train`.

    Returns:
        What is to be printed in place of a training: the configuration, or the plan of a dry run.

    Raises:
        RunError: the loss is lost for good.
    """
    if print_config:
        return to_toml(config).rstrip("\n")
    if run is None and not dry_run:
        raise UserError("RUN: none is named: name the directory that the run is to write")
    ranks, begun = launched(), None if fresh else run
    world, per_node = ranks.world, ranks.neighbours
    if dry_run:
        world = planned_ranks or gpus_of(nodes, gpus_per_node) or world
        per_node = gpus_per_node or min(world, 8)
    job = prepare(config, machine(ds, begun), world, ranks_per_node=per_node, test=test, masks=masks or 0)
    check_weights(job, begun)
    if run is None or dry_run:
        return plan(job, Machine(device))
    from igpt_ds.train.trainer import train

    train(job, run, ranks, fresh=fresh, **options)
    return None
