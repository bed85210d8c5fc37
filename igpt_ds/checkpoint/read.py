"""Checkpoints that any number of ranks can write and any other number can read.

    RUN/checkpoints/step-00001000/
        checkpoint.json             step, identity, versions; per tensor its shape and where each slice lies;
                                    per file its bytes and sha256; and the sha256 of all this
        rank-00000.safetensors      the slices of rank 0: NAME:weight, NAME:exp_avg, NAME:exp_avg_sq, flat float32
        rank-00001.safetensors      ...

DeepSpeed's own files are bound to the world size and ZeRO stage that wrote them, are pickles, and name a newest
checkpoint before all ranks have finished. Ours are plain slices, so a reader at another world size or stage picks
what it needs, and an evaluation reads the weights alone, without DeepSpeed.

All ranks write into a hidden directory; rank 0 adds checkpoint.json and renames it (write.py). A directory named
step-N is therefore whole; names.py tells which are a run's own. Nothing in here knows DeepSpeed; what must happen on
all ranks comes in as `any_rank`.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_ds.atomic import sha256_file
from igpt_ds.checkpoint.names import read_content
from igpt_ds.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)

AnyRank = Callable[[bool], bool]


@dataclass(frozen=True)
class Shard:
    """Elements start..stop of one flattened parameter.

    Attributes:
        values: a kind of `KINDS` -> flat float32 of stop - start elements, on any device; called when they are needed,
            since it may have to make them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Callable[[str], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened. Tensors are read when asked for, a slice at a time."""

    path: Path
    step: int
    identity: dict[str, Any]
    world: int
    config: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    progress: dict[str, Any]  # what going on needs beside the tensors: see `igpt_ds.train.resume`
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read checkpoint.json and check that every file is there in its full size."""
        content = read_content(path)
        try:
            checkpoint = cls(
                path,
                content["step"],
                content["identity"],
                content["world"],
                content["config"],
                content["tensors"],
                content["files"],
                content.get("progress", {}),
            )
            checkpoint._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a whole checkpoint ({error}): remove it or take another") from error
        for name, facts in checkpoint.files.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"]:
                raise UserError(f"{file}: missing or cut short: remove this checkpoint, an older one is used then")
        return checkpoint

    def _check(self) -> None:
        """Refuse what no run has written, though its sha256 is right."""
        trees = (self.identity, self.config, self.tensors, self.files, self.progress)
        if not all(isinstance(tree, dict) for tree in trees):
            raise ValueError("checkpoint.json holds something else than a checkpoint's facts")
        if self.world != len(self.files) or self.files.keys() != {rank_file(r) for r in range(len(self.files))}:
            raise ValueError("its files are not those of its ranks")
        if not all(type(facts["bytes"]) is int and type(facts["sha256"]) is str for facts in self.files.values()):
            raise ValueError("its files have no size or no sha256")
        for name, facts in self.tensors.items():
            require_covered(name, facts["shape"], facts["slices"], self.world)

    def verify(self, rank: int = 0, world: int = 1, tick: Callable[[int], object] = lambda read: None) -> None:
        """Compare the sha256 of every `world`-th file, beginning with `rank`.

        Args:
            tick: told the bytes as they are read.
        """
        for name in sorted(self.files)[rank::world]:
            if sha256_file(self.path / name, tick) != self.files[name]["sha256"]:
                raise UserError(
                    f"{self.path / name}: damaged: its sha256 is not the one recorded: take another checkpoint"
                )

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of a flattened tensor, gathered from the files that hold them: float32 on the CPU."""
        slices = self.tensors[name]["slices"]  # [rank, start, stop], in order
        values, filled = torch.empty(stop - start), 0
        for rank, first, last in slices[max(0, bisect.bisect(slices, start, key=lambda s: s[1]) - 1) :]:
            if first >= stop:
                break
            low, high = max(first, start), min(last, stop)
            if low < high:
                values[filled : filled + high - low] = self._slice(rank, f"{name}:{kind}", low - first, high - first)
                filled += high - low
        return values

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole: name -> float32 tensor of the parameter's shape."""
        return {
            name: self.read(name, "weight", 0, math.prod(facts["shape"])).view(facts["shape"])
            for name, facts in self.tensors.items()
        }

    def random_state(self, rank: int) -> Tensor | None:
        """The state of torch's CPU generator on one rank: uint8, or None for a rank that was not there."""
        return self._open(rank).get_tensor("random_state") if rank < self.world else None

    def device_random_state(self, rank: int) -> Tensor | None:
        """The state of one rank's CUDA generator: uint8, or None for a rank that was not there or had no GPU."""
        if rank >= self.world or "device_random_state" not in self._open(rank).keys():  # noqa: SIM118 - no dict
            return None
        return self._open(rank).get_tensor("device_random_state")

    def _slice(self, rank: int, name: str, start: int, stop: int) -> Tensor:
        try:
            return self._open(rank).get_slice(name)[start:stop]
        except SafetensorError as error:
            raise UserError(f"{self.path / rank_file(rank)}: damaged ({error}): take another checkpoint") from error

    def _open(self, rank: int) -> Any:
        name = rank_file(rank)
        if name not in self._handles:
            self._handles[name] = safe_open(self.path / name, framework="pt")
        return self._handles[name]


def rank_file(rank: int) -> str:
    """Name of one rank's file."""
    return f"rank-{rank:05d}.safetensors"


def require_covered(name: str, shape: Sequence[int], slices: Sequence[Sequence[int]], world: int) -> None:
    """Refuse, as a ValueError, a tensor whose slices [rank, start, stop] do not cover each element once, in order."""
    covered = 0
    for rank, start, stop in slices:
        if start != covered:
            raise ValueError(f"{name}: the ranks' slices overlap or leave a gap at element {covered}")
        if not (type(stop) is int and start < stop and rank in range(world)):
            raise ValueError(f"{name}: no slice: rank {rank}, elements {start} to {stop}")
        covered = stop
    if covered != math.prod(shape):
        raise ValueError(f"{name}: the ranks' slices end at element {covered}")


def newest_valid(
    candidates: list[Path],
    any_rank: AnyRank,
    warn: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
    tick: Callable[[int], object] = lambda read: None,
) -> Checkpoint | None:
    """The newest checkpoint whose bytes are as they were written; the ranks share the reading.

    A damaged one is named through `warn`, and the next older one is tried.

    Args:
        candidates: oldest first, the same on every rank (each of them is a collective).
        tick: told the bytes as they are read.

    Raises:
        UserError: there are checkpoints, but none is whole (starting over unasked would hide the loss).
    """
    faults: list[str] = []
    for path in reversed(candidates):
        fault = ""
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify(rank, world, tick)
        except (UserError, OSError) as error:
            fault = str(error)
        if not any_rank(bool(fault)):
            for text in faults:
                warn(text)
            return checkpoint
        faults.append(fault or f"{path}: found damaged by another rank")
    if faults:
        folder = candidates[0].parent
        raise UserError(f"{folder}: no checkpoint in it is whole; {faults[0]}; to start over use --fresh --force")
    return None
