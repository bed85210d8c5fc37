"""Where a process stands among the ranks, as its launcher says."""

import os
from dataclasses import dataclass

from igpt_ds.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others."""

    rank: int
    world: int
    local_rank: int
    neighbours: int = 1  # ranks on this machine, this one among them


def place() -> Place:
    """Read what the launcher (deepspeed, torchrun, accelerate, or srun with RANK set) put into the environment.

    Raises:
        UserError: the environment names a world but not this process's rank in it.
    """
    if "RANK" not in os.environ:
        if _whole("WORLD_SIZE", "1") > 1:
            raise UserError("WORLD_SIZE is set but RANK is not: start one process a rank through a launcher")
        return Place(0, 1, 0)
    world = _whole("WORLD_SIZE", "1")
    neighbours = next((_whole(name, "1") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), world)
    return Place(_whole("RANK", "0"), world, _whole("LOCAL_RANK", "0"), neighbours)


def _whole(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}: is {text!r} in the environment, no whole number: let a launcher set it")
    return int(text)
