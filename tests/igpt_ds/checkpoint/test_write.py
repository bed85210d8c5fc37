"""A checkpoint is published whole or not at all, and older ones stay as they are."""

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from igpt_ds import atomic
from igpt_ds.checkpoint import names, safetensors_stream, staging
from igpt_ds.checkpoint import write as saver
from igpt_ds.checkpoint.names import list_checkpoints, prune, set_aside_newer, step_directory
from igpt_ds.checkpoint.read import KINDS, Checkpoint, Shard, newest_valid, rank_file
from igpt_ds.checkpoint.safetensors_stream import Streamed
from igpt_ds.checkpoint.write import Saver
from igpt_ds.errors import UserError
from tests.helpers.checkpoints import FACTS, on_ranks, one_rank, originals, save, save_all, shards_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(folder: Path) -> list[str]:
    """What lies in a folder beside the pointer."""
    return sorted(p.name for p in folder.iterdir() if p.name != "latest")


@pytest.mark.parametrize(("start", "stop"), [(0, 39), (1, 40), (0, 10)], ids=["end", "beginning", "most"])
def test_a_gap_is_not_published(tmp_path: Path, start: int, stop: int) -> None:
    shard = Shard("x", (8, 5), start, stop, lambda kind: torch.zeros(stop - start))
    with pytest.raises(ValueError, match="x: the ranks' slices"):
        save(tmp_path, 1, [shard], FACTS, 0, 1, one_rank)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("cuts", [((0, 20), (19, 40)), ((0, 20), (21, 40)), ((0, 40), (0, 40))], ids=str)
