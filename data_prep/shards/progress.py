"""What a job has done so far, and how much there is to do."""

from typing import Protocol

from data_prep.images.rejects import Tally
from data_prep.shards.job import Build
from data_prep.shards.task import Built


class Meter(Protocol):
    """What shows a job's progress."""

    def show(self, read: int, rejected: int, total: int | None) -> None:
        """Images read and rejected since the beginning, and the images in all, where that is known."""


class Progress:
    """A build's images: the tally that rejects are judged by, and what a meter shows.

    Views of images that are listed are read one after the other: to the meter each reading is an image more.
    """

    def __init__(self, job: Build, meter: Meter | None) -> None:
        self.tally = Tally()
        self._meter = meter
        self._slices, self._finished = job.slices, 0
        counts = [plan.images(job.max_shards) for plan in job.planned]
        self._known = all(count is not None for count in counts)
        self._total = sum((count or 0) * plan.passes for count, plan in zip(counts, job.planned, strict=True))
        self._seen, self._kept, self._read, self._rejected = 0, 0, 0, 0
        self._show()

    @property
    def total(self) -> int | None:
        """Images of the whole job; of a streamed source an estimate from the slices that are done."""
        if self._known:
            return self._total
        return self._seen * self._slices // self._finished if self._finished else None

    def watch(self, read: int, rejected: int) -> None:
        """The tasks have read so many images in this run."""
        self._read, self._rejected = max(self._read, read), max(self._rejected, rejected)
        self._show()

    def done(self, built: Built) -> None:
        """A task has ended."""
        if built.first_view:
            self.tally.add(built.tally)
        self._finished += 1
        self._seen += built.tally.seen
        self._kept += built.kept
        # Some executors tell no more than this.
        self._read = max(self._read, self._seen - self._kept)
        self._show()

    def _show(self) -> None:
        if self._meter:
            total = self.total
            left = None if total is None else max(total - self._kept, self._read)
            self._meter.show(self._read, self._rejected, left)
