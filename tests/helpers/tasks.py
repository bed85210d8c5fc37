"""Tasks for the tests of executors: at the top level of a module, so that a worker process can find them.

python -m tests.helpers.tasks FOLDER    starts two workers that write their process ids into FOLDER and never end
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.workers.pool import count, pool, run
from igpt_ds.errors import UserError


def double(number: int) -> int:
    """Counted as one image read, a reject where the number is odd."""
    count(1, number % 2)
    return 2 * number


def die(number: int) -> int:
    """As when memory runs out."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    """A user's mistake in one of the tasks."""
    if number == 3:
        raise UserError(f"image {number}: is not one: mend it")
    return number


def interrupted(number: int) -> int:
    """Ctrl-C in a terminal reaches the workers, too."""
    os.kill(os.getpid(), signal.SIGINT)
    return number


def loaded(_: int) -> list[str]:
    """Heavy modules in this process."""
    return [name for name in ("torch", "deepspeed", "sklearn") if name in sys.modules]


def refuse_batch(numbers: Sequence[int], workers: int) -> None:
    """A job of a cluster that fails."""
    assert workers == 1
    for number in numbers:
        refuse(number)


def hang(folder: str) -> None:
    """Say who hangs."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    with pool(2) as executor:
        list(run(hang, [sys.argv[1]] * 2, executor))
