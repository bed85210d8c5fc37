"""How much memory this machine, or a device of it, can still give; and what becomes of memory that is freed."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that can be taken without swapping, bytes: the machine's, or what a container's limit leaves of it."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()))
        except (OSError, ValueError):  # no such kind of container, or "max"
            continue
    return max(free, 0)


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
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(trim_threshold, 2**31 - 1)
        # Older versions take no more than 32 MiB, and leave the default where more is asked for.
        library.mallopt(mmap_threshold, 2**30) or library.mallopt(mmap_threshold, 2**25)
