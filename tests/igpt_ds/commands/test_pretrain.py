"""`pretrain` as it is called: alone and through the deepspeed launcher, killed, stopped, resumed, begun anew."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.file import load_config
from igpt_ds.dataset.palette import Palette
from igpt_ds.run.metrics import read_metrics
from tests.helpers.commands import call, descendants, finish, kill_all, pretrain, run_command, started, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

# Enough steps that there is time to strike in between.
STEPS = 60
LENGTH = ["--set", f"training.steps={STEPS}", "--set", "training.validate_every=20", "--set", "checkpoint.every=4"]
LENGTH += ["--ds", "zero3"]  # which does the most


def training_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def curve(run: Path) -> dict[int, tuple[float, float, float]]:
    """Step -> loss, rate and gradient norm; each step is there once."""
    lines = training_lines(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: (line["loss"], line["lr"], line["grad_norm"]) for line in lines}


def reached(run: Path) -> int:
    """The last step that is recorded."""
    return max((line["step"] for line in training_lines(run)), default=0)


def steps_saved(run: Path) -> list[int]:
    return [Checkpoint.open(path).step for path in list_checkpoints(run / "checkpoints")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def on_two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an unbroken run on 2 ranks."""
    folder = tmp_path_factory.mktemp("on_two")
    run_command(pretrain(digits, folder / "run", *LENGTH), folder / "output.txt", world=2)
    return folder / "run"


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an unbroken run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_command(pretrain(digits, folder / "run", *LENGTH), folder / "output.txt")
    return folder / "run"


def test_run_directory_is_complete(on_two: Path, digits: Path) -> None:
    names = {"config.toml", "ds.json", "palette.npy", "metrics.jsonl", "events", "checkpoints", "heartbeats"}
    assert {path.name for path in on_two.iterdir()} == names | {"log.rank00000.txt", "log.rank00001.txt"}
    config = load_config(on_two / "config.toml")
    assert (config.training.steps, config.seed) == (STEPS, 1)
    assert (config.data.resolution, config.data.palette_size, config.data.sources) == (8, 16, (str(digits),))
    ds = json.loads((on_two / "ds.json").read_text())
    assert ds["zero_optimization"]["stage"] == 3
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"]) == (16, 8)
    assert Palette.load(on_two / "palette.npy").sha256 == Palette.load(digits / "train" / "palette.npy").sha256
    assert any((on_two / "events").iterdir())
    assert steps_saved(on_two) == [52, 56, 60]  # the newest 3


def test_metrics_say_what_they_should(on_two: Path) -> None:
    lines = training_lines(on_two)
    assert curve(on_two).keys() == set(range(1, STEPS + 1))
    keys = "step loss bits lr grad_norm tokens_per_s images_per_s tflops mfu data_wait memory_gib eta_s"
    for line in lines:
        assert list(line) == keys.split()
        assert line["bits"] == pytest.approx(line["loss"] / math.log(2))
        assert line["tokens_per_s"] == pytest.approx(64 * line["images_per_s"])
        assert line["mfu"] is None  # a CPU's peak is not known
        assert line["tflops"] > 0 and line["memory_gib"] > 0 and 0 <= line["data_wait"] <= 1
    # The head is zero at first: all 16 colours are equally likely.
    assert lines[0]["loss"] == pytest.approx(math.log(16), abs=1e-6)
    assert lines[-1]["loss"] < 2.0
    assert lines[-1]["eta_s"] == 0
    validations = [line for line in read_metrics(on_two / "metrics.jsonl") if "val_loss" in line]
    assert [line["step"] for line in validations] == [20, 40, 60]
    assert all(line["val_images"] == 67 for line in validations)
    losses = [line["val_loss"] for line in validations]
    assert losses == sorted(losses, reverse=True)


