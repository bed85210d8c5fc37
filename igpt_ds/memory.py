"""How much memory this machine, or a device of it, can still give."""

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
