"""What may interrupt a run between two steps: a signal from a person, the shell or the scheduler."""

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class StopRequest:
    """Remembers the first signal that asks the run to stop.

    From the beginning SIGUSR1, a scheduler's notice, which may come at any time and would kill; from `listen` on also
    SIGTERM and SIGINT, which until then end the process as usual. A second SIGINT interrupts at once, as a person who
    insists expects.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        _handle((signal.SIGUSR1,), self._remember)

    def listen(self) -> None:
        """The first step is about to begin: there is something to finish and to save now."""
        _handle((signal.SIGTERM, signal.SIGINT), self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def end(self) -> None:
        """Ignore the scheduler from now on: Python's exit brings the deadly defaults back, and a notice that comes
        again then would turn a clean end into a failed one."""
        _handle((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN)


def _handle(numbers: Iterable[signal.Signals], handler: Handler) -> None:
    # Python lets only the main thread set handlers; tests run ranks as threads.
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)
