"""The one way in which tasks are run: a step's tasks, in a pool of this machine or in an array of Slurm jobs.

A task publishes what it makes, so it stays done: the same command again goes on with the others. What a step makes of
all its tasks, `finish`, runs here, or on a cluster as the last job.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from data_prep.images.rejects import Tally
from data_prep.workers import pool
from data_prep.workers.slurm import MAX_ARRAY, Cluster, batches

Made = TypeVar("Made")
Final = TypeVar("Final")


class Meter(Protocol):
    """What shows a step's progress."""

    def show(self, read: int, rejected: int, total: int | None) -> None:
        """Images read and rejected since the beginning, and the images in all, where that is known."""


@dataclass(frozen=True)
class Done:
    """What a task has read.

    Attributes:
        kept: how many of its images an earlier run had read.
        again: whether they are images that another task counts: another view of the same.
    """

    tally: Tally
    kept: int = 0
    again: bool = False


def nothing() -> bool:
    """What follows the tasks of a step that has no more to do."""
    return True


@dataclass(frozen=True)
class Step(Generic[Final]):
    """Tasks of one kind, and what is made of them all.

    Attributes:
        undone: what is said of tasks that are not done: "slices are not built".
        tasks: picklable.
        run: does a task unless it is done, and publishes what it makes; at the top level of a module.
        done: what a task that is done has read; None if it is not done.
        finish: makes of all that is published what the step is for; picklable.
        made: what an earlier call, or job, has made of it all; None if none has.
        images: in all tasks, each counted once; None where that is not known.
        readings: as often as they are read.
        max_reject_rate: the share of the images that may be rejected.
    """

    undone: str
    tasks: Sequence[Any]
    run: Callable[[Any], Done]
    done: Callable[[Any], Done | None]
    finish: Callable[[], Final]
    made: Callable[[], Final | None] = lambda: None
    images: int | None = None
    readings: int | None = None
    max_reject_rate: float = 1.0

    def conclude(self) -> Final:
        """What is made of all tasks, which are done."""
        made = self.made()
        return self.finish() if made is None else made


class Place(Protocol):
    """Where steps are run.

    Attributes:
        executor: of this machine; None: this process, one task by one.
        pending: what is to be said where `run` gave None.
    """

    executor: Executor | None

    @property
    def pending(self) -> str: ...

    def busy(self) -> bool:
        """Whether jobs of an earlier call are still waiting or running."""

    def run(self, step: Step[Final], meter: Meter) -> Final | None:
        """Run the tasks that are not done, and finish.

        Returns:
            What `finish` gives; None: jobs have still to end, then the same call goes on.
        """


class Here:
    """This machine, or wherever an executor runs tasks."""

    pending = ""

    def __init__(self, executor: Executor | None = None) -> None:
        self.executor = executor

    def busy(self) -> bool:
        """As `Place.busy`."""
        return False

    def run(self, step: Step[Final], meter: Meter) -> Final:
        """As `Place.run`."""
        progress = _Progress(step, meter)
        for done in pool.run(step.run, step.tasks, self.executor, progress.watch):
            progress.add(done)
        return step.conclude()


class OnCluster:
    """An array of jobs for each step; what is between the steps is done in this process.

    Args:
        wait: for each step's jobs to end; else `run` says that they have not.
    """

    executor: Executor | None = None

    def __init__(self, cluster: Cluster, wait: bool) -> None:
        self.cluster, self.wait = cluster, wait
        self._waits_for = ""

    def busy(self) -> bool:
        """As `Place.busy`."""
        return self.cluster.running()

    def run(self, step: Step[Final], meter: Meter) -> Final | None:
        """As `Place.run`."""
        if (made := step.made()) is not None:
            return made
        left = [task for task in step.tasks if not step.done(task)]
        if not self.busy():
            if not left:
                return step.finish()
            self.cluster.submit(_Batch(step.run), batches(left, MAX_ARRAY), step.finish)
        if not self.wait:
            self._waits_for = f"{len(left):,} of {len(step.tasks):,} {step.undone}"
            return None
        progress, left = _Progress(step, meter), list(step.tasks)

        def look() -> None:
            for task in list(left):
                if done := step.done(task):
                    progress.add(done)
                    left.remove(task)

        self.cluster.wait(look)
        look()
        if left:
            if (made := step.made()) is not None:
                return made
            raise self.cluster.failure(f"{len(left)} of {len(step.tasks)} {step.undone}")
        return step.conclude()

    @property
    def pending(self) -> str:
        """As `Place.pending`."""
        return (
            f"{self._waits_for} yet: jobs {', '.join(self.cluster.jobs())}; logs in {self.cluster.folder}: "
            "the same command again goes on from there; with --wait it waits for them"
        )


class _Batch:
    """What a job does with its tasks; picklable where its function is."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, tasks: Sequence[object], workers: int) -> None:
        with pool.pool(workers) as executor:
            for _ in pool.run(self.function, tasks, executor):
                pass


class _Progress:
    """A step's images: the tally that rejects are judged by, and what a meter shows.

    Images that are read again for further views of them are so many more to the meter.
    """

    def __init__(self, step: Step[Any], meter: Meter) -> None:
        self._step, self._meter, self._tally = step, meter, Tally()
        self._finished, self._seen, self._kept, self._read, self._rejected = 0, 0, 0, 0, 0
        self._show()

    def watch(self, read: int, rejected: int) -> None:
        """The tasks have read so many images in this run."""
        self._read, self._rejected = max(self._read, read), max(self._rejected, rejected)
        self._show()

    def add(self, done: Done) -> None:
        """A task has ended."""
        self._finished += 1
        self._seen += done.tally.seen
        self._kept += done.kept
        # Some executors tell no more than this.
        self._read = max(self._read, self._seen - self._kept)
        if not done.again:
            self._tally.add(done.tally)
        self._show()
        self._tally.judge(self._step.max_reject_rate, self._step.images)

    def _total(self) -> int | None:
        """Readings in all; of a streamed source an estimate from the tasks that are done."""
        if self._step.readings is not None:
            return self._step.readings
        return self._seen * len(self._step.tasks) // self._finished if self._finished else None

    def _show(self) -> None:
        total = self._total()
        left = None if total is None else max(total - self._kept, self._read)
        self._meter.show(self._read, self._rejected, left)
