"""What people and schedulers ask of a run between two steps: to stop, or to save. And what it tells its job script."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from igpt_ds.atomic import no_link

Handler = Callable[[int, FrameType | None], None] | signal.Handlers

_LOOK_EVERY = 1.0  # seconds; a network file system would feel it if every step asked


class StopRequest:
    """Remembers the first signal that asks the run to stop, and looks for the files RUN/STOP and RUN/SAVE.

    From the beginning SIGUSR1, a scheduler's notice, which may come at any time and would kill; from `listen` on also
    SIGTERM and SIGINT, which until then end the process as usual. A second SIGINT interrupts at once, as a person who
    insists expects.

    Attributes:
        reason: who asked the run to stop, or None.
        save: whether a SAVE file asked for a checkpoint.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.save = False
        self._looked = -_LOOK_EVERY
        _handle((signal.SIGUSR1,), self._remember)

    def listen(self) -> None:
        """The first step is about to begin: there is something to finish and to save now."""
        _handle((signal.SIGTERM, signal.SIGINT), self._remember)

    def look(self, run: Path) -> None:
        """Look for STOP and SAVE, once a second at most; what was found is removed, since it is obeyed."""
        self.save = False
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for name in ("STOP", "SAVE"):
            if (run / name).exists():
                (run / name).unlink(missing_ok=True)
                if name == "STOP":
                    self.reason = self.reason or "the file STOP"
                else:
                    self.save = True

    @property
    def by_scheduler(self) -> bool:
        """Whether the run was asked to stop by what will want it to go on: not by a person's Ctrl-C or STOP."""
        return self.reason in ("SIGTERM", "SIGUSR1")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def end(self) -> None:
        """Ignore the scheduler from now on: Python's exit brings the deadly defaults back, and a notice that comes
        again then would turn a clean end into a failed one."""
        _handle((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN)


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
