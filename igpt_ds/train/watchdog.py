"""A hang is found, named and ended.

Every rank counts its beats: one before each thing that can hang (a batch is awaited, a step computed, a checkpoint
written). A thread of each rank writes the count into RUN/heartbeats/rank-NNNNN.json. Since all ranks beat alike, the
one that hangs has the lowest count while the others wait for it in a collective; a rank that was stopped or cut off
leaves a file that is no longer renewed. What may take long on one rank alone, as writing a checkpoint, is no hang while
it moves: the others wait for that rank as long.

A rank without a beat for `timeout` seconds reads the others' files, tells who is to blame, writes the stacks of its
threads into its log and ends. A stopped neighbour on the same machine is made to write its stacks, too, and is killed,
since it could not obey its launcher. The launcher ends what is left and its script starts the run again. See guard.py
for a rank whose watching thread hangs as well.

Time in which a rank does not run does not count: a job that is suspended whole trains on when it is resumed.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, TypeVar

from igpt_ds.atomic import leftovers, no_link, unfinished, writing
from igpt_ds.dataset.manifest import typed
from igpt_ds.errors import UserError
from igpt_ds.lock import born
from igpt_ds.reading import read_json
from igpt_ds.run.directory import LOGGER
from igpt_ds.text import visible

T = TypeVar("T")

STATUS = 1  # of a rank that was ended for a hang
_HELD_UP = 30.0  # seconds beyond twice the time-out, after which a rank whose thread does not watch is ended


@dataclass(frozen=True)
class Heartbeat:
    """One rank's sign of life: `count` beats so far, the last of them when it began `doing` at `step`.

    Attributes:
        born: when the process started (clock ticks since boot): tells it from a later one of the same pid.
        silent: seconds in which it has neither beaten nor moved.
    """

    count: int
    doing: str
    step: int
    host: str
    pid: int
    born: int
    silent: float = 0.0


class Watchdog:
    """One rank's heartbeat and its watch over the others.

    Args:
        run: the run directory.
        timeout: seconds without a beat that are a hang; 0 watches nothing.
        log: where the stacks are written.
    """

    def __init__(self, run: Path, rank: int, world: int, timeout: float, log: TextIO):
        self._folder, self._rank, self._world = run / "heartbeats", rank, world
        self._timeout, self._log = timeout, log
        self._interval = max(0.05, min(2.0, timeout / 10))
        self._mine = Heartbeat(0, "starting", 0, socket.gethostname(), os.getpid(), born(os.getpid()) or 0)
        self._moves = 0
        self._guard: tuple[int, int] | None = None  # its process, and the end of the pipe that it reads
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Show the first sign of life and begin to watch."""
        if not self._timeout:
            return
        with writing(self._folder):
            if self._folder.exists() and not self._folder.is_dir():
                raise UserError(f"{self._folder}: is a file where the run's heartbeats go: move it away")
            self._folder.mkdir(exist_ok=True)
            for left in [self._stopped(self._rank), *leftovers(self._folder / _name(self._rank))]:
                left.unlink(missing_ok=True)
            self._show()
        # Written by the signal's handler itself, so that a rank stuck in C code, or just continued, obeys.
        faulthandler.register(signal.SIGUSR2, file=self._log, all_threads=True)
        self._start_guard()
        self._thread.start()

    def _start_guard(self) -> None:
        command = [sys.executable, "-IS", str(Path(__file__).with_name("guard.py"))]
        command += [str(os.getpid()), str(2 * self._timeout + _HELD_UP), str(self._interval)]
        reads, shows = os.pipe()
        os.set_blocking(shows, False)
        # What asks the rank to stop reaches its whole group; it must not end the guard.
        deaf = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        actions = [(os.POSIX_SPAWN_DUP2, reads, 0)]
        try:
            guard = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsigmask=deaf)
            self._guard = guard, shows
        except OSError as error:  # no more processes, say
            LOGGER.warning(f"no process to guard against a hang of Python itself: {error.strerror}")
        finally:
            os.close(reads)

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            if self._guard is not None:
                guard, shows = self._guard
                os.close(shows)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(guard, 0)
            (self._folder / _name(self._rank)).unlink(missing_ok=True)

    def beat(self, doing: str, step: int) -> None:
        """This rank begins something that may hang."""
        mine = self._mine
        self._mine = Heartbeat(mine.count + 1, doing, step, mine.host, mine.pid, mine.born)

    def moves(self) -> None:
        """This rank gets on with what it has begun; on the others it may be done already."""
        self._moves += 1

    def over(self, items: Iterable[T], getting: str, using: str, step: int) -> Iterator[T]:
        """The items, with a beat before each is got and one before it is used."""
        iterator = iter(items)
        while True:
            self.beat(getting, step)
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.beat(using, step)
            yield item

    def _watch(self) -> None:
        seen, silent, last = (self._mine.count, self._moves), 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            with contextlib.suppress(OSError):
                if self._guard is not None:
                    os.write(self._guard[1], b".")
            now, new = time.monotonic(), (self._mine.count, self._moves)
            # A look that comes late counts as if in time: what held this process up (a suspended job, a machine too
            # busy) may have held up the others, which have not shown themselves again yet.
            silent = silent + min(now - last, 2 * self._interval) if new == seen else 0.0
            seen, last = new, now
            with contextlib.suppress(OSError):  # a full disk is told of elsewhere
                self._show(silent)
            if silent > self._timeout and not self._waits():
                self._end_the_run(silent)

    def _show(self, silent: float = 0.0) -> None:
        path = self._folder / _name(self._rank)
        temporary = unfinished(path)
        try:
            with open(temporary, "x") as file:
                json.dump(asdict(replace(self._mine, silent=silent)), file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _stopped(self, rank: int) -> Path:
        """The mark of a rank that a neighbour found stopped."""
        return (self._folder / _name(rank)).with_suffix(".stopped")

    def _end_the_run(self, silent: float) -> None:
        stopped, blame = self._diagnose()
        text = visible(f"hang: no progress for {silent:.0f} s: {blame}; the ranks' stacks are in their logs")
        with contextlib.suppress(OSError):  # a full disk
            print(f"{time.strftime('%F %T')} {text}", file=self._log, flush=True)
        faulthandler.dump_traceback(self._log, all_threads=True)
        if self._rank == min(set(range(self._world)) - stopped.keys(), default=self._rank):
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(f"igpt-ds: {text}", file=sys.stderr, flush=True)
        for rank, other in stopped.items():
            if other.host == self._mine.host and born(other.pid) == other.born:
                # It shows itself when it is made to go on, and who looks then must not take it for alive.
                with contextlib.suppress(OSError):
                    open(self._stopped(rank), "a", opener=no_link).close()
                _end_neighbour(other.pid)
        time.sleep(2 * self._interval + 0.5)  # the others notice within an interval, and have stacks to write
        os._exit(STATUS)

    def _others(self) -> tuple[dict[int, Heartbeat], dict[int, Heartbeat], list[str]]:
        """The ranks that live, this one among them, those without a sign of life, and a word about those never seen."""
        # Times of one file system, since clocks differ.
        try:
            now = (self._folder / _name(self._rank)).stat().st_mtime
        except OSError:  # somebody has deleted the folder
            now = time.time()
        alive: dict[int, Heartbeat] = {}
        stopped: dict[int, Heartbeat] = {}
        missing = []
        for rank in range(self._world):
            path = self._folder / _name(rank)
            try:
                heartbeat = typed(Heartbeat, read_json(path))
                silence = now - path.stat().st_mtime
            except (OSError, ValueError, TypeError):
                missing.append(f"rank {rank} has shown no sign of life")
                continue
            gone = silence > self._timeout / 2 or self._stopped(rank).exists()
            (stopped if gone else alive)[rank] = heartbeat
        return alive, stopped, missing

    def _waits(self) -> bool:
        """Whether this rank waits for one that has less done, lives and moves."""
        alive, stopped, missing = self._others()
        behind = min((other.count for other in alive.values()), default=self._mine.count)
        slow = (other for other in alive.values() if other.count == behind < self._mine.count)
        return not stopped and not missing and any(other.silent <= self._timeout for other in slow)

    def _diagnose(self) -> tuple[dict[int, Heartbeat], str]:
        """The ranks without a sign of life, and a sentence about who is to blame."""
        alive, stopped, missing = self._others()
        if stopped or missing:
            those = [
                f"rank {rank} (process {h.pid} on {h.host}) shows no sign of life: stopped, dead or cut off while "
                f"{h.doing} at step {h.step}"
                for rank, h in stopped.items()
            ]
            return stopped, "; ".join([*those, *missing])
        behind = min(h.count for h in alive.values())
        if all(h.count == behind for h in alive.values()) and self._world > 1:
            return {}, f"all ranks are {self._mine.doing} at step {self._mine.step}"
        stuck = [
            f"rank {rank} (process {h.pid} on {h.host}) is stuck {h.doing} at step {h.step}"
            for rank, h in alive.items()
            if h.count == behind
        ]
        return {}, "; ".join(stuck)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _end_neighbour(pid: int) -> None:
    """Make a stopped process of this machine write its stacks, then kill it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
