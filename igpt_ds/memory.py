"""How much memory this machine, or a device of it, can still give; and what becomes of memory that is freed."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Memory that this process can take without swapping, bytes: the machine's, or what its control groups leave."""
    group = group_bytes()
    return machine_bytes() if group is None else min(machine_bytes(), group)


def machine_bytes() -> int:
    """Memory of the machine that can be taken without swapping, bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def group_bytes(root: Path = GROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that the control groups (schedulers and containers set them) leave to this process; None: no limit.

    A group counts its page cache as used, which it gives back when asked: what is idle of it is free here.

    Args:
        root: where the groups are mounted; version 1 and 2 are known.
        membership: the groups that the process is in.
    """
    least = None
    for level, version in group_levels("memory", root, membership):
        if version == 2:
            limit_name, used_name, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        limit, used = _number_in(level / limit_name), _number_in(level / used_name)
        if limit is not None and used is not None and limit < 2**60:
            left = max(0, limit - used + _statistic(level / "memory.stat", cached))
            least = left if least is None else min(least, left)
    return least


def group_levels(controller: str, root: Path = GROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[Path, int]]:
    """The control groups that this process is in, each with its version; a limit on any level binds.

    Args:
        controller: "memory" or "cpu".
        root, membership: see `group_bytes`.
    """
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            yield level, 1 if controllers else 2
            if level == base:
                break


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def free_bytes(device: "torch.device", neighbours: int) -> int:
    """Memory that a process can still take on its device, bytes; of a CPU its share among the ranks of the machine."""
    if device.type != "cuda":
        return available_bytes() // neighbours
    import torch

    # What torch holds in reserve and does not use is free as well.
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next step; before torch takes its first.

    glibc gives large pieces back to the system, which hands them out again a page fault at a time: on a CPU a tenth and
    more of a training step, which frees all its activations (benchmarks/results/train_step.md). So it keeps them, and
    torch asks for huge pages, on whose borders less is lost between kept pieces. With another C library only
    the latter.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Older versions take no more than 32 MiB, and leave the default where more is asked for.
    _set_thresholds(2**31 - 1, (2**30, 2**25))


def return_freed_memory() -> None:
    """Let this process give large pieces of memory back as soon as they are free, whatever `keep_freed_memory` has set.

    Pieces of ever other sizes, as ZeRO-3 gathers them, do not fit into what was kept: a process that has no memory to
    spare would hold several times what it uses.
    """
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    _set_thresholds(2**17, (2**18,))


def _set_thresholds(trim: int, mmap: tuple[int, ...]) -> None:
    """Of glibc's allocator: free memory at its end, and sizes of pieces, that go back to the system."""
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(trim_threshold, trim)
        any(library.mallopt(mmap_threshold, size) for size in mmap)
