"""Build dataset directories from a source: on this machine, or as jobs of a Slurm cluster.

Both build the slices of one `Build` (see `data_prep.shards.job`), each by a pure function that publishes shards and
their commit marks (see `data_prep.shards.task`), and merge the marks into the manifests at the end.
"""

from collections.abc import Sequence
from concurrent.futures import Executor

from data_prep.shards.job import Build, Results
from data_prep.shards.progress import Meter, Progress
from data_prep.shards.task import ShardTask, build_slice, finished
from data_prep.workers import pool as executors
from data_prep.workers.slurm import MAX_ARRAY, Cluster, batches
from igpt_ds.errors import UserError


def build(job: Build, *, executor: Executor | None = None, meter: Meter | None = None) -> Results:
    """Build what `data_prep.shards.job.begin` has planned, on this machine or wherever an executor runs tasks.

    Args:
        executor: runs the tasks; None: one by one in this process. See `data_prep.workers.pool.pool`.
        meter: is shown the progress.

    Returns:
        Each split's directory with its manifest, or None where it was there already, complete.

    Raises:
        UserError: too many rejects, a split without images, OUT cannot be written, a worker died.
    """
    try:
        job.prepare()
        progress = Progress(job, meter)
        tasks = (task for plan in job.planned for task in job.tasks(plan))
        for built in executors.run(build_slice, tasks, executor, progress.watch):
            progress.done(built)
            progress.tally.judge(job.max_reject_rate, job.images or progress.total)
        return job.finish()
    except UserError:
        job.clean_up()
        raise


def build_on_cluster(job: Build, cluster: Cluster, *, wait: bool, meter: Meter | None = None) -> Results | None:
    """Build as an array of jobs, and a job after it that merges the marks.

    Finished slices are not submitted again; where all are finished, only the merging is left, and is done here.
    While jobs of an earlier call are waiting or running, nothing is submitted.

    Args:
        wait: until the jobs have ended; else return when they are submitted.

    Returns:
        As `build`; None when not all is built yet.

    Raises:
        UserError: the jobs ended and some slices are not built; and what `build` raises.
    """
    if cluster.running():
        if other := next((job.directory(p) for p in job.planned if p.difference(job.directory(p))), None):
            raise UserError(
                f"{other}: jobs {', '.join(cluster.jobs())} are still building another dataset there: "
                "wait for them, or end them with scancel"
            )
    else:
        # Only now, for it clears temporary files away.
        job.prepare()
        left = [task for plan in job.planned for task in job.tasks(plan) if not finished(task)]
        if not left:
            return job.finish()
        cluster.submit(build_batch, batches(left, MAX_ARRAY), job.finish)
    if not wait:
        return None
    progress = Progress(job, meter)
    left = [task for plan in job.planned for task in job.tasks(plan)]

    def look() -> None:
        for task in list(left):
            if built := finished(task):
                progress.done(built)
                left.remove(task)

    cluster.wait(look)
    look()
    if left:
        raise cluster.failure(f"{job.out}: {len(left)} of {job.slices} slices are not built")
    again = job.reopened()
    return again if again is not None else job.finish()


def missing(job: Build) -> int:
    """How many slices are not built yet."""
    return sum(not finished(task) for plan in job.planned for task in job.tasks(plan))


def build_batch(tasks: Sequence[ShardTask], workers: int) -> None:
    """The tasks of one job of the array."""
    with executors.pool(workers) as executor:
        for _ in executors.run(build_slice, tasks, executor):
            pass
