"""Checkpoints are written beside the training, and published whole or not at all.

    begin      every rank copies its state (training waits for this alone) and a thread writes and hashes the copy
    conclude   some steps later, once all ranks' threads are done: rank 0 adds checkpoint.json, renames the directory,
               and only then names it in `latest`

Where memory does not allow a second copy of a rank's state, that rank writes before it trains on, a piece at a time.
Nothing in here knows DeepSpeed; what must happen on all ranks comes in as `any_rank`.
"""

import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from igpt_ds.atomic import publish_directory, publish_text, writing
from igpt_ds.checkpoint.names import (
    FORMAT,
    VERSION,
    clear_unfinished,
    content_sha256,
    newest_first,
    set_aside,
    step_directory,
)
from igpt_ds.checkpoint.read import KINDS, AnyRank, Shard, rank_file, require_covered
from igpt_ds.checkpoint.safetensors_stream import Streamed, write_safetensors
from igpt_ds.checkpoint.staging import PIECE, pieces
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from igpt_ds.memory import available_bytes
from igpt_ds.reading import read_json

LOGGER = logging.getLogger("igpt_ds")
Slices = dict[str, list[Any]]
_LOOK_EVERY = 1.0  # seconds


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same steps.

    Args:
        folder: RUN/checkpoints.
        neighbours: ranks on this machine, which share its memory.
        any_rank: tells all ranks whether one of them has a fault; also the barrier.
        lock: that of the run, on rank 0; who has lost it publishes and deletes nothing.
        beat: told what is done now, and at which step, on every rank alike.
        moves: told that this rank gets on with it.

    Attributes:
        pending: the step of the checkpoint that was begun and not concluded.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        any_rank: AnyRank,
        neighbours: int = 1,
        lock: Lock | None = None,
        beat: Callable[[str, int], object] = lambda doing, step: None,
        moves: Callable[[], object] = lambda: None,
    ):
        self.rank, self._folder, self._world, self._neighbours = rank, folder, world, neighbours
        self._any_rank, self._lock, self._beat, self._moves = any_rank, lock, beat, moves
        self._thread: threading.Thread | None = None
        self._written = 0  # elements
        self._fault: Exception | None = None
        self._facts: Mapping[str, Any] = {}
        self.pending: int | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, shards: Iterable[Shard], facts: Mapping[str, Any]) -> None:
        """Take a copy of this rank's state and begin to write it.

        Args:
            shards: this rank's; over all ranks they must cover every parameter once.
            facts: what checkpoint.json holds besides: "identity" and "config" at least.
        """
        assert self.pending is None, "the checkpoint before is not concluded"
        self._beat("saving", step)
        temporary = self._temporary(step)
        self._agree(step, _attempt(lambda: self._clear(temporary)) if self.rank == 0 else None)
        self.pending, self._facts, self._fault = step, dict(facts), None
        held = list(shards)
        slices: Slices = {s.name: [list(s.shape), s.start, s.stop] for s in held}
        # In the order in which the safetensors library would write them.
        parts = sorted(
            (f"{s.name}:{kind}", s.stop - s.start, functools.partial(s.values, kind)) for s in held for kind in KINDS
        )
        random_states = {"random_state": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_states["device_random_state"] = torch.cuda.get_rng_state()
        states = [
            Streamed(name, tuple(state.shape), lambda state=state: iter([state]), "uint8")  # type: ignore[misc]
            for name, state in sorted(random_states.items())
        ]
        path, total = temporary / rank_file(self.rank), sum(count for _, count, _ in parts)

        def write(tensors: Sequence[Streamed], tick: Callable[[int], object]) -> None:
            self._fault = _attempt(lambda: write_part(path, [*tensors, *states], slices, tick))

        # As much again stays free: the page cache of the file, and whatever else runs here.
        if 2 * 4 * total * self._neighbours <= available_bytes():
            copy, filled = torch.empty(total), 0
            for piece in pieces(give for _, _, give in parts):
                copy[filled : filled + len(piece)] = piece
                filled += len(piece)
                self._moves()
            copies = copy.split([count for _, count, _ in parts])
            tensors = [
                Streamed(name, (count,), lambda part=part: iter(part.split(PIECE)))  # type: ignore[misc]
                for (name, count, _), part in zip(parts, copies, strict=True)
            ]
            self._thread = threading.Thread(target=write, args=(tensors, self._count), name="save", daemon=True)
            self._thread.start()
        else:
            tensors = [
                Streamed(name, (count,), lambda give=give: pieces([give]))  # type: ignore[misc]
                for name, count, give in parts
            ]
            write(tensors, lambda elements: self._moves())

    def _count(self, elements: int) -> None:
        self._written += elements

    def conclude(self) -> Path:
        """Wait until all ranks have written, and publish.

        Raises:
            UserError: a rank could not write; nothing is published then, and older checkpoints are as they were.
            RunError: the run has another owner.
        """
        assert self.pending is not None
        self._beat("saving", self.pending)
        while self.busy:
            assert self._thread is not None
            before = self._written
            self._thread.join(_LOOK_EVERY)
            if self._written != before:
                self._moves()
        self._beat("waiting for the other ranks to save", self.pending)
        step, self.pending, self._thread = self.pending, None, None
        final = step_directory(self._folder, step)
        self._agree(step, self._fault)
        fault = None
        if self.rank == 0:
            fault = _attempt(
                lambda: publish_checkpoint(self._temporary(step), final, step, self._world, self._facts, self._lock)
            )
        self._agree(step, fault)
        return final

    def _clear(self, temporary: Path) -> None:
        if self._lock is not None:
            self._lock.require()
        with writing(self._folder):
            clear_unfinished(self._folder)
            temporary.mkdir(parents=True)

    def _temporary(self, step: int) -> Path:
        return self._folder / f".{step_directory(self._folder, step).name}.tmp"

    def _agree(self, step: int, fault: Exception | None) -> None:
        """Raise on every rank if one has a fault, so that none waits for the others."""
        if not self._any_rank(fault is not None):
            return
        if isinstance(fault, RunError):  # another owner's files may have these names
            raise fault
        if self.rank == 0:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        final = step_directory(self._folder, step)
        if isinstance(fault, UserError):
            raise fault
        if fault is not None:
            raise UserError(f"{final}: cannot be written ({fault}): look at the file system") from fault
        raise UserError(f"{final}: another rank could not write its part: see its message")


def _attempt(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except (OSError, RunError, UserError) as error:
        return error
    return None


def write_part(path: Path, tensors: Sequence[Streamed], slices: Slices, tick: Callable[[int], object]) -> str:
    """Write one rank's file and beside it what `publish_checkpoint` must know of it; return its sha256.

    Args:
        slices: parameter -> its shape, and first and last + 1 element here.
        tick: told the elements as they are written.
    """
    digest = write_safetensors(path, tensors, "float32", tick)
    sidecar = {"bytes": path.stat().st_size, "sha256": digest, "slices": slices}
    publish_text(path.with_suffix(".json"), json.dumps(sidecar))
    return digest


def publish_checkpoint(
    temporary: Path, final: Path, step: int, world: int, facts: Mapping[str, Any], lock: Lock | None = None
) -> None:
    """Add checkpoint.json to what all ranks have written into `temporary`, and give it its final name.

    Args:
        facts: what checkpoint.json holds besides: "identity" and "config" at least.
        lock: asked before anything gets its name.
    """
    tensors: dict[str, dict[str, Any]] = {}
    files = {}
    for rank in range(world):
        sidecar_path = (temporary / rank_file(rank)).with_suffix(".json")
        sidecar = read_json(sidecar_path)
        sidecar_path.unlink()
        files[rank_file(rank)] = {"bytes": sidecar["bytes"], "sha256": sidecar["sha256"]}
        for name, (shape, start, stop) in sidecar["slices"].items():
            entry = tensors.setdefault(name, {"shape": shape, "slices": []})
            if start < stop:
                entry["slices"].append([rank, start, stop])
    for name, entry in tensors.items():
        entry["slices"].sort(key=lambda s: s[1])
        require_covered(name, entry["shape"], entry["slices"], world)
    content = {**facts, "format": FORMAT, "version": VERSION, "step": step, "world": world}
    content |= {"files": files, "tensors": tensors}
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists then
    publish_text(temporary / "checkpoint.json", json.dumps({"sha256": content_sha256(content), **content}))
    if lock is not None:
        lock.require()
    replaced = final.with_name(f".{final.name}.old")
    if final in newest_first(final.parent):  # saved twice at the same step: the new one stands
        with writing(final):
            os.rename(final, replaced)
    elif os.path.lexists(final):
        away = set_aside(final, "foreign")
        LOGGER.warning(f"{final}: no checkpoint of this run, but a save needs the name: renamed {away.name}")
    publish_directory(temporary, final)
    # For people and other programs: we ourselves look for the newest one that is whole.
    latest = final.with_name("latest")
    if latest.is_symlink() or not latest.is_dir():  # a person's directory stays
        publish_text(latest, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
