"""Machines that are played: what decides in place of the one that the tests run on."""

from dataclasses import replace

from igpt_ds.planner.choose import Here

GIB = 2**30
CPU = Here("CPU", 16 * GIB, gpu=False, bf16=False, ranks=1, ranks_per_node=1)
H100 = Here("NVIDIA H100 80GB HBM3", 78 * GIB, gpu=True, bf16=True, ranks=1, ranks_per_node=1)
V100 = Here("Tesla V100-SXM2-32GB", 31 * GIB, gpu=True, bf16=False, ranks=1, ranks_per_node=1)


def several(machine: Here, ranks: int) -> Here:
    """So many ranks of it in one node."""
    return replace(machine, ranks=ranks, ranks_per_node=ranks)
