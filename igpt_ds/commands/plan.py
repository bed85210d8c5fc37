"""`igpt-ds plan`: what a training will need, before a GPU is used."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT, MACHINES
from igpt_ds.options import JSON, Number, show
from igpt_ds.planner.devices import DEVICES, INTERCONNECTS


@click.command(context_settings=CONTEXT)
@click.argument("preset", metavar="PRESET")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset.")
@click.option("--ds", "ds_source", default="auto", show_default=True, metavar="NAME", help="DeepSpeed configuration.")
@click.option("--nodes", default=1, show_default=True, type=MACHINES, help="Machines.")
@click.option("--gpus-per-node", default=8, show_default=True, type=MACHINES, help="GPUs of each.")
@click.option("--device", default="h200", show_default=True, metavar="NAME", help=f"{', '.join(DEVICES)}.")
@click.option(
    "--interconnect",
    default="ib-ndr",
    show_default=True,
    metavar="NAME",
    help=f"Between nodes: {', '.join(INTERCONNECTS)}, or a GPU's GB/s.",
)
@click.option("--peak-tflops", type=Number(0.001, 1e6), help="Of another device: dense matrix products' TFLOP/s.")
@click.option("--memory-gib", type=Number(0.001, 1e6), help="Its memory.")
@click.option("--bandwidth", type=Number(0.001, 1e6), help="Its memory's GB/s.")
@click.option(
    "--mfu",
    type=Number(0.001, 1),
    help="Of the computation alone, by model FLOPs [by a model of its kernels].",
)
@click.option("--images", type=click.IntRange(1, 10**12), help="Images of the data, for its size on disk [ImageNet's].")
@JSON
def plan(
    preset: str,
    overrides: tuple[str, ...],
    ds_source: str,
    nodes: int,
    gpus_per_node: int,
    device: str,
    interconnect: str,
    peak_tflops: float | None,
    memory_gib: float | None,
    bandwidth: float | None,
    mfu: float | None,
    images: int | None,
    json_path: Path | None,
) -> None:
    """Memory, messages, time and disk of a training; what limits it, and what would be faster. Needs no GPU.

    \b
    The paper's largest model on 8 nodes, in the way that the machine would choose:
        igpt-ds plan xl --nodes 8 --gpus-per-node 8 --device h200
    On one node of older GPUs, in another way:
        igpt-ds plan l --gpus-per-node 4 --device a100 --ds zero2 --set training.activation_checkpointing=full
    On a device of which no data sheet is here:
        igpt-ds plan s --gpus-per-node 1 --device mine --peak-tflops 100 --memory-gib 16 --bandwidth 500

    PRESET is tiny, s, m, l, l48, xl, s-bert, ... or a file.toml. Sizes are exact or tested against measurements; times
    follow from data sheets and stated assumptions. docs/plan.md has the arithmetic.
    """
    from igpt_ds.config.file import load_config
    from igpt_ds.planner.report import IMAGENET, Machine, decided_layout, make_plan
    from igpt_ds.planner.text import plan_text

    machine = Machine(device, interconnect, mfu, peak_tflops, memory_gib, bandwidth)
    layout, line = decided_layout(load_config(preset, overrides), ds_source, nodes, gpus_per_node, machine)
    found = {"decision": line, **make_plan(layout, machine, images or IMAGENET)}
    show(f"{line}\n\n{plan_text(found)}", found, json_path)
