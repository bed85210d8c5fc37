"""The tables of plans that docs/plan.md holds: `python -m benchmarks.plans` prints them; a test compares.

Planned, not measured: what `igpt-ds plan` says, everything being left to the machine.
"""

from igpt_ds.config.file import load_config
from igpt_ds.planner.report import Machine, decided_layout, make_plan
from igpt_ds.text import Table

# Preset, device, nodes, GPUs of each, what is changed.
JOBS: list[tuple[str, str, int, int, list[str]]] = [
    *((preset, "h100", 1, 1, []) for preset in ("s", "m", "l")),
    *((preset, "rtx4090", 1, 1, []) for preset in ("s", "m")),
    ("s", "v100", 1, 1, []),
    ("l", "a100", 1, 8, []),
    ("xl", "h200", 1, 1, []),
    ("xl", "h100", 1, 8, []),
    ("xl", "h200", 1, 8, []),
    ("xl", "h200", 8, 8, []),
    ("xl", "h200", 64, 8, ["training.sequence_parallel=8"]),
]


def row(preset: str, device: str, nodes: int, gpus: int, changes: list[str]) -> list[str]:
    """What is decided for a job, what it takes, and how long."""
    layout, line = decided_layout(load_config(preset, changes), "auto", nodes, gpus, Machine(device))
    plan = make_plan(layout, Machine(device))
    shared = plan["layout"]["sequence_parallel"]
    machine, how = line.split(": ")[:2]
    return [
        machine + (f", {shared} ranks an image" if shared > 1 else ""),
        preset,
        how,
        f"{plan['bytes_per_rank']['total'] / 2**30:.1f}",
        f"{plan['images_per_second']:.3g}",
        f"{plan['mfu_of_step']:.0%}",
        f"{plan['days']:.3g}",
        plan["limits"]["step"],
    ]


def table() -> str:
    """Markdown."""
    headings = ("machine", "preset", "decided", "GiB a GPU", "images/s", "MFU", "days", "limited by")
    return Table("", headings, [row(*job) for job in JOBS]).markdown()


if __name__ == "__main__":
    print(table(), end="")
