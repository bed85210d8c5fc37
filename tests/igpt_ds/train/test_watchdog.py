"""The watchdog of ranks that are small processes: who is named, whose stacks are written, and that all end."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from igpt_ds.atomic import unfinished
from igpt_ds.errors import UserError
from igpt_ds.train.watchdog import Watchdog
from tests.helpers.ranks import kill_group, quick_start

TIMEOUT = 2.0
# Ranks that beat alike and meet at every step, as a collective makes them: a file a rank and step is the meeting.
RANK = """
import os, re, signal, sys, time
from pathlib import Path
from igpt_ds.train import watchdog as module
from igpt_ds.train.watchdog import Watchdog
module._HELD_UP = 0
run, rank, world, fault = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
late = 0.6 if fault == "stopped 0, seen late" and rank == 1 else 0
watchdog = Watchdog(run, rank, world, {timeout} + late, (run / f"log.{{rank}}").open("w"))
watchdog.start()
def the_place_of_the_fault():
    while True:
        time.sleep(0.05)
def batches():
    for step in range(1000):
        if step == 5 and rank == 1 and fault == "data":
            the_place_of_the_fault()
        yield step
for step in batches() if fault == "none" else watchdog.over(batches(), "loading data", "computing a step", 5):
    watchdog.beat("computing a step", step)
    if step == 5 and fault.startswith(f"stopped {{rank}}"):
        os.kill(os.getpid(), signal.SIGSTOP)
        the_place_of_the_fault()
    until = time.process_time() + (0.3 if fault == "slow" else 0)
    while time.process_time() < until:
        pass
    if step == 5 and fault == "held up":
        re.match("(a+)+$", 60 * "a" + "b")  # does not end, and does not let other threads run
    if step == 5 and rank == 1 and fault == "computing":
        the_place_of_the_fault()
    if step == 5 and fault.startswith("saving"):
        watchdog.beat("saving", step)
        for _ in range(70 if rank == 1 else 0):
            time.sleep(0.1)
            watchdog.moves()
        if rank == 1 and fault == "saving, then stuck":
            the_place_of_the_fault()
    (run / f"met-{{rank}}-{{step}}").touch()
    watchdog.beat("waiting for the other ranks", step)
    while not all((run / f"met-{{other}}-{{step}}").exists() for other in range(world)):
        time.sleep(0.005)
    time.sleep(0.02)
    if step == {{"none": 100, "slow": 12, "saving": 8}}.get(fault):
        watchdog.end()
        break
"""


@contextmanager
def ranks(run: Path, fault: str, world: int = 3) -> Iterator[list["subprocess.Popen[str]"]]:
    processes = []
    try:
        for rank in range(world):
            command = [sys.executable, "-c", RANK.format(timeout=TIMEOUT), str(run), str(rank), str(world), fault]
            processes.append(
                subprocess.Popen(command, env=quick_start(), stderr=subprocess.PIPE, text=True, start_new_session=True)
            )
        yield processes
    finally:
        for process in processes:
            kill_group(process)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_a_run_without_a_hang_ends_by_itself(tmp_path: Path) -> None:
    """And clears what a killed one was writing."""
    (tmp_path / "heartbeats").mkdir()
    for rank in range(3):
        unfinished(tmp_path / "heartbeats" / f"rank-{rank:05d}.json").symlink_to(tmp_path / "victim")
    with ranks(tmp_path, "none") as processes:
        for process in processes:
            assert process.wait(timeout=30) == 0
            assert process.stderr is not None and process.stderr.read() == ""
    assert list((tmp_path / "heartbeats").iterdir()) == []


@pytest.mark.parametrize(("fault", "doing"), [("data", "loading data"), ("computing", "computing a step")])
def test_a_stuck_rank_is_named(tmp_path: Path, fault: str, doing: str) -> None:
    with ranks(tmp_path, fault) as processes:
        codes = [process.wait(timeout=30) for process in processes]
        errors = [process.stderr.read() for process in processes if process.stderr]
    assert codes == [1, 1, 1]
    assert f"rank 1 (process {processes[1].pid} on " in errors[0]
    assert f"is stuck {doing} at step 5" in errors[0]
    assert errors[1:] == ["", ""], "one rank speaks"
    for rank in range(3):
        assert "no progress for" in (tmp_path / f"log.{rank}").read_text()
    assert "the_place_of_the_fault" in (tmp_path / "log.1").read_text()


def test_what_takes_long_on_one_rank_is_no_hang_while_it_moves(tmp_path: Path) -> None:
    """The other ranks wait for it three times as long as the time-out is."""
    with ranks(tmp_path, "saving") as processes:
        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
        assert [process.stderr.read() for process in processes if process.stderr] == ["", "", ""]


def test_what_moves_no_longer_is_a_hang(tmp_path: Path) -> None:
    with ranks(tmp_path, "saving, then stuck") as processes:
        wait_for(tmp_path / "met-0-5")
        began = time.monotonic()
        codes = [process.wait(timeout=60) for process in processes]
        took = time.monotonic() - began
        errors = [process.stderr.read() for process in processes if process.stderr]
    assert codes == [1, 1, 1] and took > 7 + TIMEOUT / 2
    assert f"rank 1 (process {processes[1].pid} on " in errors[0] and "is stuck saving at step 5" in errors[0]
    assert "the_place_of_the_fault" in (tmp_path / "log.1").read_text()


# A rank that saves, on a file system that takes 0.4 s for each of ten writes and then may hang.
SAVE = """
import sys, threading, time
from pathlib import Path
import torch
from igpt_ds.checkpoint import safetensors_stream as stream, write
from igpt_ds.checkpoint.read import Shard
from igpt_ds.train.watchdog import Watchdog
run, way, hangs = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "hangs"
write.available_bytes = lambda: 0 if way == "before" else 1 << 40
writes = iter(range(1000))
def put(file, data, digest):
    time.sleep(60 if hangs and next(writes) == 10 else 0.4)
    real(file, data, digest)
