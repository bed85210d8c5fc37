"""Whose end ends a rank: which processes above it are launchers, and what is missing when it starts."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from igpt_ds.distributed import launcher
from igpt_ds.distributed.launcher import Process, ancestors
from tests.helpers.ranks import ROOT, kill_group, quick_start


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("/venv/bin/python3.11 /venv/bin/torchrun --nproc-per-node 2 -m igpt_ds", "torchrun"),
        ("python -u -m deepspeed.launcher.launch --world_info=x igpt_ds", "deepspeed.launcher.launch"),
        ("/usr/bin/python -X dev -m torch.distributed.run -m igpt_ds", "torch.distributed.run"),
        ("python /venv/bin/accelerate launch -m igpt_ds", "accelerate"),
        ("slurmstepd: [123.0]", "slurmstepd"),
        ("/venv/bin/python /venv/bin/igpt-ds sweep --out sweeps/s -- pretrain", "igpt-ds sweep"),
        ("python -m igpt_ds sweep --out sweeps/s", "igpt-ds sweep"),
        ("python -m igpt_ds pretrain sweep", "igpt_ds"),
        ("bash -c torchrun", "bash"),
        ("vim torchrun", "vim"),
        ("python train.py torchrun", "train.py"),
    ],
)
def test_a_launcher_is_known_by_what_it_runs(command: str, program: str) -> None:
    assert Process(1, 1, command.split()).program == program
    assert (program in launcher._LAUNCHERS | launcher._STARTERS) == (
        program not in ("igpt_ds", "bash", "vim", "train.py")
    )


def test_the_processes_above_are_found() -> None:
    parent = next(ancestors())
    assert parent.pid == os.getppid() and parent.words


NODE = Process(3, 1, ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"])
DEEPSPEED = Process(2, 1, ["python", "/venv/bin/deepspeed", "--num_gpus", "2"])
SHELL = Process(1, 1, ["bash"])


@pytest.mark.parametrize(
    ("above", "missing"),
    [
        ([NODE, DEEPSPEED, SHELL], None),
        ([NODE, SHELL], "deepspeed"),
        ([NODE], "deepspeed"),
        ([SHELL], "deepspeed.launcher.launch"),
        ([NODE._replace(words=[*NODE.words, "--node_rank=1"]), SHELL], None),
    ],
)
def test_a_deepspeed_launcher_that_was_killed_early_is_missed(
    monkeypatch: pytest.MonkeyPatch, above: Sequence[Process], missing: str | None
) -> None:
    assert launcher._gone_already(above) is None
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert launcher._gone_already(above) == missing


# A process that is to follow its launcher, and how long it lives at most.
RANK = """
import os, sys, time
from pathlib import Path
from igpt_ds.distributed.launcher import follow
follow(lambda: {asked})
Path(sys.argv[1], "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
START = '"$1" "$2/rank.py" "$2" 2>"$2/said" &'
# Its name is all that makes this shell a launcher.
BY_MPIRUN = f"exec -a mpirun bash -c '{START} wait' _ \"$@\""


def followed(folder: Path, script: str, asked: bool = False, **environment: str) -> "subprocess.Popen[bytes]":
    """A starter with a rank below it; the rank's id is then in `folder`/pid, what it says in `folder`/said."""
    (folder / "rank.py").write_text(RANK.format(asked=asked))
    command = ["bash", "-c", script, "_", sys.executable, str(folder)]
    return subprocess.Popen(command, env=quick_start() | environment, cwd=ROOT, start_new_session=True)


def lives(pid: int) -> bool:
    return launcher.born(pid) is not None


def rank_of(folder: Path) -> int:
    deadline = time.monotonic() + 120
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((folder / "pid").read_text())


def test_a_rank_ends_with_its_launcher_and_says_so(tmp_path: Path) -> None:
    starter = followed(tmp_path, BY_MPIRUN, RANK="1")
    try:
        pid = rank_of(tmp_path)
        assert lives(pid)
        starter.kill()
        starter.wait()
        deadline = time.monotonic() + 30
        while lives(pid):
            assert time.monotonic() < deadline, "an orphan"
            time.sleep(0.05)
        said = (tmp_path / "said").read_text()
        assert said == (
            f"igpt-ds: rank 1: its launcher (mpirun, process {starter.pid}) is gone, so this process ends; "
            "what was saved stands\n"
        )
    finally:
        kill_group(starter)


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        (f"({START}) ; sleep 9", {"RANK": "0"}),
        (f"(setsid {START}) ; sleep 9", {"RANK": "0"}),
        (BY_MPIRUN, {}),
    ],
    ids=["a shell", "setsid", "no rank"],
)
def test_a_process_outlives_what_is_no_launcher_of_it(tmp_path: Path, script: str, environment: dict[str, str]) -> None:
    starter = followed(tmp_path, script, **environment)
    try:
        pid = rank_of(tmp_path)
        starter.kill()
        starter.wait()
        time.sleep(2.5)
        assert lives(pid), (tmp_path / "said").read_text()
        os.kill(pid, 9)
    finally:
        kill_group(starter)


def test_a_rank_that_is_about_to_stop_gets_time_to_save(tmp_path: Path) -> None:
    starter = followed(tmp_path, BY_MPIRUN, asked=True, RANK="1")
    try:
        pid = rank_of(tmp_path)
        starter.kill()
        starter.wait()
        time.sleep(2.5)
        assert lives(pid)
        os.kill(pid, 9)
    finally:
        kill_group(starter)
