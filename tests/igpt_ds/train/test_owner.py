"""One owner of a run: a second start is refused, a dead owner's run goes on, and what has changed by then is told."""

import os
import signal
from pathlib import Path

import pytest

from igpt_ds import lock
from igpt_ds.checkpoint.names import list_checkpoints, step_of
from igpt_ds.run.metrics import read_metrics
from tests.helpers.commands import call, finish, pretrain, run_command, started, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

OFTEN = ["--set", "training.validate_every=0", "--set", "checkpoint.every=2"]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run / "metrics.jsonl")]


def test_two_at_once_then_a_dead_owner(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output, outcome = tmp_path / "run", tmp_path / "output.txt", tmp_path / "outcome"
    endless = pretrain(digits, run, *OFTEN, "--set", "training.steps=100000")
    monkeypatch.setenv("IGPT_OUTCOME", str(outcome))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with started(endless, output) as first:
        wait_until(lambda: len(steps(run)) > 3, first, output)
        for more in ([], ["--fresh", "--force"]):
            config, reached = (run / "config.toml").read_bytes(), steps(run)
            outcome.unlink(missing_ok=True)
            assert call(monkeypatch, *endless, *more, "--set", "training.learning_rate=0.1") == 2
            error = capsys.readouterr().err
            assert error.startswith(f"igpt-ds: {run}: in use by process {first.pid} on ") and error.count("\n") == 1
            assert outcome.read_text() == "refused\n", "a job script must not start it again and again"
            assert (run / "config.toml").read_bytes() == config
            assert steps(run)[: len(reached)] == reached
        wait_until(lambda: steps(run)[-1] > reached[-1] + 3, first, output)
        os.kill(first.pid, signal.SIGKILL)
        finish(first, output)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert steps(run) == list(range(1, len(steps(run)) + 1))
    assert (run / lock.NAME).exists()
    saved = step_of(list_checkpoints(run / "checkpoints")[-1])

    # Fewer steps than done: nothing is trained, so nothing is said of the run that is not true.
    config = (run / "config.toml").read_bytes()
    fewer = pretrain(digits, run, *OFTEN, "--set", "training.steps=1", "--set", "training.learning_rate=0.1")
    text = run_command(fewer, output)
    assert "nothing to do" in text and "changed since then" not in text
    assert (run / "config.toml").read_bytes() == config
    assert not (run / lock.NAME).exists(), "given free at the end"

    changes = ["--set", f"training.steps={saved + 1}", "--set", "training.learning_rate=0.1"]
    text = run_command([*pretrain(digits, run, *OFTEN, *changes), "--set", "training.beta2=0.5"], output)
    (told,) = [line for line in text.splitlines() if "changed since then: " in line]
    assert f"training.steps from 100000 to {saved + 1} (where the cosine of the learning rate ends)" in told
    assert "training.learning_rate from 0.003 to 0.1" in told
    assert "training.beta2 from 0.95 to 0.5" in told
    assert told.count(" from ") == 3
    assert steps(run) == list(range(1, saved + 2))