real, stream._put = stream._put, put
watchdog = Watchdog(run, 0, 1, {timeout}, (run / "log").open("w"))
watchdog.start()
saver = write.Saver(run / "checkpoints", 0, 1, lambda fault: fault, beat=watchdog.beat, moves=watchdog.moves)
shards = [Shard(str(number), (2,), 0, 2, lambda kind: torch.zeros(2)) for number in range(4)]
saver.begin(7, shards, {{"identity": {{}}, "config": {{}}}})
print(saver.conclude())
watchdog.end()
"""


@pytest.mark.parametrize("way", ["before", "beside"], ids=["before it trains on", "beside the training"])
@pytest.mark.parametrize("end", ["comes through", "hangs"])
def test_a_save_on_a_slow_file_system_is_no_hang(tmp_path: Path, way: str, end: str) -> None:
    command = [sys.executable, "-c", SAVE.format(timeout=TIMEOUT), str(tmp_path), way, end]
    done = subprocess.run(command, env=quick_start(), capture_output=True, text=True, timeout=60, check=False)
    if end == "hangs":
        assert done.returncode == 1
        assert "hang: no progress for" in done.stderr and "saving at step 7" in done.stderr
        assert not list((tmp_path / "checkpoints").glob("step-*"))
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == str(tmp_path / "checkpoints" / "step-00000007")


@pytest.mark.parametrize(("world", "send"), [(1, os.kill), (2, os.killpg)], ids=["a process", "two process groups"])
def test_a_suspended_run_goes_on_when_it_is_resumed(
    tmp_path: Path, world: int, send: "Callable[[int, int], None]"
) -> None:
    with ranks(tmp_path, "slow", world) as processes:
        wait_for(tmp_path / "met-0-3")
        time.sleep(0.1)  # in the midst of the next step
        for process in processes:
            send(process.pid, signal.SIGSTOP)
        time.sleep(2.5 * TIMEOUT)  # for longer than the guard would wait
        for process in processes:
            send(process.pid, signal.SIGCONT)
        assert [process.wait(timeout=30) for process in processes] == [0] * world
        assert [process.stderr.read() for process in processes if process.stderr] == [""] * world


def test_a_rank_whose_watching_thread_is_held_up_is_killed_and_leaves_its_stack(tmp_path: Path) -> None:
    with ranks(tmp_path, "held up", world=1) as (process,):
        wait_for(tmp_path / "met-0-4")
        assert process.wait(timeout=30) == -signal.SIGKILL
        assert process.stderr is not None
        (line,) = process.stderr.read().splitlines()
    assert line.startswith(f"igpt-ds: hang: process {process.pid} has been held up for ")
    assert "most recent call first" in (tmp_path / "log.0").read_text()


@pytest.mark.parametrize(("victim", "fault"), [(0, "stopped 0"), (0, "stopped 0, seen late"), (2, "stopped 2")])
def test_a_stopped_rank_is_named_and_ended_and_leaves_its_stack(tmp_path: Path, victim: int, fault: str) -> None:
    # Late: rank 1, which has to speak, looks when rank 2 has already made rank 0 go on for a moment.
    with ranks(tmp_path, fault) as processes:
        wait_for(tmp_path / f"met-{victim}-4")
        began = time.monotonic()
        codes = [process.wait(timeout=30) for process in processes]
        took = time.monotonic() - began
        errors = [process.stderr.read() for process in processes if process.stderr]
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    speaker = 1 if victim == 0 else 0
    assert f"rank {victim} (process {processes[victim].pid} on " in errors[speaker]
    assert "shows no sign of life" in errors[speaker]
    assert took < TIMEOUT + 10
    for rank in range(3):
        assert "most recent call first" in (tmp_path / f"log.{rank}").read_text()


def test_without_a_timeout_nothing_is_watched(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 1, 0, sys.stderr)
    watchdog.start()
    assert list(watchdog.over([1, 2], "a", "b", 0)) == [1, 2]
    watchdog.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout", [math.inf, 1e10])
def test_a_time_out_may_be_as_long_as_one_likes(tmp_path: Path, timeout: float) -> None:
    with (tmp_path / "log").open("w") as log:
        watchdog = Watchdog(tmp_path, 0, 1, timeout, log)
        watchdog._interval = 0.05
        watchdog.start()
        time.sleep(0.3)
        assert watchdog._thread.is_alive()
        assert watchdog._guard is not None and os.waitpid(watchdog._guard[0], os.WNOHANG) == (0, 0)
        watchdog.end()


def test_what_hinders_the_first_heartbeat_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(tmp_path, 0, 1, 5, sys.stderr)
    monkeypatch.setattr("json.dump", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="heartbeats: cannot write: the disk is full"):
        watchdog.start()
    (tmp_path / "heartbeats").rmdir()
    (tmp_path / "heartbeats").touch()
    with pytest.raises(UserError, match="heartbeats: is a file where the run's heartbeats go: move it away"):
        watchdog.start()
