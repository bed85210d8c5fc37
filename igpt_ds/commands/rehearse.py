"""`igpt-ds rehearse`: one rank of a big job, on the device that is here."""

import os
from pathlib import Path

import click

from igpt_ds.commands import CONTEXT, MACHINES
from igpt_ds.memory import return_freed_memory
from igpt_ds.options import JSON, Number, show
from igpt_ds.planner.devices import DEVICES, INTERCONNECTS


@click.command(context_settings=CONTEXT)
@click.argument("preset", metavar="PRESET")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset.")
@click.option("--ds", "ds_name", default="auto", show_default=True, metavar="NAME", help="DeepSpeed configuration.")
@click.option("--nodes", default=1, show_default=True, type=MACHINES, help="Machines of the job.")
@click.option("--gpus-per-node", default=8, show_default=True, type=MACHINES, help="GPUs of each.")
@click.option("--device", metavar="NAME", help=f"Their kind: {', '.join(DEVICES)}  [the GPU that is here, or h200].")
@click.option(
    "--interconnect",
    default="ib-ndr",
    show_default=True,
    metavar="NAME",
    help=f"Between nodes: {', '.join(INTERCONNECTS)}, or a GPU's GB/s.",
)
@click.option("--resolution", type=click.IntRange(1, 4096), help="Pixels a side of the images here  [the job's].")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(1, 1000), help="Steps to time; 3 more run.")
@click.option(
    "--limit",
    default=1800.0,
    show_default=True,
    type=Number(1, 864_000),
    metavar="SECONDS",
    help="Give up after so long.",
)
@JSON
def rehearse(
    preset: str,
    overrides: tuple[str, ...],
    ds_name: str,
    nodes: int,
    gpus_per_node: int,
    device: str | None,
    interconnect: str,
    resolution: int | None,
    steps: int,
    limit: float,
    json_path: Path | None,
) -> None:
    """Run one rank of a big job on the device that is here, the others played: does it fit, how fast is it?

    \b
    One of 64 GPUs, on a machine with one:
        igpt-ds rehearse xl --nodes 8 --gpus-per-node 8
    Its memory on a laptop, with images of 8 x 8 in place of the job's:
        igpt-ds rehearse s --nodes 8 --resolution 8

    The rank runs through the real engine: ZeRO, recomputation, compilation, optimiser, a save. Measured are its memory
    and the time that it computes; messages are as planned. Tokens are random, no data is needed, and the network
    learns nothing. On a CPU the rank runs in float32, unless --set training.precision says otherwise; there, and with
    --resolution, the job's speed is planned. docs/rehearse.md says how far to trust it.
    """
    # Before torch is loaded, whose profiler tells when it begins and ends.
    return_freed_memory()
    os.environ |= {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    from igpt_ds.rehearse.job import Request
    from igpt_ds.rehearse.report import text
    from igpt_ds.rehearse.run import run

    request = Request(preset, overrides, ds_name, nodes, gpus_per_node, device, interconnect, resolution)
    record = run(request, steps, limit, lambda line: click.echo(line, err=True))
    show(text(record), record, json_path)
