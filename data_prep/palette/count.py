"""Count the colours of a source's images: each task counts its own images, and counts add up.

A task's counts travel as (colours that occur, how often), for few of the 2^24 colours occur in a part's images.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from data_prep.images.rejects import Rejected, Tally, pixels, read_listed
from data_prep.images.transforms import Transform
from data_prep.shards.plan import is_streamed, unit_hash
from data_prep.shards.progress import Meter
from data_prep.sources import Encoded, Item, ListedSource, Source, StreamedSource
from data_prep.workers import pool as executors
from data_prep.workers.pool import count
from igpt_ds.errors import UserError

_BATCH = 1 << 20  # pixels that are sorted at a time
_SLICE = 512  # listed images a task
COLOURS = 1 << 24


@dataclass(frozen=True)
class ColourTask:
    """Images to count: a slice of a source that lists them, or one input file of a streamed source."""

    source: Source
    transform: Transform
    items: list[Item] | None
    part: str | None
    sample: float
    images: int | None  # of the whole job
    max_reject_rate: float


@dataclass
class Counts:
    """How often colours occur. Counts of parts add up to the counts of the whole.

    Attributes:
        packed: int64 [n], those that occur, r << 16 | g << 8 | b, ascending.
        times: int64 [n].
        tally: the images.
    """

    packed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def of(cls, dense: np.ndarray, tally: Tally) -> "Counts":
        """From counts int64 [2^24]."""
        packed = np.flatnonzero(dense)
        return cls(packed, dense[packed], tally)


def add_colours(counts: np.ndarray, rgb: np.ndarray) -> None:
    """Add pixels uint8 [..., 3] to counts int64 [2^24]."""
    wide = rgb.reshape(-1, 3).astype(np.int32)
    packed, number = np.unique(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2], return_counts=True)
    counts[packed] += number


def colour_tasks(
    source: Source, transform: Transform, *, sample: float = 1.0, max_reject_rate: float = 0.0
) -> list[ColourTask]:
    """The tasks that together count a source's training images.

    Args:
        sample: the share of images to count, chosen by a hash of their ids.

    Raises:
        UserError: the source has no training images, or none is in the sample.
    """
    if is_streamed(source):
        parts = cast(StreamedSource, source).parts("train")
        tasks = [ColourTask(source, transform, None, part, sample, None, max_reject_rate) for part in parts]
    else:
        items = [item for item in cast(ListedSource, source).items("train") if _sampled(item, sample)]
        slices = [items[i : i + _SLICE] for i in range(0, len(items), _SLICE)]
        tasks = [ColourTask(source, transform, each, None, sample, len(items), max_reject_rate) for each in slices]
    if not tasks:
        raise UserError(f"{source.name}: no training images to count: mend the path, or raise --sample")
    return tasks


def count_slice(task: ColourTask) -> Counts:
    """Count the colours of one task's images.

    Raises:
        UserError: more are rejected than the whole job may have, or an input file cannot be read.
    """
    return count_batch([task])


def count_batch(tasks: Sequence[ColourTask]) -> Counts:
    """Count the colours of several tasks' images, one after the other."""
    dense, tally = np.zeros(COLOURS, np.int64), Tally()
    waiting: list[np.ndarray] = []
    for task in tasks:
        for encoded in _images(task):
            found = pixels(encoded, task.transform)
            tally.seen += 1
            if isinstance(found, Rejected):
                tally.reject(found)
                tally.judge(task.max_reject_rate, task.images)
            else:
                waiting.append(found.reshape(-1, 3))
                if sum(map(len, waiting)) >= _BATCH:
                    add_colours(dense, np.concatenate(waiting))
                    waiting.clear()
            count(1, int(isinstance(found, Rejected)))
    if waiting:
        add_colours(dense, np.concatenate(waiting))
    return Counts.of(dense, tally)


def count_all(
    tasks: Sequence[ColourTask], executor: Executor | None = None, meter: Meter | None = None
) -> tuple[np.ndarray, Tally]:
    """Count all tasks' images: int64 [2^24] at r << 16 | g << 8 | b, and their tally.

    Raises:
        UserError: more images are rejected than allowed.
    """
    done = 0
    total = Total(tasks[0].max_reject_rate)

    def watch(read: int, rejected: int) -> None:
        if meter:
            estimate = total.tally.seen * len(tasks) // done if done else None
            meter.show(max(read, total.tally.seen), rejected, tasks[0].images or estimate)

    watch(0, 0)
    for counts in executors.run(count_slice, tasks, executor, watch):
        total.add(counts)
        done += 1
        total.tally.judge(total.allowed, tasks[0].images or total.tally.seen * len(tasks) // done)
        watch(0, 0)
    return total.close()


class Total:
    """Counts added up, and judged in the end."""

    def __init__(self, allowed: float) -> None:
        self.dense, self.tally, self.allowed = np.zeros(COLOURS, np.int64), Tally(), allowed

    def add(self, counts: Counts) -> None:
        """Add a part."""
        self.dense[counts.packed] += counts.times
        self.tally.add(counts.tally)

    def close(self) -> tuple[np.ndarray, Tally]:
        """All counts and their tally.

        Raises:
            UserError: too many rejects in all.
        """
        self.tally.judge(self.allowed, self.tally.seen)
        return self.dense, self.tally


def _sampled(item: Item, sample: float) -> bool:
    return sample >= 1 or unit_hash("palette sample", item.id) < sample


def _images(task: ColourTask) -> Iterator[Encoded]:
    if task.items is not None:
        yield from read_listed(cast(ListedSource, task.source), task.items)
    else:
        stream = cast(StreamedSource, task.source).stream(cast(str, task.part))
        yield from (encoded for encoded in stream if _sampled(encoded.item, task.sample))
