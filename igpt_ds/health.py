"""What may interrupt a run between two steps: a signal from a person, the shell or the scheduler."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first of `SIGNALS`; a second SIGINT interrupts at once, as a person who insists expects."""

    def __init__(self) -> None:
        self.reason: str | None = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def end(self) -> None:
        """Ignore the scheduler from now on: Python's exit brings the deadly defaults back, and a notice that comes
        again then would turn a clean end into a failed one."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
