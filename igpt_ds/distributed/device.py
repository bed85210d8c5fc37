"""The machine at hand: what a rank's device is called, what it can do, and the memory that it has left."""

import dataclasses
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.memory import available_bytes, free_bytes
from igpt_ds.planner.choose import Here


def at_hand(ranks: Ranks) -> Here:
    """The machine as this rank sees it, which needs none of the others."""
    gpu = ranks.gpu()
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    return Here(
        name="CPU" if gpu is None else torch.cuda.get_device_name(device),
        memory=free_bytes(device, ranks.neighbours),
        gpu=gpu is not None,
        bf16=gpu is not None and has_bfloat16(gpu),
        ranks=ranks.world,
        ranks_per_node=ranks.neighbours,
        compiles=not missing_to_compile(),
        host=available_bytes() // ranks.neighbours,
    )


def in_common(here: Here, ranks: Ranks) -> Here:
    """What all ranks have, and so the same on each of them: the least memory, and what every one can do; a collective.

    What a rank reads differs from rank to rank and from moment to moment; what is decided by it must not.
    """
    return dataclasses.replace(
        ranks.from_rank_0(here),
        memory=ranks.least(here.memory),
        host=ranks.least(here.host),
        bf16=bool(ranks.least(here.bf16)),
        compiles=bool(ranks.least(here.compiles)),
    )


def require_device(config: Config, here: Here) -> None:
    """Refuse what this machine lacks beside what was decided for it: TF32, what torch.compile needs."""
    if config.training.compile is True and (missing := missing_to_compile()):
        raise UserError(
            f"training.compile=true: {' and '.join(missing)} not found: install Python's headers and a compiler "
            "(python3-dev and g++ on Debian), or set training.compile=false"
        )
    if config.training.precision == "tf32" and not (here.gpu and torch.cuda.is_tf32_supported()):
        raise UserError(f"training.precision=tf32: {here.name} does not compute in it: set training.precision=float32")


def has_bfloat16(index: int) -> bool:
    """Whether a GPU computes bfloat16 in hardware."""
    # As torch.cuda.is_bf16_supported, which tells it of the current device only.
    return torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] >= 8


def missing_to_compile() -> list[str]:
    """What torch.compile needs and is not here; on a CPU as on a GPU it compiles against Python's headers."""
    compiler = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return ([] if headers else ["Python.h"]) + ([] if shutil.which(compiler) else [compiler])
