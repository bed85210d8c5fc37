"""Where the tasks of a step run: on this machine, or in jobs of a Slurm cluster. Either way a task that is done stays
done, and the same command again goes on with the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, Protocol, TypeVar

from data_prep.shards.progress import Meter
from data_prep.workers import pool as executors
from data_prep.workers.slurm import MAX_ARRAY, Cluster, batches

Task = TypeVar("Task")


class Step(NamedTuple):
    """Tasks of one kind.

    Attributes:
        what: they are called in messages.
        function: at the top level of a module; publishes what a task makes, and nothing if that is there.
        tasks: picklable.
        done: whether what a task makes is there.
        images: in all tasks; None where that is not known.
    """

    what: str
    function: Callable[..., object]
    tasks: Sequence[object]
    done: Callable[..., bool]
    images: int | None


class Place(Protocol):
    """Runs steps."""

    executor: Executor | None

    def run(self, step: Step, meter: Meter) -> bool:
        """Run the tasks that are not done; whether all are done now.

        Raises:
            UserError: what a task raises, or a worker died.
        """


class Here:
    """This machine, or wherever an executor runs tasks; None: one by one in this process."""

    def __init__(self, executor: Executor | None = None) -> None:
        self.executor = executor

    def run(self, step: Step, meter: Meter) -> bool:
        """As `Place.run`; always True."""
        tasks = [task for task in step.tasks if not step.done(task)]
        finished = 0

        def watch(read: int, rejected: int) -> None:
            # Some of what is read belongs to tasks that are not finished: the estimate falls to the truth.
            known = step.images if len(tasks) == len(step.tasks) else None
            meter.show(read, rejected, known or (read * len(tasks) // finished if finished else None))

        for _ in executors.run(step.function, tasks, self.executor, watch):
            finished += 1
        return True


class OnCluster:
    """An array of jobs for each step; what is between the steps is done in this process.

    Args:
        wait: for each step's jobs to end; else `run` says that they have not.
    """

    def __init__(self, cluster: Cluster, wait: bool) -> None:
        self.cluster, self.wait = cluster, wait
        self.executor: Executor | None = None

    def run(self, step: Step, meter: Meter) -> bool:
        """As `Place.run`."""
        left = [task for task in step.tasks if not step.done(task)]
        if not left:
            return True
        if not self.cluster.running():
            work = _Batch(step.function)
            self.cluster.submit(work, batches(left, MAX_ARRAY), _nothing)
        if not self.wait:
            return False

        def look() -> None:
            left[:] = [task for task in left if not step.done(task)]

        self.cluster.wait(look)
        look()
        if left:
            raise self.cluster.failure(f"{len(left)} of {len(step.tasks)} {step.what} are not done")
        return True


class _Batch:
    """What a job does with its tasks; picklable where its function is."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, tasks: Sequence[object], workers: int) -> None:
        with executors.pool(workers) as executor:
            for _ in executors.run(self.function, tasks, executor):
                pass


def _nothing() -> None:
    """The array's own marks are all that is wanted."""
