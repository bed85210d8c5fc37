"""Steps run on this machine: a meter that keeps what it is shown, and what is built or fitted where tests want it."""

from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from data_prep.palette.count import colour_tasks
from data_prep.palette.job import Fitted, fit_palette
from data_prep.shards.build import build
from data_prep.shards.job import Build, Results
from data_prep.sources import Source
from data_prep.workers.run import Here, Place


class Meter:
    """Keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int, int | None]] = []

    def show(self, read: int, rejected: int, total: int | None) -> None:
        """As `data_prep.workers.run.Meter`."""
        self.shown.append((read, rejected, total))


def build_here(job: Build, executor: Executor | None = None, meter: Meter | None = None) -> Results:
    """Build on this machine."""
    built = build(job, Here(executor), meter or Meter())
    assert built is not None
    return built


def fit_at(place: Place, source: Source, transform: Any, out: Path, k: int = 16, **options: Any) -> Fitted | None:
    """Fit a palette wherever tasks run; the counts lie in OUT.work."""
    tasks = colour_tasks(source, transform, out.with_name(f"{out.name}.work"), **options)
    return fit_palette(tasks, k=k, seed=0, out=out, place=place, meter=Meter())
