"""The last resort against a hang: a small process beside a rank, which kills it when even its watchdog shows no life.

The watching thread of a rank is held up by code that never lets go of the interpreter. A timer within the rank could
end it then, but would run on while a job is suspended, and end the job in the moment in which it is resumed. Time in
which this process does not run itself, or in which the rank is stopped, does not count.

    python guard.py PID LIMIT INTERVAL      its standard input is the rank's end of a pipe: life, and at last the end
"""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Watch the process that started this one."""
    rank, limit, interval = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    os.closerange(3, 65536)  # a device that a library opened must not stay open when the rank is gone
    silent, last = 0.0, time.monotonic()
    while os.getppid() == rank:
        shown = select.select([0], [], [], interval)[0]
        now = time.monotonic()
        if shown and not os.read(0, 65536):
            return
        # A look that comes late counts as if in time, see the watchdog.
        silent = 0.0 if shown or _stopped(rank) else silent + min(now - last, 2 * interval)
        last = now
        if silent > limit:
            _end(rank, silent)


def _stopped(pid: int) -> bool:
    """Whether it is suspended, or halted by a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def _end(pid: int, silent: float) -> None:
    text = f"igpt-ds: hang: process {pid} has been held up for {silent:.0f} s by code that never lets go of Python"
    with contextlib.suppress(OSError):
        print(f"{text}, and is killed; its stacks are in its log", file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
