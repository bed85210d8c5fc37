"""`igpt-ds checkpoints`: what it tells of whole, damaged, set-aside and unfinished checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.checkpoint import survey as surveys
from igpt_ds.checkpoint.names import set_aside_newer, step_directory
from igpt_ds.checkpoint.read import rank_file
from tests.helpers.checkpoints import FACTS, on_ranks, save, shards_of
from tests.helpers.commands import call

STAGE_2 = {"ds_config": {"zero_optimization": {"stage": 2}}, "code_version": "1.2.3"}


def save_step(folder: Path, step: int, world: int = 1, **checkpoint: Any) -> Path:
    """A checkpoint whose configuration has a section `checkpoint`."""
    facts = {**FACTS, **STAGE_2, "config": {"checkpoint": checkpoint}}
    on_ranks(world, lambda r, any_rank: save(folder, step, shards_of(r, world), facts, r, world, any_rank))
    return step_directory(folder, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 10 and 20 from two ranks and 30 from one."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "config.toml").touch()
    for step, world in ((10, 2), (20, 2), (30, 1)):
        save_step(folder, step, world, keep=2, milestones=[10, 40])
    return folder.parent


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def by_step(run: Path, verify: bool = True) -> dict[int, surveys.Row]:
    return {row.step: row for row in surveys.survey(run / "checkpoints", verify)}


def test_whole_ones_and_what_they_tell(run: Path) -> None:
    rows = by_step(run)
    assert list(rows) == [10, 20, 30]
    assert [row.world for row in rows.values()] == [2, 2, 1]
    assert {(row.zero_stage, row.code_version, row.state, row.fault) for row in rows.values()} == {
        (2, "1.2.3", "published", None)
    }
    assert [row.kept for row in rows.values()] == ["milestone", "newest", "newest"]
    for row in rows.values():
        files = list((run / "checkpoints" / row.name).iterdir())
        assert row.bytes == sum(file.stat().st_size for file in files)
        assert row.written == (run / "checkpoints" / row.name / "checkpoint.json").stat().st_mtime
        assert row.verified


def test_what_nothing_keeps_is_said(run: Path) -> None:
    save_step(run / "checkpoints", 40, keep=1, milestones=[])
    assert [row.kept for row in by_step(run).values()] == [None, None, None, "newest"]


def test_all_that_is_wrong_is_named(run: Path) -> None:
    ten, twenty, thirty = (step_directory(run / "checkpoints", step) for step in (10, 20, 30))
    flip(ten / rank_file(0))
    flip(ten / rank_file(1))
    (twenty / rank_file(1)).unlink()
    (thirty / "checkpoint.json").write_text("{")
    rows = by_step(run)
    assert rows[10].fault and rows[10].fault.startswith(f"{rank_file(0)}: damaged")
    assert f"; {rank_file(1)}: damaged" in rows[10].fault
    assert rows[20].fault and rows[20].fault.startswith(f"{rank_file(1)}: missing or cut short")
    assert rows[30].fault and rows[30].fault.startswith("not a whole checkpoint")
    assert (rows[30].world, rows[30].zero_stage) == (None, None)
    # Sizes alone do not tell a flipped bit.
    rows = by_step(run, verify=False)
    assert rows[10].fault is None and not rows[10].verified
    assert rows[20].fault is not None


def test_every_byte_is_counted_for_the_bar(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[int] = []

    class Bar(surveys.tqdm):
        def update(self, n: int = 1) -> None:
            ticks.append(n)

    monkeypatch.setattr(surveys, "tqdm", Bar)
    surveys.survey(run / "checkpoints", True)
    files = list((run / "checkpoints").glob("step-*/*.safetensors"))
    assert sorted(ticks) == sorted(file.stat().st_size for file in files)


def test_those_set_aside_and_unfinished_are_listed(run: Path) -> None:
    folder = run / "checkpoints"
    flip(step_directory(folder, 30) / rank_file(0))
    set_aside_newer(folder, 20)
    step_directory(folder, 20).rename(folder / "abandoned-step-00000020-17")
    (folder / ".step-00000040.tmp").mkdir()
    (folder / ".step-00000040.tmp" / rank_file(0)).write_bytes(b"1234")
    (folder / ".step-00000005.old").mkdir()
    (folder / "something-else").mkdir()
    rows = surveys.survey(folder, True)
    assert [(row.step, row.state) for row in rows] == [
        (5, "half deleted"),
        (10, "published"),
        (20, "abandoned by a rollback"),
        (30, "set aside as damaged"),
        (40, "unfinished"),
    ]
    assert [row.fault is None for row in rows] == [False, True, True, False, False]
    assert rows[4].bytes == 4
    assert rows[1].kept == "milestone"
    text = surveys.table(rows).text()
    assert "abandoned by a rollback: abandoned-step-00000020-17: valid" in text
    assert "set aside as damaged: damaged-step-00000030-" in text


def test_one_that_vanishes_meanwhile_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    look = surveys._fault

    def pruned(path: Path, *rest: Any) -> str | None:
        if path.name == "step-00000010":
            shutil.rmtree(path)
        return look(path, *rest)

    monkeypatch.setattr(surveys, "_fault", pruned)
    assert list(by_step(run)) == [20, 30]


def test_the_table_is_aligned(run: Path) -> None:
    flip(step_directory(run / "checkpoints", 20) / rank_file(0))
    lines = surveys.table(surveys.survey(run / "checkpoints", True)).text().splitlines()
    column = lines[0].index("state")
    assert [line[column:].split(":")[0] for line in lines[1:]] == ["valid", rank_file(0), "valid"]
    assert all(line[column - 2 : column] == "  " for line in lines)
    assert lines[0].split() == ["step", "written", "size", "ranks", "zero", "version", "kept", "state"]
    unverified = surveys.table(surveys.survey(run / "checkpoints", False)).text()
    assert "sizes right" in unverified and " valid" not in unverified
    assert unverified.splitlines()[-1].startswith("not verified")


def test_the_exit_status(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "checkpoints", run) == 0
    printed = capsys.readouterr()
    assert printed.out.count("valid") == 3 and printed.err == ""  # no bar where there is no terminal
    assert call(monkeypatch, "checkpoints", run, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in content] == [10, 20, 30]
    assert set(content[0]) == {
        *("name", "step", "state", "written", "bytes", "world", "zero_stage", "code_version", "kept", "fault"),
        "verified",
    }

    flip(step_directory(run / "checkpoints", 20) / rank_file(0))
    assert call(monkeypatch, "checkpoints", run, "--no-verify") == 0
    assert call(monkeypatch, "checkpoints", run) == 1
    assert "damaged: step-00000020" in capsys.readouterr().err

    # Set aside, they are no danger while there is a valid one; alone, they are.
    set_aside_newer(run / "checkpoints", 10)
    assert call(monkeypatch, "checkpoints", run) == 0
    set_aside_newer(run / "checkpoints", 0)
    assert call(monkeypatch, "checkpoints", run) == 1
    assert "only damaged ones are left" in capsys.readouterr().err

    assert call(monkeypatch, "checkpoints", run.parent) == 2
    assert call(monkeypatch, "checkpoints", run.parent / "nowhere") == 2
    assert "no run directory" in capsys.readouterr().err
