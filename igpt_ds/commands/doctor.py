"""`igpt-ds doctor`: fit to run? For people, and for the head of a job script."""

import os
import sys
from pathlib import Path

import click

from igpt_ds.commands import CONTEXT, MACHINES, RANKS, run_of, shown
from igpt_ds.errors import RunError, UserError
from igpt_ds.options import JSON, Number, show


@click.command(context_settings=CONTEXT)
@click.option("--data", metavar="DIR", multiple=True, help="Folder with train/ and val/ [those of RUN/config.toml].")
@click.argument("run_path", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--run", "run_option", hidden=True, type=click.Path(path_type=Path))
@click.option("--preset", metavar="NAME", help="Preset or file.toml of the run [RUN/config.toml].")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset.")
@click.option("--ds", metavar="NAME", help="DeepSpeed configuration.  [default: RUN/ds.json, or auto]")
@click.option("--nodes", type=MACHINES, help="Machines of the run  [those started, or this one].")
@click.option("--gpus-per-node", type=MACHINES, help="GPUs of each  [those that are there, or 8].")
@RANKS
@click.option(
    "--wait",
    "limit",
    default=300.0,
    show_default=True,
    type=Number(2, 86_400),
    metavar="SECONDS",
    help="Longest wait for ranks that do not come.",
)
@JSON
def doctor(
    data: tuple[str, ...],
    run_path: Path | None,
    run_option: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    ds: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    planned_ranks: int | None,
    limit: float,
    json_path: Path | None,
) -> None:
    """Is this machine, this job, fit to run? A table of OK, WARN and FAIL, each with what to do.

    \b
    On one machine; with --nodes, also what 64 GPUs would have to hold:
        igpt-ds doctor RUN --data DATA --preset xl
        igpt-ds doctor RUN --data DATA --preset xl --nodes 8
    In a job script before the training (WORLD_SIZE, MASTER_ADDR and MASTER_PORT as slurm/env.sh exports them):
        srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec \\
            python -m igpt_ds doctor RUN --data DATA --preset xl'
    On one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds doctor RUN --data DATA --preset xl

    As several ranks it also multiplies matrices on all of them at once and names those that are slower than the rest,
    adds up over the network, and compares the clocks. It takes the options of pretrain and judges that run. A second
    or two of every GPU is used, and up to 256 MB a node are written to RUN's file system and removed.

    Exit status: 0 no FAIL, 1 some FAIL, 2 bad arguments.
    """
    from igpt_ds.distributed.ranks import launched

    run = run_of(run_path, run_option)

    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "") not in ("", "1"):
        raise UserError("doctor: several srun tasks, but RANK is not set: RANK=$SLURM_PROCID as in slurm/env.sh")
    ranks = launched()
    from igpt_ds.doctor.examine import examine
    from igpt_ds.doctor.inputs import Request
    from igpt_ds.doctor.report import table
    from igpt_ds.planner.layout import gpus_of

    request = Request(data, run.path if run else None, preset, overrides, ds)
    outcome = examine(request, ranks, planned_ranks or gpus_of(nodes, gpus_per_node), limit)
    report = outcome.report
    if report is not None:
        show(table(report, shown), report.figures(), json_path)
    if outcome.hangs:
        # A thread waits inside NCCL, for ever, and Python's orderly end would wait for it.
        sys.stdout.flush()
        os._exit(1)
    if report is not None and report.status == "FAIL":
        raise RunError(f"doctor: {report.count('FAIL')} of {len(report.checks)} checks failed: see their remedies")
