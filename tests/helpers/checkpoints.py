"""Checkpoints written by ranks that are threads, for the tests of checkpoint/."""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from igpt_ds.checkpoint.names import step_directory
from igpt_ds.checkpoint.read import KINDS, Shard
from igpt_ds.checkpoint.write import Saver
from igpt_ds.lock import Lock

T = TypeVar("T")
AnyRank = Callable[[bool], bool]
SHAPES = {"token_embedding": (11, 4), "start": (4,), "blocks.0.norm.gain": (1,), "blocks.0.qkv.weight": (12, 5)}
FACTS = {"identity": {"seed": 3}, "config": {"name": "test"}, "version": "0"}


def originals(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter name -> kind -> flat values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(int(np.prod(shape)), generator=generator) for kind in KINDS}
        for name, shape in SHAPES.items()
    }


def shards_of(rank: int, world: int, seed: int = 0) -> list[Shard]:
    """Every parameter cut into uneven pieces, some of them empty."""
    shards = []
    for name, values in originals(seed).items():
        count = len(values["weight"])
        cuts = [0, *sorted((count * (i + 1) ** 2) // (world**2) for i in range(world))]
        start, stop = cuts[rank], cuts[rank + 1]
        shards.append(Shard(name, SHAPES[name], start, stop, {k: v[start:stop] for k, v in values.items()}.__getitem__))
    return shards


def on_ranks(world: int, action: Callable[[int, AnyRank], T]) -> list[T | BaseException]:
    """Run an action on every rank, threads here; `any_rank` is a collective that waits for all of them."""
    barrier = threading.Barrier(world, timeout=30)
    flags, outcomes = [False] * world, [None] * world

    def run(rank: int) -> None:
        def any_rank(fault: bool) -> bool:
            flags[rank] = fault
            barrier.wait()
            found = any(flags)
            barrier.wait()
            return found

        try:
            outcomes[rank] = action(rank, any_rank)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return outcomes


def save(
    folder: Path,
    step: int,
    shards: Iterable[Shard],
    facts: Mapping[str, Any],
    rank: int,
    world: int,
    any_rank: AnyRank,
    lock: Lock | None = None,
) -> Path:
    """Write a checkpoint and wait for it."""
    saver = Saver(folder, rank, world, any_rank, lock=lock)
    saver.begin(step, shards, facts)
    return saver.conclude()


def save_all(folder: Path, step: int, world: int = 1, seed: int = 0) -> Path:
    paths = on_ranks(
        world, lambda r, any_rank: save(folder, step, shards_of(r, world, seed), FACTS, r, world, any_rank)
    )
    assert paths == [step_directory(folder, step)] * world
    return paths[0]


def one_rank(fault: bool) -> bool:
    return fault