def test_slices_of_two_ranks_must_meet(tmp_path: Path, cuts: tuple[tuple[int, int], ...]) -> None:
    temporary = tmp_path / ".step-00000001.tmp"
    temporary.mkdir()
    for rank, (start, stop) in enumerate(cuts):
        weight = Streamed("x:weight", (stop - start,), lambda count=stop - start: iter([torch.zeros(count)]))
        saver.write_part(temporary / rank_file(rank), [weight], {"x": [[8, 5], start, stop]}, lambda elements: None)
    with pytest.raises(ValueError, match="overlap or leave a gap"):
        saver.publish_checkpoint(temporary, step_directory(tmp_path, 1), 1, 2, FACTS)
    assert list_checkpoints(tmp_path) == []


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in (900, 20, 100, 3):
        save_all(tmp_path, step)
    prune(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 4
    prune(tmp_path, 2)
    assert visible(tmp_path) == ["step-00000100", "step-00000900"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_the_midst(file: Any, data: Any, digest: Any) -> None:
    file.write(data[: len(data) // 2])
    full_disk()


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [
        (safetensors_stream, "_put", full_disk_in_the_midst),
        (atomic.os, "replace", full_disk),
        (atomic.os, "rename", full_disk),
        (atomic.os, "fsync", full_disk),
    ],
    ids=["write", "replace", "rename", "fsync"],
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, failure: Callable[..., None], world: int
) -> None:
    save_all(tmp_path, 5, world)
    before = contents(step_directory(tmp_path, 5))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        errors = on_ranks(world, lambda r, any_rank: save(tmp_path, 9, shards_of(r, world), FACTS, r, world, any_rank))
    for error in errors:
        assert isinstance(error, UserError)
    assert "the disk is full" in str(errors[0])
    assert visible(tmp_path) == ["step-00000005"], "nothing half-written stays on the full disk"
    assert contents(step_directory(tmp_path, 5)) == before
    # With space again the next one is published and clears what was left.
    save_all(tmp_path, 10, world)
    assert visible(tmp_path) == ["step-00000005", "step-00000010"]


def test_a_rank_that_cannot_write_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = safetensors_stream._put

    def fail_on_one(file: Any, data: Any, digest: Any) -> None:
        if str(file.name).endswith("rank-00001.safetensors"):
            full_disk()
        real(file, data, digest)

    monkeypatch.setattr(safetensors_stream, "_put", fail_on_one)
    errors = on_ranks(3, lambda r, any_rank: save(tmp_path, 9, shards_of(r, 3), FACTS, r, 3, any_rank))
    assert all(isinstance(error, UserError) for error in errors)
    assert "the disk is full" in str(errors[1])
    assert "another rank" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_at_a_step_stands(tmp_path: Path) -> None:
    save_all(tmp_path, 5, world=2, seed=1)
    path = save_all(tmp_path, 5, world=1, seed=2)
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]
    assert torch.equal(Checkpoint.open(path).weights()["start"], originals(2)["start"]["weight"])


@pytest.mark.parametrize("name", ["rename", "replace"])
def test_a_second_save_that_fails_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = save_all(tmp_path, 5, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full_disk)
        with pytest.raises(UserError, match="the disk is full"):
            save(tmp_path, 5, shards_of(0, 1, seed=2), FACTS, 0, 1, one_rank)
    assert torch.equal(Checkpoint.open(path).weights()["start"], originals(1)["start"]["weight"])


def test_what_killed_runs_left_is_cleared(tmp_path: Path) -> None:
    for name in (".step-00000009.tmp", ".step-00000011.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    assert newest_valid(list_checkpoints(tmp_path), one_rank, pytest.fail) is None
    save_all(tmp_path, 11)
    assert visible(tmp_path) == ["step-00000011"]


def test_damaged_ones_are_set_aside_so_that_prune_keeps_whole_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_all(tmp_path, step)
    damaged = contents(step_directory(tmp_path, 30))
    set_aside_newer(tmp_path, 20)
    save_all(tmp_path, 25)
    prune(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000025"]
    (aside,) = tmp_path.glob("damaged-step-00000030-*")
    assert contents(aside) == damaged


WAYS = pytest.mark.parametrize("room", [0, 1 << 40], ids=["a piece at a time", "from a copy"])


@WAYS
def test_the_bytes_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    for module in (saver, staging):
        monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(saver, "available_bytes", lambda: room)
    path = save_all(tmp_path, 5, world=2)
    for rank in range(2):
        tensors = {f"{s.name}:{kind}": s.values(kind) for s in shards_of(rank, 2) for kind in KINDS}
        state = Checkpoint.open(path).random_state(rank)
        assert state is not None
        save_file({**tensors, "random_state": state}, tmp_path / "theirs")
        assert (path / rank_file(rank)).read_bytes() == (tmp_path / "theirs").read_bytes()


@WAYS
def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """What gives them may have to make them: a network's states, all at once, fit no second time into its memory."""
    monkeypatch.setattr(saver, "available_bytes", lambda: room)
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def values(kind: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((1000,), float(len(made)))
        made.append(weakref.ref(tensor.untyped_storage()))
        most = max(most, sum(each() is not None for each in made))
        return tensor

    shards = [Shard(f"x{number}", (10, 100), 0, 1000, values) for number in range(9)]
    path = save(tmp_path, 1, shards, FACTS, 0, 1, one_rank)
    assert len(made) == 27
    assert most <= 2, "the one that is written, and the next"
    assert sorted(float(Checkpoint.open(path).read(s.name, k, 7, 8)) for s in shards for k in KINDS) == list(range(27))


@WAYS
def test_a_save_that_moves_is_told_and_one_that_does_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """With the same beats on a rank that has written before it trains on as on one that has a thread for it."""
    monkeypatch.setattr(saver, "available_bytes", lambda: room)
    monkeypatch.setattr(saver, "_LOOK_EVERY", 0.01)
    stuck, real, slow = threading.Event(), safetensors_stream._put, threading.Event()

    def put(file: Any, data: Any, digest: Any) -> None:
        time.sleep(0.05)
        if slow.is_set() and not stuck.is_set():
            stuck.set()
            time.sleep(0.5)
        real(file, data, digest)

    monkeypatch.setattr(safetensors_stream, "_put", put)
    beats, moves = list[tuple[str, int]](), list[bool]()
    told = Saver(
        tmp_path, 0, 1, one_rank, beat=lambda *what: beats.append(what), moves=lambda: moves.append(stuck.is_set())
    )
    told.begin(3, shards_of(0, 1), FACTS)
    begun = len(moves)
    slow.set()
    told.conclude()
    assert beats == [("saving", 3), ("saving", 3), ("waiting for the other ranks to save", 3)]
    assert len(moves) >= 12
    if room:
        at = moves.index(True) if True in moves else len(moves)
        assert stuck.is_set() and len(moves) - at < 15, "none while it hung"
        assert len(moves) > begun, "the thread's writing is told as well"


def test_what_is_written_is_made_durable_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the last sync would take as long as the disk is slow, and show no progress meanwhile."""
    monkeypatch.setattr(safetensors_stream, "_SYNC", 100)
    sizes: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    save_all(tmp_path, 5)
    assert sizes == sorted(set(sizes)) and len(sizes) > 5


def test_each_checkpoint_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hundreds of ranks reading checkpoint.json takes a third of a second, and a save asks for all of them."""
    for step in (10, 20, 30):
        save_all(tmp_path, step)
    names._step_in.cache_clear()
    read: list[Path] = []
    real = names.read_content
    monkeypatch.setattr(names, "read_content", lambda path: (read.append(path), real(path))[1])
    first = next(names.newest_first(tmp_path))
    assert first.name == "step-00000030" and read == [first]
    assert len(list_checkpoints(tmp_path)) == len(list_checkpoints(tmp_path)) == 3
    assert sorted(read) == list_checkpoints(tmp_path)
    # One that is written anew is looked at anew.
    save_all(tmp_path, 20, seed=2)
    (tmp_path / "step-00000030").rename(tmp_path / "step-00000040")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000020"]
