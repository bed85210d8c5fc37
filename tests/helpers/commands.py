"""The real command line: in this process, in one of its own, and through the deepspeed launcher."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igpt_ds import cli
from igpt_ds.train.signals import handlers_restored
from tests.helpers.ranks import ROOT, free_port, kill_group, quick_start


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """`igpt-ds WORDS` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["igpt-ds", *map(str, words)])
    try:
        with handlers_restored():
            cli.main()
    except SystemExit as end:
        assert end.code is None or isinstance(end.code, int)
        return end.code or 0
    return 0


def pretrain(data: Path, run: Path, *more: str) -> list[str]:
    """Arguments of a short run of the tiny preset."""
    return ["pretrain", str(run), "--preset", "tiny", "--data", str(data), "--set", "seed=1", *more]


@contextlib.contextmanager
def started(
    arguments: list[str], output: Path, world: int = 1, errors: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A command while it runs; on leaving, it and all that it started are dead.

    Args:
        output: file for what it writes; stderr goes there too unless `errors` names another.
        world: above 1, through the deepspeed launcher.
    """
    command = [sys.executable, "-m", "igpt_ds"]
    if world > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        ranks = ["--num_accelerators", str(world), "--master_port", str(free_port())]
        command = [launcher, *ranks, "--module", "igpt_ds"]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("wb"))
        err = stack.enter_context(errors.open("wb")) if errors else subprocess.STDOUT
        environment = quick_start() | ({"LOCAL_SIZE": "1"} if world == 1 else {})
        process = subprocess.Popen(
            [*command, *arguments], env=environment, cwd=ROOT, stdout=out, stderr=err, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_all(process)


def finish(process: "subprocess.Popen[bytes]", output: Path, limit: float = 120) -> int:
    """Wait for the end of a command; its exit status.

    Raises:
        AssertionError: the time was up; with what the command wrote.
    """
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {limit} s:\n{output.read_text(errors='replace')}") from None


def run_command(arguments: list[str], output: Path, world: int = 1) -> str:
    """Run a command to its end, which must be exit status 0; what it wrote.

    Raises:
        AssertionError: another status, or the time was up.
    """
    with started(arguments, output, world) as process:
        status = finish(process, output)
    text = output.read_text(errors="replace")
    assert status == 0, f"exit {status}:\n{text}"
    return text


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Wait for something to happen while the process runs.

    Raises:
        AssertionError: the process ended first, or two minutes passed.
    """
    deadline = time.monotonic() + 120
    while not happened():
        alive = process.poll() is None and time.monotonic() < deadline
        assert alive, f"it did not happen:\n{output.read_text(errors='replace')}"
        time.sleep(0.002)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill -9 the process's group and every descendant that made a group of its own; wait until they are gone."""
    family = descendants(process.pid)
    kill_group(process)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while left := [pid for pid in family if _alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} survive kill -9"
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """Ids of the processes that it and its children started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