def test_killed_and_started_again_gives_the_same_losses(on_two: Path, digits: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    with started(pretrain(digits, run, *LENGTH), output, world=2) as process:
        wait_until(lambda: reached(run) >= 6 and steps_saved(run) != [], process, output)
        family = descendants(process.pid)
        assert len(family) >= 3, "launcher and two ranks"
        kill_all(process)
    before = reached(run)
    saved = steps_saved(run)[-1]
    assert 6 <= before < STEPS, "killed too late"
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and str(run) in _command(pid) for pid in family)
    text = run_command(pretrain(digits, run, *LENGTH), output, world=2)
    assert f"resumed from {run}/checkpoints/step-{saved:08d} at step {saved}" in text
    assert curve(run) == curve(on_two)
    validations = [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]
    assert validations == [line for line in read_metrics(on_two / "metrics.jsonl") if "val_loss" in line]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_ranks_that_share_every_image_train_and_validate_as_one_alone(
    alone: Path, digits: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    sharing = ["--set", "training.sequence_parallel=2", "--set", "training.stop_at=20"]
    text = run_command(pretrain(digits, run, *LENGTH, *sharing), output, world=2)
    assert "16 = 1 replicas of 2 ranks x 16 x 1 accumulated" in text
    whole, found = curve(alone), curve(run)
    assert len(found) == 20
    for step, values in found.items():
        assert values == pytest.approx(whole[step], rel=1e-5), step

    def validation(run: Path) -> dict[str, Any]:
        return next(line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line)

    assert validation(run)["val_images"] == validation(alone)["val_images"]
    assert validation(run)["val_loss"] == pytest.approx(validation(alone)["val_loss"], rel=1e-5)


def test_stop_at_and_going_on_and_being_done_and_fresh(
    alone: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    whole = curve(alone)
    run_command(pretrain(digits, run, *LENGTH, "--set", "training.stop_at=11"), output)
    assert steps_saved(run)[-1] == 11
    assert curve(run) == {step: line for step, line in whole.items() if step <= 11}

    run_command(["pretrain", str(run)], output)  # as it was configured; stop_at was for that time only
    assert steps_saved(run)[-1] == STEPS
    assert curve(run) == whole

    lines, checkpoints = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoints")
    assert "nothing to do" in run_command(pretrain(digits, run, *LENGTH), output)
    assert (run / "metrics.jsonl").read_bytes() == lines
    assert contents(run / "checkpoints") == checkpoints

    before = contents(run)
    assert call(monkeypatch, *pretrain(digits, run, *LENGTH, "--fresh")) == 2
    assert capsys.readouterr().err == (
        f"igpt-ds: {run}: --fresh would overwrite it: add --force, or choose another RUN\n"
    )
    assert contents(run) == before

    run_command(pretrain(digits, run, *LENGTH, "--fresh", "--force", "--set", "training.stop_at=2"), output)
    assert steps_saved(run) == [2]
    assert curve(run) == {step: whole[step] for step in (1, 2)}


def test_sigterm_finishes_the_step_saves_and_ends_well(alone: Path, digits: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    with started(pretrain(digits, run, *LENGTH), output) as process:
        wait_until(lambda: reached(run) >= 2, process, output)
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process, output) == 0, output.read_text()
    stopped = reached(run)
    assert 2 <= stopped < STEPS, "signalled too late"
    assert steps_saved(run)[-1] == stopped
    assert f"stopped by SIGTERM after step {stopped}" in output.read_text()
    run_command(pretrain(digits, run, *LENGTH), output)
    assert curve(run) == curve(alone)


def test_print_config_can_be_read_back(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = pretrain(digits, tmp_path / "run", "--set", "training.steps=7", "--set", "training.stop_at=3")
    assert call(monkeypatch, *arguments, "--print-config") == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "printed.toml")
    assert (config.name, config.seed, config.training.steps, config.training.stop_at) == ("tiny", 1, 7, 3)
    assert config.data.sources == (str(digits),)
    assert not (tmp_path / "run").exists()


def test_print_config_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from igpt_ds.cli import main\n"
        "sys.argv = ['igpt-ds', 'pretrain', 'unused', '--preset', 's', '--print-config']\n"
        "main(); print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stderr


def test_dry_run_tells_the_size_and_writes_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *pretrain(digits, tmp_path / "run"), "--dry-run") == 0
    out = capsys.readouterr().out
    width, layers = 32, 2
    parameters = 16 * width * 2 + width + 64 * width + layers * (12 * width**2 + 2 * width) + width
    assert f"{parameters:,} parameters" in out
    assert "16 = 1 ranks x 16 x 1" in out
    assert list(tmp_path.iterdir()) == []
