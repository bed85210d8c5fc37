"""A run directory begun anew: what goes, what stays, and that nothing is lost where RUN is a link or a mount."""

import shutil
from pathlib import Path

import pytest

from igpt_ds.errors import UserError
from igpt_ds.run.directory import LOGGER, Run, log_to
from igpt_ds.weights.formats import open_weights


def test_a_log_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("handlers", []), ("level", LOGGER.level), ("propagate", LOGGER.propagate)):
        monkeypatch.setattr(LOGGER, name, value)  # as it was, afterwards
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "log.rank00003.txt").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="a symbolic link is in the way: remove it"):
        log_to(Run(tmp_path), 3)
    assert (tmp_path / "victim").read_text() == "mine"


def filled(path: Path) -> Run:
    """A run with what a training and evaluations leave, and with what a person has put there."""
    run = Run(path)
    run.create()
    for name in ("config.toml", "metrics.jsonl", "log.rank00000.txt", "probe-12.json", "probe-12.png", "report.html"):
        (path / name).write_text(name)
    for name in ("events", "samples", "checkpoints/step-00000012", "checkpoints/.step-00000014.tmp"):
        (path / name).mkdir()
        (path / name / "file").write_text("made anew")
    (path / "checkpoints" / "latest").write_text("step-00000012\n")
    (path / "checkpoints" / "step-00000012-before").mkdir()
    (path / "notes.txt").write_text("by hand")
    (path / "data").mkdir()
    (path / ".lock").write_text("held")
    return run


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def cleared(run: Run) -> None:
    run.require_fresh(force=True)
    assert run.clear(["probe"]) == ["data", "notes.txt"]
    run.create()
    assert names(run.path) == [".lock", "checkpoints", "data", "notes.txt"]
    assert names(run.checkpoints) == ["step-00000012-before"]


def test_a_run_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    run = filled(tmp_path / "run")
    with pytest.raises(UserError, match="--fresh would overwrite it: add --force"):
        run.require_fresh(force=False)
    cleared(run)
    Run(tmp_path / "nothing").clear()
    assert names(tmp_path) == ["run"]


def test_behind_a_link(tmp_path: Path) -> None:
    filled(tmp_path / "target")
    (tmp_path / "run").symlink_to("target")
    cleared(Run(tmp_path / "run"))
    assert (tmp_path / "run").is_symlink()


def test_checkpoints_behind_a_link_go_and_other_links_alone(tmp_path: Path) -> None:
    run = filled(tmp_path / "run")
    run.checkpoints.rename(tmp_path / "disk")
    run.checkpoints.symlink_to(tmp_path / "disk")
    shutil.rmtree(run.samples)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "picture.png").touch()
    run.samples.symlink_to(tmp_path / "shared")
    cleared(run)
    assert run.checkpoints.is_symlink()
    assert names(tmp_path / "shared") == ["picture.png"]


def test_the_directory_that_a_shell_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    cleared(Run(Path()))
    assert Path.cwd() == tmp_path / "run"


def test_a_mounted_disk(small_disk: Path) -> None:
    cleared(filled(small_disk))


def test_a_clearing_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = filled(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(path: Path, **options: bool) -> None:
            raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", killed)
        run.clear(["probe"])
    assert not (run.checkpoints / "step-00000012").exists(), "what is half deleted must not look like a checkpoint"
    cleared(run)


def test_a_link_to_nothing_is_made_something(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.symlink_to(tmp_path / "target")
    run.require_fresh(force=True)
    run.require_writable()
    run.create()
    assert (tmp_path / "target" / "checkpoints").is_dir()
    # What lies on a disk that is not mounted is not made on the one below.
    far = Run(tmp_path / "far")
    far.path.symlink_to(tmp_path / "unmounted" / "run")
    with pytest.raises(UserError, match="a part of the path does not exist"):
        far.create()


def test_what_cannot_be_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name in ("x" * 260, "loop", "x/" * 2100):
        with pytest.raises(UserError, match="cannot be a run directory"):
            Run(tmp_path / name)
        with pytest.raises(UserError, match="cannot be a run directory"):
            open_weights(tmp_path / name, verify=False)
    with pytest.raises(UserError, match="a part of the path is a file"):
        Run(tmp_path / "file").require_fresh(force=False)
