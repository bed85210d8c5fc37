"""What people and schedulers ask of a run between two steps: to stop, or to save. And what it tells its job script."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import cast

from igpt_ds.atomic import no_link
from igpt_ds.run.directory import LOGGER

Handler = Callable[[int, FrameType | None], None] | signal.Handlers

_LOOK_EVERY = 1.0  # seconds; a network file system would feel it if every step asked


class StopRequest:
    """Remembers the first signal that asks the run to stop, and looks for the files RUN/STOP and RUN/SAVE.

    From the beginning SIGUSR1, a scheduler's notice, which may come at any time and would kill; from `listen` on also
    SIGTERM, SIGINT and SIGHUP (a lost terminal), which until then end the process as usual. A second SIGINT interrupts
    at once, as a person who insists expects.

    Attributes:
        reason: who asked the run to stop, or None.
        save: whether a SAVE file asked for a checkpoint.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.save = False
        self._looked = -_LOOK_EVERY
        self._stays: set[str] = set()  # requests that cannot be removed, and are obeyed once
        _handle((signal.SIGUSR1,), self._remember)
        if _noticed:
            self.reason = _noticed.pop()

    def listen(self) -> None:
        """The first step is about to begin: there is something to finish and to save now."""
        _handle((signal.SIGTERM, signal.SIGINT), self._remember)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            _handle((signal.SIGHUP,), self._remember)

    def look(self, run: Path) -> None:
        """Look for STOP and SAVE, once a second at most; what was found is removed, since it is obeyed."""
        self.save = False
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for name in ("STOP", "SAVE"):
            if os.path.lexists(run / name) and name not in self._stays:
                self._remove(run / name)
                if name == "STOP":
                    self.reason = self.reason or "the file STOP"
                else:
                    self.save = True

    def _remove(self, request: Path) -> None:
        try:
            request.rmdir() if request.is_dir() and not request.is_symlink() else request.unlink(missing_ok=True)
        except OSError as error:
            LOGGER.warning(f"{request}: obeyed, but cannot be removed: {error.strerror}")
            self._stays.add(request.name)

    @property
    def by_person(self) -> bool:
        """Whether it was not what will want the run to go on: not a scheduler, but Ctrl-C, STOP, a closed terminal.

        The deepspeed launcher makes SIGTERM of Ctrl-C, so there a SIGTERM may be a person's.
        """
        schedulers = ("SIGUSR1",) if "CROSS_SIZE" in os.environ else ("SIGUSR1", "SIGTERM")
        return self.reason is not None and self.reason not in schedulers

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def end(self) -> None:
        """Ignore the scheduler from now on: Python's exit brings the deadly defaults back, and a notice that comes
        again then would turn a clean end into a failed one."""
        _handle((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), signal.SIG_IGN)


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Around a training that is a part of a longer program: what signals did before they do again."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                _handle((number,), cast(Handler, handler))


_noticed: list[str] = []  # a scheduler's notice that came before there was a `StopRequest`
_arrivals: list[int] = []  # the pipe into which the arrival of a signal is written, at once


def hear() -> None:
    """From the beginning of the process: no notice kills it, and what arrives is known before Python gets to it."""
    if not _arrivals and threading.current_thread() is threading.main_thread():
        _arrivals[:] = os.pipe()
        for end in _arrivals:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(_arrivals[1], warn_on_full_buffer=False)
    _handle((signal.SIGUSR1,), lambda number, frame: _noticed.append("SIGUSR1"))


def arrived() -> bool:
    """Whether a signal has arrived that the process does not die of. Python itself may be busy with a step."""
    # Read and written back, since it holds from then on.
    try:
        return bool(_arrivals) and os.write(_arrivals[1], os.read(_arrivals[0], 4096)) > 0
    except BlockingIOError:
        return False


def tell_job_script(outcome: str) -> None:
    """Write one word into the file that IGPT_OUTCOME names: exit statuses do not survive srun when ranks are killed.

    Args:
        outcome: "requeue": stopped on request with all saved, to be started again; "refused": bad input or a
            loss that is lost for good, which starting again does not cure.
    """
    if path := os.environ.get("IGPT_OUTCOME"):
        # Without it the script takes the end for a failure: no reason to hide the line that tells why.
        with contextlib.suppress(OSError), open(path, "w", opener=no_link) as file:
            file.write(outcome + "\n")


def _handle(numbers: Iterable[signal.Signals], handler: Handler) -> None:
    # Python lets only the main thread set handlers; tests run ranks as threads.
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)
