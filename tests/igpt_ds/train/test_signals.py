"""Who asked a run to stop: the first signal decides, none kills before there is a run, and files that cannot go."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from igpt_ds.train import signals
from igpt_ds.train.signals import StopRequest, arrived, hear
from tests.helpers.commands import finish, pretrain, started

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers_of_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    monkeypatch.setattr(signals, "_arrivals", [])
    monkeypatch.setattr(signals, "_noticed", [])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def asked_by(*numbers: signal.Signals) -> StopRequest:
    stop = StopRequest()
    stop.listen()
    for number in numbers:
        os.kill(os.getpid(), number)
    return stop


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("later", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_decides(first: signal.Signals, later: signal.Signals) -> None:
    stop = asked_by(first, later)
    assert stop.reason == first.name
    assert stop.by_person == (first in (signal.SIGINT, signal.SIGHUP))


def test_a_person_who_insists_interrupts() -> None:
    for first in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            asked_by(first, signal.SIGINT)


def test_sigterm_under_deepspeed_may_be_a_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert asked_by(signal.SIGTERM).by_person
    assert not asked_by(signal.SIGUSR1).by_person
    assert not StopRequest().by_person


def test_nohup_goes_on_without_a_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert asked_by(signal.SIGHUP).reason is None


def test_a_notice_that_comes_early_is_remembered() -> None:
    hear()
    assert not arrived()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert arrived() and arrived()
    assert StopRequest().reason == "SIGUSR1"
    assert StopRequest().reason is None


def test_requests_that_are_no_files_are_obeyed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_LOOK_EVERY", 0)
    stop = StopRequest()
    for name in ("STOP", "SAVE"):
        (tmp_path / name / "full").mkdir(parents=True)
    stop.look(tmp_path)
    assert (stop.reason, stop.save) == ("the file STOP", True)
    stop.look(tmp_path)
    assert not stop.save
    stop = StopRequest()
    (tmp_path / "SAVE" / "full").rmdir()
    (tmp_path / "STOP" / "full").rmdir()
    stop.look(tmp_path)
    assert (stop.reason, stop.save) == ("the file STOP", True)
    (tmp_path / "STOP").symlink_to("nowhere")
    stop.look(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_real_run_saves_and_ends_well(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR1 while Python still imports, SIGHUP as soon as it is no longer deadly."""
    run, output = tmp_path / "run", tmp_path / "output.txt"
    long = ["--set", "training.steps=100000", "--set", "training.validate_every=0"]
    with started(pretrain(digits, run, *long), output) as process:
        while not caught(process.pid) >> (number - 1) & 1:
            assert process.poll() is None, output.read_text()
        os.kill(process.pid, number)
        assert finish(process, output, 60) == 0, output.read_text()
    assert f"stopped by {number.name} after step" in output.read_text()
    assert any((run / "checkpoints").glob("step-*"))


def caught(pid: int) -> int:
    """The signals that a process has handlers for, a bit each."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines["SigCgt"], 16)
    return 0
