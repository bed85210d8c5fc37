"""A checkpoint is published whole or not at all, and older ones stay as they are."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from igpt_ds import atomic
from igpt_ds.checkpoint import write as saver
from igpt_ds.checkpoint.names import list_checkpoints, prune, set_aside_newer, step_directory
from igpt_ds.checkpoint.read import Checkpoint, Shard, newest_valid, rank_file
from igpt_ds.errors import UserError
from tests.helpers.checkpoints import FACTS, KINDS, on_ranks, one_rank, originals, save, save_all, shards_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(folder: Path) -> list[str]:
    """What lies in a folder beside the pointer."""
    return sorted(p.name for p in folder.iterdir() if p.name != "latest")


@pytest.mark.parametrize(("start", "stop"), [(0, 39), (1, 40), (0, 10)], ids=["end", "beginning", "most"])
def test_a_gap_is_not_published(tmp_path: Path, start: int, stop: int) -> None:
    shard = Shard("x", (8, 5), start, stop, {kind: torch.zeros(stop - start) for kind in KINDS})
    with pytest.raises(ValueError, match="x: the ranks' slices"):
        save(tmp_path, 1, [shard], FACTS, 0, 1, one_rank)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("cuts", [((0, 20), (19, 40)), ((0, 20), (21, 40)), ((0, 40), (0, 40))], ids=str)
def test_slices_of_two_ranks_must_meet(tmp_path: Path, cuts: tuple[tuple[int, int], ...]) -> None:
    temporary = tmp_path / ".step-00000001.tmp"
    temporary.mkdir()
    for rank, (start, stop) in enumerate(cuts):
        saver._write(temporary / rank_file(rank), {"x:weight": torch.zeros(stop - start)}, {"x": [[8, 5], start, stop]})
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


def full_disk_of_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [
        (saver, "save_file", full_disk_of_safetensors),
        (atomic.os, "replace", full_disk),
        (atomic.os, "rename", full_disk),
        (saver.os, "fsync", full_disk),
    ],
    ids=["save_file", "replace", "rename", "fsync"],
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
    real = saver.save_file

    def fail_on_one(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == "rank-00001.safetensors":
            full_disk_of_safetensors()
        real(tensors, path)

    monkeypatch.setattr(saver, "save_file", fail_on_one)
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
