"""Build dataset directories from a source, wherever the tasks run.

Each slice of a `Build` (see `data_prep.shards.job`) is built by a pure function that publishes shards and their commit
marks (see `data_prep.shards.task`); the marks are merged into the manifests at the end.
"""

from typing import Any

from data_prep.shards.job import Build, Results
from data_prep.shards.task import OWNER, build_slice, finished
from data_prep.workers.run import Here, Meter, Place, Step
from data_prep.workers.slurm import refuse_pending
from igpt_ds.errors import UserError


def build(job: Build, place: Place, meter: Meter) -> Results | None:
    """Build what `data_prep.shards.job.begin` has planned; slices that are built already are kept.

    Returns:
        Each split's directory with its manifest, or None where it was there already, complete; None: jobs of a cluster
        have still to end.
    """
    if place.busy():
        if other := next((job.directory(p) for p in job.planned if p.difference(job.directory(p))), None):
            raise UserError(f"{other}: jobs are still building another dataset there: wait, or end them with scancel")
        return place.run(_step(job.joined()), meter)
    if isinstance(place, Here) and any((job.directory(plan) / OWNER).exists() for plan in job.planned):
        refuse_pending(job.out / "jobs", job.out)
    with job.owned() as mine:
        try:
            mine.prepare()
            return place.run(_step(mine), meter)
        except UserError:
            if isinstance(place, Here):
                mine.clean_up()
            raise


def _step(job: Build) -> Step[Results]:
    counts: list[Any] = [plan.images(job.max_shards) for plan in job.planned]
    readings = [count and count * plan.passes for count, plan in zip(counts, job.planned, strict=True)]
    return Step(
        "slices are not built",
        [task for plan in job.planned for task in job.tasks(plan)],
        build_slice,
        finished,
        job.finish,
        job.made,
        images=job.images,
        readings=None if None in counts else sum(readings),
        max_reject_rate=job.max_reject_rate,
    )
