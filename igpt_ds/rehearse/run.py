"""A rehearsal from its options to its record."""

import io
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

from igpt_ds.distributed.device import at_hand, require_device
from igpt_ds.errors import RunError, UserError
from igpt_ds.rehearse.job import Request, prepare
from igpt_ds.rehearse.measure import Tell, measure
from igpt_ds.rehearse.ranks import PlayedRanks
from igpt_ds.rehearse.report import make_record
from igpt_ds.text import time_text


def run(request: Request, steps: int, limit: float, tell: Tell) -> dict[str, Any]:
    """Run one rank of a job here; its record, see `igpt_ds.rehearse.report`.

    Args:
        steps: how many are timed.
        limit: seconds after which it is given up.
        tell: is told what goes on.

    Raises:
        RunError: it took too long; or see `igpt_ds.rehearse.measure.measure`.
        UserError: see `igpt_ds.rehearse.job.prepare`.
    """
    if "RANK" in os.environ:
        raise UserError("rehearse: RANK is set, as a launcher does: one process plays all ranks: start it without one")
    here = at_hand(PlayedRanks(0, request.ranks))
    rehearsal = prepare(request, here)
    require_device(rehearsal.here.config, here)
    # Below stage 3 the last rank's gradients come first, so it takes most. At stage 3 ranks compare what rank 0 says.
    ranks = PlayedRanks(0 if rehearsal.here.layout.stage == 3 else request.ranks - 1, request.ranks)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its lines go where the figures go
    tell(rehearsal.planned.how)
    doing = "beginning"

    def note(line: str) -> None:
        nonlocal doing
        doing = line
        tell(line)

    try:
        with redirect_stdout(io.StringIO()), _ended(limit):  # DeepSpeed prints, too
            measured = measure(rehearsal.here, ranks, steps, note)
    except _TimeIsUp:
        raise RunError(
            f"--limit: {time_text(limit)} are over ({doing}): allow more, or rehearse smaller images (--resolution)"
        ) from None
    finally:
        ranks.leave()
    return make_record(rehearsal, ranks.rank, measured)


class _TimeIsUp(BaseException):
    """No Exception, which on its way up would be taken for a fault of what is done just then."""


@contextmanager
def _ended(limit: float) -> Iterator[None]:
    """Raise _TimeIsUp after so many seconds; and let SIGTERM end it as Ctrl-C does, so that no file stays behind."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, end)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
