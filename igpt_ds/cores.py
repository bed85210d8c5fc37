"""How many processor cores this process may use, and how many threads a piece of work has use for.

Threads of a pool wait for one another at the end of every small step. Where there are more of them than cores, or other
programs take the cores, that wait is many times longer than the work, and it spins: a processor is busy with it.
"""

import os
from pathlib import Path

from igpt_ds.memory import GROUPS, MEMBERSHIP, group_levels

_WORTH_A_THREAD = 1e8  # floating-point operations between two waits, some 20 ms of one core
_SPINS = "1000"  # some ten microseconds; by default 300 times as long


def share(neighbours: int = 1, root: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may use: its affinity, its control groups' quota, Slurm's cores a task; 1 at least.

    Args:
        neighbours: processes of the same job on this machine, this one among them, that share them.
        root, membership: see `igpt_ds.memory.group_bytes`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min([float(allowed), *_quotas(root, membership)])
    task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if task.isdecimal() and int(task) > 0:
        cores = min(cores, int(task))
        if os.environ.get("SLURM_NTASKS", "1") == os.environ.get("WORLD_SIZE"):
            neighbours = 1  # each rank is a task, whose cores are its own
    return max(1, int(cores) // neighbours)


def _quotas(root: Path, membership: Path) -> list[float]:
    found = []
    for level, version in group_levels("cpu", root, membership):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = (int(word) for name in names for word in (level / name).read_text().split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            found.append(quota / period)
    return found


def threads_for(operations: float) -> int:
    """Threads for work that does so many floating-point operations between two waits, of this process's share."""
    return min(share(), max(1, int(operations / _WORTH_A_THREAD)))


def wait_asleep() -> None:
    """Let torch's threads wait asleep, but for the first moment; before torch is imported.

    Theirs is GNU's OpenMP, whose threads spin for long by default: on a machine that has other work to do, too,
    that takes the processor from the thread they wait for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
