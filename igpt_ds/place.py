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


def place() -> Place:
    """Read what the launcher (deepspeed, torchrun, accelerate, or srun with RANK set) put into the environment.

    Raises:
        UserError: the environment names a world but not this process's rank in it.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("WORLD_SIZE is set but RANK is not: start one process a rank through a launcher")
        return Place(0, 1, 0)
    return Place(
        int(os.environ["RANK"]),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )
