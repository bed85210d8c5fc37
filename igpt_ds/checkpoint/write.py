"""Checkpoints are written beside the training, and published whole or not at all.

    begin      every rank copies its state (training waits for this alone) and a thread writes and hashes the copy
    conclude   some steps later, once all ranks' threads are done: rank 0 adds checkpoint.json, renames the directory,
               and only then names it in `latest`

Where memory does not allow a second copy of a rank's state, that rank writes before it trains on. Nothing in here
knows DeepSpeed; what must happen on all ranks comes in as `any_rank`.
"""

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from igpt_ds.atomic import publish_directory, publish_text, sha256_file, writing
from igpt_ds.checkpoint.names import (
    FORMAT,
    VERSION,
    clear_unfinished,
    content_sha256,
    list_checkpoints,
    set_aside,
    step_directory,
)
from igpt_ds.checkpoint.read import AnyRank, Shard, rank_file, require_covered
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from igpt_ds.memory import available_bytes

LOGGER = logging.getLogger("igpt_ds")
Slices = dict[str, list[Any]]


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same steps.

    Args:
        folder: RUN/checkpoints.
        neighbours: ranks on this machine, which share its memory.
        any_rank: tells all ranks whether one of them has a fault; also the barrier.
        lock: that of the run, on rank 0; who has lost it publishes and deletes nothing.

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
    ):
        self.rank, self._folder, self._world, self._neighbours = rank, folder, world, neighbours
        self._any_rank, self._lock = any_rank, lock
        self._thread: threading.Thread | None = None
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
        final = step_directory(self._folder, step)
        temporary = self._temporary(step)
        self._agree(step, _attempt(lambda: self._clear(temporary)) if self.rank == 0 else None)
        self.pending, self._facts, self._fault = step, dict(facts), None
        # Gathering the shards may be a collective, so it happens even where writing would fail.
        held = list(shards)
        slices: Slices = {s.name: [list(s.shape), s.start, s.stop] for s in held}
        tensors = {f"{s.name}:{kind}": v for s in held for kind, v in s.values.items()}
        size = sum(v.numel() * v.element_size() for v in tensors.values())
        random_states = {"random_state": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_states["device_random_state"] = torch.cuda.get_rng_state()

        def write(copies: dict[str, Tensor]) -> None:
            path = temporary / rank_file(self.rank)
            self._fault = _attempt(lambda: _write(path, {**copies, **random_states}, slices))

        # As much again stays free: the page cache of the file, and whatever else runs here.
        if 2 * size * self._neighbours <= available_bytes():
            copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
            self._thread = threading.Thread(target=write, args=(copies,), name=f"write {final.name}", daemon=True)
            self._thread.start()
        else:
            write({name: value.detach().cpu().contiguous() for name, value in tensors.items()})

    def conclude(self) -> Path:
        """Wait until all ranks have written, and publish.

        Raises:
            UserError: a rank could not write; nothing is published then, and older checkpoints are as they were.
            RunError: the run has another owner.
        """
        assert self.pending is not None
        if self._thread is not None:
            self._thread.join()
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


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (OSError, RunError, UserError) as error:
        return error
    return None


def _write(path: Path, tensors: dict[str, Tensor], slices: Slices) -> None:
    with writing(path):
        try:
            save_file(tensors, path)
        except Exception as error:  # safetensors tells a full disk through an error class of its own
            raise OSError(*_os_error(error), str(path)) from error
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        sidecar = {"bytes": path.stat().st_size, "sha256": sha256_file(path), "slices": slices}
        publish_text(path.with_suffix(".json"), json.dumps(sidecar))


def _os_error(error: Exception) -> tuple[int, str]:
    """The operating system's error number inside safetensors' text ("... (os error 28)"), or EIO."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return number, os.strerror(number)


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
        sidecar = json.loads(sidecar_path.read_text())
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
    if final in list_checkpoints(final.parent):  # saved twice at the same step: the new one stands
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
