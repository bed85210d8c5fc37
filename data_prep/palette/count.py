"""Count the colours of a source's images: each task counts its own images, and counts add up.

A task's counts are kept as (colours that occur, how often), for few of the 2^24 colours occur in a part's images:

    FOLDER/counts-00000.npz     packed uint32 [n], ascending, each less the one before; times uint32 [n]; tally, JSON
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_prep.files.npz import DAMAGE
from data_prep.images.pieces import Piece, cut, pieces_of, pixels, stamp, stream, unit_hash
from data_prep.images.rejects import Rejected, Tally
from data_prep.sources import Encoded, Item, Source, StreamedSource
from data_prep.workers.pool import count
from data_prep.workers.run import Done
from data_prep.workers.slurm import batches
from igpt_ds.atomic import publish_file
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import Transform
from igpt_ds.reading import parse_json

_BATCH = 1 << 20  # pixels that are sorted at a time
_IMAGES = 512  # listed images a task, at least
_TASKS = 1000  # at most: each leaves a file of some megabytes
COLOURS = 1 << 24


@dataclass(frozen=True)
class ColourTask:
    """Images to count.

    Attributes:
        path: of the file that takes the counts.
        key: what they are counts of, all tasks together.
        sample: the share of the images to count.
        images: of all tasks; None where it is not known.
    """

    path: Path
    key: str
    source: Source
    transform: Transform
    pieces: list[Piece]
    sample: float
    images: int | None
    max_reject_rate: float

    @property
    def inputs(self) -> list[list[int] | str | None]:
        """What the input files are now, see `data_prep.images.pieces.stamp`."""
        return [stamp(self.source, piece) for piece in self.pieces]


def colour_tasks(
    source: Source,
    transform: Transform,
    folder: Path,
    *,
    options: dict[str, str] | None = None,
    sample: float = 1.0,
    max_reject_rate: float = 0.0,
) -> list[ColourTask]:
    """The tasks that together count a source's training images.

    Args:
        folder: takes the counts.
        options: that the source was opened with; counts of others are not mixed with these.
        sample: the share of images to count, chosen by a hash of their ids.
    """
    images = None
    if isinstance(source, StreamedSource):
        pieces = pieces_of(source, "train", 0)
    else:
        items = [item for item in source.items("train") if _sampled(item, sample)]
        images = len(items)
        pieces = cut(items, max(_IMAGES, -(-images // _TASKS)))
    if not pieces:
        raise UserError(
            f"{source.name}: no training images to count: raise --share, or mend the path "
            "or the names in it, which tell train from test (docs/data.md)"
        )
    record = [source.name, options or {}, transform.record(), sample, PIL.__version__]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for piece in pieces:
        digest.update("\0".join([*piece.names, ""]).encode("utf-8", "surrogateescape"))
    return [
        ColourTask(
            folder / f"counts-{number:05d}.npz",
            digest.hexdigest(),
            source,
            transform,
            list(some),
            sample,
            images,
            max_reject_rate,
        )
        for number, some in enumerate(batches(pieces, _TASKS))
    ]


def count_colours(task: ColourTask) -> Done:
    """Count the colours of a task's images and publish the counts, unless that is done."""
    if done := counted(task):
        return done
    dense, tally, inputs = np.zeros(COLOURS, np.int64), Tally(), task.inputs
    waiting: list[np.ndarray] = []
    for encoded in _images(task):
        found = pixels(encoded, task.transform)
        tally.seen += 1
        if isinstance(found, Rejected):
            tally.reject(found)
            tally.judge(task.max_reject_rate, task.images)
        else:
            waiting.append(found[0].reshape(-1, 3))
            if sum(map(len, waiting)) >= _BATCH:
                add_colours(dense, np.concatenate(waiting))
                waiting.clear()
        count(1, int(isinstance(found, Rejected)))
    if waiting:
        add_colours(dense, np.concatenate(waiting))
    packed = np.flatnonzero(dense)
    told = {"key": task.key, "inputs": inputs, "seen": tally.seen, "reasons": tally.reasons, "last": tally.last}
    with publish_file(task.path) as file:
        np.savez_compressed(
            file,
            packed=np.diff(packed, prepend=0).astype(np.uint32),
            times=dense[packed].astype(np.uint32 if dense.max(initial=0) < 1 << 32 else np.int64),
            tally=np.frombuffer(json.dumps(told).encode(), np.uint8),
        )
    return Done(tally)


def add_colours(counts: np.ndarray, rgb: np.ndarray) -> None:
    """Add pixels uint8 [..., 3] to counts int64 [2^24], at r << 16 | g << 8 | b."""
    wide = rgb.reshape(-1, 3).astype(np.int32)
    np.add.at(counts, wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2], 1)


def counted(task: ColourTask) -> Done | None:
    """What a task has counted in an earlier run; None where it has not."""
    try:
        with np.load(task.path, allow_pickle=False) as file:
            told = parse_json(file["tally"].tobytes())
        tally = _tally(told)
        same = told["key"] == task.key and told["inputs"] == task.inputs
        return Done(tally, tally.seen) if same else None
    except DAMAGE:
        return None


def add_up(paths: list[Path], key: str | None = None) -> tuple[np.ndarray, Tally]:
    """All tasks' counts, int64 [2^24] at r << 16 | g << 8 | b, and their tally.

    Args:
        key: of the tasks, see `ColourTask`: counts of others are refused; None takes any.
    """
    dense, tally = np.zeros(COLOURS, np.int64), Tally()
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                told = parse_json(file["tally"].tobytes())
                if key not in {None, told["key"]}:
                    raise KeyError(key)
                dense[np.cumsum(file["packed"], dtype=np.int64)] += file["times"]
                tally.add(_tally(told))
        except (*DAMAGE, IndexError) as error:
            raise UserError(f"{path}: cannot be read: delete it; the same command again continues") from error
    return dense, tally


def _tally(told: dict[str, Any]) -> Tally:
    last = None if told["last"] is None else Rejected(*told["last"])
    return Tally(told["seen"], Counter(told["reasons"]), last)


def _sampled(item: Item, sample: float) -> bool:
    return sample >= 1 or unit_hash("palette sample", item.id) < sample


def _images(task: ColourTask) -> Iterator[Encoded]:
    for piece in task.pieces:
        yield from (each for each in stream(task.source, piece) if _sampled(each.item, task.sample))
