"""Run tasks in this process, in a pool of processes, or in any `concurrent.futures.Executor`.

A task is a picklable argument of a pure function that publishes what it makes: it does not matter where tasks
run, in what order, or how often. Only a bounded number of them is in flight, so that a job of ten thousand tasks
costs no memory.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from igpt_ds.errors import UserError

_POLL = 0.2  # seconds between two looks at the workers' counts
_IN_FLIGHT = 256  # tasks handed to an executor that does not say how many workers it has

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Counts:
    """Images read and rejected by this process's tasks, or by those of a pool."""

    def __init__(self) -> None:
        self.values: Any = [0, 0]
        self.lock: Any = threading.Lock()
        self.watcher: Callable[[], None] | None = None


_counts = _Counts()


def count(read: int, rejected: int) -> None:
    """Called by tasks: so many more images are read, so many of them rejected."""
    with _counts.lock:
        _counts.values[0] += read
        _counts.values[1] += rejected
    if _counts.watcher:
        _counts.watcher()


class Pool(ProcessPoolExecutor):
    """Processes of this machine, started afresh (spawned), which count what they read in shared memory.

    They end with the process that started them, however it ends, and leave Ctrl-C to it.
    """

    def __init__(self, workers: int) -> None:
        context = get_context("spawn")
        self.workers = workers
        self.counts = context.Array("q", 2)
        end, self._lifeline = context.Pipe(duplex=False)
        super().__init__(workers, mp_context=context, initializer=_start_worker, initargs=(self.counts, end))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As `Executor.submit`. The first call starts the workers, which inherit that Ctrl-C is blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """End the workers at once, in the middle of their tasks."""
        self._lifeline.close()


def _start_worker(counts: Any, lifeline: Connection) -> None:
    _counts.values, _counts.lock = counts.get_obj(), counts.get_lock()
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    # Only the parent holds the other end: it says nothing, and closes it when it stops or dies.
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def pool(workers: int) -> Iterator[Executor | None]:
    """An executor of so many processes; None, which is this process, for one.

    On an exception, Ctrl-C among them, the workers end at once.
    """
    if workers == 1:
        yield None
        return
    executor = Pool(workers)
    try:
        yield executor
    except BaseException:
        executor.stop()
        executor.shutdown(wait=True, cancel_futures=True)
        raise
    executor.shutdown(wait=True)


def run(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    executor: Executor | None,
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """The tasks' results in the order in which they end.

    Args:
        function: at the top level of a module, for an executor that pickles it.
        executor: None runs the tasks one by one in this process.
        watch: called several times a second with the images read and rejected so far (see `count`), as far as the
            executor lets them be known before a task ends.

    Raises:
        UserError: a worker process died; and whatever a task raises.
    """
    shared = executor.counts.get_obj() if isinstance(executor, Pool) else _counts.values
    first = tuple(shared)

    def look() -> None:
        if watch:
            watch(shared[0] - first[0], shared[1] - first[1])

    if executor is None:
        _counts.watcher = look
        try:
            yield from map(function, tasks)
        finally:
            _counts.watcher = None
        return
    limit = 2 * executor.workers if isinstance(executor, Pool) else _IN_FLIGHT
    waiting: set[Future[Result]] = set()
    left = iter(tasks)
    try:
        while True:
            for task in left:
                waiting.add(executor.submit(function, task))
                if len(waiting) >= limit:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            look()
            for future in done:
                yield future.result()
    except BrokenExecutor as error:
        raise UserError(
            "a worker process died (killed, perhaps for want of memory): the same command again continues, "
            "with fewer --workers if it dies again"
        ) from error
    finally:
        for future in waiting:
            future.cancel()
