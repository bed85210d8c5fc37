"""Real launchers, killed or interrupted: no orphan trains on, and what a person asks is no reason to requeue."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.ranks import losses, whole_steps
from tests.faults.test_faults import rank_of, wait_for, words
from tests.helpers.commands import descendants, finish, kill_all, pretrain
from tests.helpers.ranks import ROOT, free_port, quick_start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

LONG = words("training.steps=100000", "training.validate_every=0", "checkpoint.every=100000")
NODE = "deepspeed.launcher.launch"  # what `deepspeed` starts on each machine, which starts the ranks


@contextlib.contextmanager
def training(launcher: str, data: Path, run: Path, output: Path, ranks: int = 2) -> "Iterator[subprocess.Popen[bytes]]":
    """A run through a launcher, once its ranks train; on leaving, all of it is dead."""
    port = str(free_port())
    command = {
        "deepspeed": ["--num_accelerators", str(ranks), "--master_port", port, "--module", "igpt_ds"],
        "torchrun": ["--nproc-per-node", str(ranks), "--master-port", port, "-m", "igpt_ds", "--"],
        "accelerate": ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "-m", "igpt_ds"],
        "igpt-ds": ["sweep", "--out", str(run.parent), "--rates", "0.003", "--"],
    }[launcher]
    program = str(Path(sys.executable).with_name(launcher))
    arguments = pretrain(data, run, *LONG)
    if launcher == "igpt-ds":  # which names the run itself
        arguments = ["pretrain", *arguments[2:], *words("training.validate_every=100000")]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [program, *command, *arguments],
            env=quick_start(),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 0, output)
        yield process
    finally:
        kill_all(process)


def commands(pids: list[int]) -> dict[int, str]:
    """Process id -> command of those that live."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {pid: command for pid, command in found.items() if command}


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("deepspeed", "bin/deepspeed"),
        ("deepspeed", NODE),
        ("torchrun", "bin/torchrun"),
        ("accelerate", "bin/accelerate"),
    ],
)
def test_ranks_end_with_their_launcher(digits: Path, tmp_path: Path, launcher: str, victim: str) -> None:
    run, output = tmp_path / "lr-0.003", tmp_path / "output.txt"
    with training(launcher, digits, run, output) as process:
        family = [process.pid, *descendants(process.pid)]
        (killed,) = [pid for pid, command in commands(family).items() if victim in command]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        while left := commands([pid for pid in family if pid not in (killed, process.pid)]):
            assert time.monotonic() - began < 15, f"{left}\n{output.read_text()}"
            time.sleep(0.05)
        assert "is gone, so this process ends; what was saved stands" in output.read_text()


@pytest.mark.parametrize(
    ("launcher", "to", "number"),
    [
        ("deepspeed", "the terminal's processes", signal.SIGINT),
        ("deepspeed", NODE, signal.SIGINT),
        ("torchrun", "bin/torchrun", signal.SIGINT),
        ("deepspeed", "the terminal's processes", signal.SIGHUP),  # the launchers die of it, the ranks do not
    ],
)
def test_ctrl_c_and_a_lost_terminal_save_and_are_no_reason_to_requeue(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, to: str, number: signal.Signals
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and by all that is started")
    run, output, outcome = tmp_path / "run", tmp_path / "output.txt", tmp_path / "outcome"
    monkeypatch.setenv("IGPT_OUTCOME", str(outcome))
    with training(launcher, digits, run, output) as process:
        family = [process.pid, *descendants(process.pid)]
        ranks = [pid for pid in family if rank_of(pid)]
        if to == "the terminal's processes":
            os.killpg(process.pid, number)
        else:
            (pid,) = [pid for pid, command in commands(family).items() if to in command]
            os.kill(pid, number)
        finish(process, output, 60)
        wait_for(lambda: not commands(ranks), output)
    assert "; the same command goes on from there" in output.read_text()
    assert whole_steps(run) == [max(losses(run))]
    assert not outcome.exists()
