"""What a person puts beside a run's checkpoints is neither chosen nor renamed nor pruned nor listed."""

import json
import shutil
import time
from pathlib import Path

import pytest

from igpt_ds.checkpoint import write
from igpt_ds.checkpoint.names import (
    clear,
    content_sha256,
    list_checkpoints,
    own,
    prune,
    set_aside_newer,
    step_directory,
)
from igpt_ds.checkpoint.read import Checkpoint, newest_valid
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from tests.helpers.checkpoints import FACTS, one_rank, save, save_all, shards_of


def listed(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.fixture
def theirs(tmp_path: Path) -> list[str]:
    """Checkpoints of the steps 4, 8 and 12, and beside them what a person may put there: its names."""
    for step in (4, 8, 12):
        save_all(tmp_path, step)
    newest, names = step_directory(tmp_path, 12), []
    for name in (
        *("step-00000012-before-lr-change", "step-00000012.bak", "copy-of-step-00000012", "step-00000012 (1)"),
        *("step-12", "step-000000012", "step-0000001٢", "step-00000099", "damaged-step-00000012", "best"),
        *("damaged-step-00000012-copy", "abandoned-step-12-5", ".step-00000012.old.mine"),
    ):
        shutil.copytree(newest, tmp_path / name)
        names.append(name)
    (tmp_path / "step-00000020").symlink_to(newest)
    (tmp_path / "step-00000021").write_text("notes")
    return [*names, "step-00000020", "step-00000021"]


def test_only_what_the_run_has_written_is_its_own(tmp_path: Path, theirs: list[str]) -> None:
    assert listed(tmp_path) == ["step-00000004", "step-00000008", "step-00000012"]
    assert [(step, path.name) for step, path, _ in own(tmp_path)] == [
        (step, step_directory(tmp_path, step).name) for step in (4, 8, 12)
    ]
    found = newest_valid(list_checkpoints(tmp_path), one_rank, pytest.fail)
    assert found is not None and found.path.name == "step-00000012"


def test_the_run_goes_on_beside_it(tmp_path: Path, theirs: list[str]) -> None:
    set_aside_newer(tmp_path, 8)
    save_all(tmp_path, 16)
    prune(tmp_path, 1)
    assert listed(tmp_path) == ["step-00000016"]
    assert len(list(tmp_path.glob("damaged-step-00000012-[0-9]*"))) == 1
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


@pytest.mark.parametrize("step", [20, 21, 99])
def test_what_has_the_name_of_the_next_one_is_moved_out_of_its_way(
    tmp_path: Path, theirs: list[str], step: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write.LOGGER, "propagate", True)
    save_all(tmp_path, step)
    assert f"step-{step:08d}: no checkpoint of this run, but a save needs the name: renamed foreign-" in caplog.text
    save_all(tmp_path, 100)
    assert listed(tmp_path)[-2:] == [f"step-{step:08d}", "step-00000100"]
    (moved,) = tmp_path.glob(f"foreign-step-{step:08d}-*")
    assert moved.is_symlink() if step == 20 else moved.read_text() == "notes" if step == 21 else moved.is_dir()


def test_steps_are_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        save_all(tmp_path, step)
    assert listed(tmp_path) == ["step-99999999", "step-100000000", "step-1000000000"]
    set_aside_newer(tmp_path, 100_000_000)
    assert listed(tmp_path) == ["step-99999999", "step-100000000"]
    prune(tmp_path, 1)
    assert listed(tmp_path) == ["step-100000000"]


def test_one_whose_step_is_damaged_is_still_the_runs_own(tmp_path: Path) -> None:
    save_all(tmp_path, 4)
    mark = save_all(tmp_path, 8) / "checkpoint.json"
    mark.write_text(mark.read_text().replace('"step": 8', '"step": 9'))
    warnings: list[str] = []
    found = newest_valid(list_checkpoints(tmp_path), one_rank, warnings.append)
    assert found is not None and found.step == 4
    assert "step-00000008: not a whole checkpoint" in warnings[0]


def test_names_that_are_there_already_are_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    for _ in range(3):
        save_all(tmp_path, 8)
        set_aside_newer(tmp_path, 4)
    names = [path.name for _, path, _ in own(tmp_path)]
    assert names == [f"damaged-step-00000008-{number}" for number in (5, 6, 7)]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "8"},
        {"world": 2},
        {"files": {}},
        {"files": []},
        {"files": {"rank-00000.safetensors": 5}},
        {"files": {"rank-00000.safetensors": {"bytes": 1000}}},
        {"files": {"../../config.toml": {"bytes": 1, "sha256": ""}}},
        {"identity": 3},
        {"tensors": {"x": {"shape": [3], "slices": [[0, 0, 2]]}}},
        {"tensors": {"x": {"shape": [3], "slices": [[9, 0, 3]]}}},
        {"tensors": {"x": {"shape": 3, "slices": 4}}},
        {"progress": None},
    ],
    ids=str,
)
def test_facts_that_no_run_writes_are_not_believed(tmp_path: Path, change: dict[str, object]) -> None:
    path = save_all(tmp_path, 8)
    content = {**json.loads((path / "checkpoint.json").read_text()), **change}
    del content["sha256"]
    (path / "checkpoint.json").write_text(json.dumps({"sha256": content_sha256(content), **content}))
    with pytest.raises(UserError, match="not a whole checkpoint"):
        Checkpoint.open(path)


def test_who_lost_the_run_publishes_and_deletes_nothing(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path)
    save(tmp_path, 4, shards_of(0, 1), FACTS, 0, 1, one_rank, lock)
    (tmp_path / ".step-00000008.tmp").mkdir()  # the new owner's
    lock.path.unlink()
    with pytest.raises(RunError, match="owns it no longer"):
        save(tmp_path, 8, shards_of(0, 1), FACTS, 0, 1, one_rank, lock)
    assert listed(tmp_path) == ["step-00000004"]
    assert (tmp_path / ".step-00000008.tmp").exists()
    lock.release()
