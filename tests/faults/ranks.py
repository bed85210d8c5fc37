"""A run on several ranks that a test can strike: no launcher between, so that each rank's process is known."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.errors import UserError
from igpt_ds.run.metrics import read_metrics
from tests.helpers.commands import kill_all
from tests.helpers.ranks import ROOT, free_port, quick_start

Fault = tuple[str, int, int]  # what, on which rank, at which step
NONE: Fault = ("none", 0, 0)


class Ranks:
    """Processes of one run, one a rank; `text` is what a rank wrote."""

    def __init__(self, processes: "list[subprocess.Popen[bytes]]", logs: list[Path]):
        self.processes, self._logs = processes, logs

    def text(self, rank: int = 0) -> str:
        return self._logs[rank].read_text(errors="replace")

    def everything(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.text(rank)}" for rank in range(len(self._logs)))

    def wait(self, limit: float = 90) -> list[int]:
        """Exit statuses, once all have ended by themselves.

        Raises:
            AssertionError: the time was up.
        """
        deadline = time.monotonic() + limit
        while None in (codes := [process.poll() for process in self.processes]):
            assert time.monotonic() < deadline, f"no end within {limit} s, statuses {codes}\n{self.everything()}"
            time.sleep(0.02)
        return [int(code or 0) for code in codes]

    def until(self, happened: Callable[[], bool], limit: float = 90) -> None:
        """Wait for something while all ranks run.

        Raises:
            AssertionError: a rank ended first, or the time was up.
        """
        deadline = time.monotonic() + limit
        while not happened():
            assert all(process.poll() is None for process in self.processes), self.everything()
            assert time.monotonic() < deadline, f"it did not happen within {limit} s\n{self.everything()}"
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            kill_all(process)


@contextlib.contextmanager
def ranks(
    arguments: list[str], world: int, folder: Path, fault: Fault = NONE, environment: dict[str, str] | None = None
) -> Iterator[Ranks]:
    """`igpt-ds ARGUMENTS` on so many ranks; on leaving, all of them are dead."""
    shared = quick_start() | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **(environment or {}),
    }
    what, rank_of_fault, step = fault
    command = [sys.executable, "-m", "tests.faults.rank", what, str(rank_of_fault), str(step), *arguments]
    logs = [folder / f"rank-{rank}.txt" for rank in range(world)]
    running = Ranks([], logs)
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.processes.append(
                    subprocess.Popen(
                        command,
                        env=shared | place,
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield running
    finally:
        running.kill()


def run_to_its_end(arguments: list[str], world: int, folder: Path, fault: Fault = NONE, limit: float = 120) -> str:
    """Run to the end, which must be a good one; what rank 0 wrote."""
    with ranks(arguments, world, folder, fault) as running:
        codes = running.wait(limit)
        assert not any(codes), f"statuses {codes}\n{running.everything()}"
        return running.text()


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; each step is there once."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    steps = [line["step"] for line in lines]
    assert len(set(steps)) == len(steps), "a step is there twice"
    return {line["step"]: line["loss"] for line in lines}


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The decisions of one kind."""
    return [line for line in read_metrics(run / "metrics.jsonl") if line.get("event") == name]


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints whose every byte is as it was written."""
    found = []
    for path in list_checkpoints(run / "checkpoints"):
        with contextlib.suppress(UserError, OSError):
            opened = Checkpoint.open(path)
            opened.verify()
            found.append(opened.step)
    return found


def kill(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to one rank."""
    os.kill(process.pid, number)
