"""A training from its configuration: checked, and then shown, planned, or trained."""

from typing import Any

from igpt_ds.config.file import to_toml
from igpt_ds.distributed.ranks import launched
from igpt_ds.errors import UserError
from igpt_ds.planner.layout import gpus_of
from igpt_ds.planner.report import Machine
from igpt_ds.run.directory import Run
from igpt_ds.train.begin import check_weights
from igpt_ds.train.job import dry_run as plan
from igpt_ds.train.job import prepare
from igpt_ds.train.machine import Asked


def launch(
    asked: Asked,
    run: Run | None,
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
        test, masks: of a fine-tuning; see `Job`.
        nodes, gpus_per_node, device: the machines of a `dry_run`; planned_ranks: their GPUs in all.
        options: see `igpt_ds.train.trainer.train`.

    Returns:
        What is to be printed in place of a training: the configuration, or the plan of a dry run.

    Raises:
        RunError: the loss is lost for good.
    """
    if print_config:
        return to_toml(asked.known).rstrip("\n")
    if run is None and not dry_run:
        raise UserError("RUN: none is named: name the directory that the run is to write")
    ranks, begun, machine = launched(), None if fresh else run, Machine(device)
    if run is None or dry_run:
        world = planned_ranks or gpus_of(nodes, gpus_per_node) or ranks.world
        here = machine.here(world, gpus_per_node or min(world, 8))
    else:
        from igpt_ds.distributed.device import at_hand

        here = at_hand(ranks)
    job = prepare(asked, here, test=test, masks=masks or 0)
    check_weights(job, begun)
    if run is None or dry_run:
        return plan(job, machine)
    from igpt_ds.train.trainer import train

    train(job, run, ranks, here, fresh=fresh, **options)
    return None
