"""The unit of work: one slice of a plan becomes its shards. Idempotent, resumable, committed last.

A slice of a source that lists its images is one shard in each of its views; an image is decoded once for all that are
not there yet. An input file of a streamed source is read once, and becomes as many shards as its rows need; each is
committed by its mark, and the mark of the last one says that it is the last. A task that was stopped goes on after the
last committed shard: it passes over the images before it without decoding them. Each mark carries a hash of all images
up to its end; where those that are passed over, or were seen by other views, are others, the input has changed, and the
slice is built anew; so it is if a file that was read to its end, or that of a listed image, has changed since. A slice
in which no image can be used leaves a mark without a shard.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from data_prep.images.pieces import pixels, stamp, stream
from data_prep.images.rejects import Rejected
from data_prep.selection.file import Selection
from data_prep.shards.marks import Mark, Passed, read, tally_of
from data_prep.shards.plan import ROWS_PER_BLOCK, Plan, Slice, Split, belongs, missing_selected
from data_prep.sources import Encoded, Source
from data_prep.workers.pool import count
from data_prep.workers.run import Done
from igpt_ds.atomic import publish_text
from igpt_ds.dataset.manifest import ShardRecord
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import read_mark, write_shard
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import Transform
from igpt_ds.lock import require
from igpt_ds.reading import read_json
from igpt_ds.text import visible

OWNER = ".build"  # names the build that may publish in a split's directory: the text of its lock
UNKNOWN = "null"  # in place of what a slice's input was
_FIRST_BYTES = 1 << 20  # of a shard's buffer, which doubles as it fills


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to build one slice, but for DIRECTORY/palette.npy; picklable.

    Attributes:
        slice: what is to be built.
        directory: of the dataset.
        plan: the plan's fingerprint.
        palette_sha256: of the palette that the directory must hold.
        selection: reduced to the slice's part.
        images: of the whole job, for the share of rejects; None where it is not known.
        token: of the build that the task belongs to: once another has begun, nothing more is published.
    """

    slice: Slice
    directory: Path
    plan: str
    palette_sha256: str
    source: Source
    split: Split
    holdout: float
    transform: Transform
    storage: str
    rows_per_shard: int
    selection: Selection | None
    images: int | None
    max_reject_rate: float
    token: str


def task_of(
    plan: Plan, piece: Slice, directory: Path, palette: Palette, images: int | None, rate: float, token: str
) -> ShardTask:
    """The task that builds one slice of a plan."""
    selection = None
    if plan.selection and piece.piece.part:
        selection = replace(plan.selection, members={piece.piece.part: plan.selection.members[piece.piece.part]})
    return ShardTask(
        slice=piece,
        directory=directory,
        plan=plan.fingerprint,
        palette_sha256=palette.sha256,
        source=plan.source,
        split=plan.split,
        holdout=plan.settings.holdout,
        transform=plan.transform,
        storage=plan.settings.storage,
        rows_per_shard=plan.settings.rows_per_shard,
        selection=selection,
        images=images,
        max_reject_rate=rate,
        token=token,
    )


def build_slice(task: ShardTask) -> Done:
    """Read, transform, encode and publish the images of one slice, in their order.

    Raises:
        UserError: more images are rejected than the whole job may have, an input file cannot be read to its end, or
            a shard cannot be written.
    """
    marks = committed(task, thorough=True)
    if _is_finished(task, marks):
        tally = tally_of(marks)
        return Done(tally, tally.seen, _again(task))
    now = stamp(task.source, task.slice.piece)
    if now is not None:
        require(task.directory / OWNER, task.token)
        publish_text(_stamp_of(task), UNKNOWN)  # until all shards are of what is read now
    done = _go_on(task, marks, {} if marks else _views_there(task))
    if done is None:
        told = f"{task.slice.name}: its images have changed since it was built: it is built anew"
        if task.slice.piece.items is None:
            holds = "holds" if marks[-1].passed else "may hold"  # older versions have not kept what it held
            told = f"{task.slice.piece.part}: {holds} other images than when {len(marks)} of its shards were built"
            told += f": they are built anew for {task.split}"
        sys.stderr.write(visible(f"igpt-data: {told}") + "\n")
        done = _go_on(task, [], {})
    if now is not None:
        publish_text(_stamp_of(task), json.dumps(now))
    return cast(Done, done)


def _go_on(task: ShardTask, marks: list[Mark], there: dict[int, Mark]) -> Done | None:
    """Build the slice's shards after those that have marks, but for views that are there; None: of other images."""
    tally, passed = tally_of(marks), Passed()
    kept = tally.seen
    palette = _palette(task.directory / "palette.npy", task.palette_sha256)
    images = _images(task)
    for encoded in islice(images, kept):
        passed.add(encoded)
    if marks and marks[-1].passed != passed.hex:
        return None
    if marks and marks[-1].last:
        return Done(tally, kept, _again(task)) if next(images, None) is None else None
    _remove_from(task, len(marks))
    views = [view for view in task.slice.views if view not in there]
    shard = _Shard(task, len(marks), views)
    for position, encoded in enumerate(images, kept):
        rows = _encode(encoded, task.transform, views, palette)
        if isinstance(rows, Rejected):
            shard.rejected.append(rejected := rows)
            tally.reject(rejected)
            tally.judge(task.max_reject_rate, task.images)
        else:
            # A full shard waits for the next row, for until then it may be the last.
            if shard.rows == shard.capacity:
                shard.publish(seen=position, last=False, passed=passed.hex)
                shard = _Shard(task, shard.number + 1, views)
            shard.add(encoded, rows)
        tally.seen += 1
        passed.add(encoded)
        count(1, int(isinstance(rows, Rejected)))
    if any(mark.passed != passed.hex for mark in there.values()):
        return None
    shard.publish(seen=tally.seen, last=True, passed=passed.hex)
    return Done(tally, kept, _again(task))


def _is_finished(task: ShardTask, marks: list[Mark]) -> bool:
    """Are all shards there, and the input what it was? Older versions have not kept what it was."""
    if not marks or not marks[-1].last:
        return False
    now = stamp(task.source, task.slice.piece)
    if now is None or marks[-1].passed is None:
        return True
    try:
        return bool(read_json(_stamp_of(task)) == now)
    except FileNotFoundError:
        return task.slice.piece.items is not None  # the data set was complete, see `Build.prepare`
    except (OSError, ValueError):
        return False


def _stamp_of(task: ShardTask) -> Path:
    """What the input was when it was read; until the data set is complete."""
    return task.directory / f".{task.slice.name}.input"


def _again(task: ShardTask) -> bool:
    """The other views have the same images as the first and reject the same ones."""
    return task.slice.views[0] != 0


def _remove_from(task: ShardTask, start: int) -> None:
    """Remove what an earlier run left of an input file's shards from this one on: there may be fewer of them now."""
    if task.slice.piece.items is not None:
        return
    first = start * len(task.slice.views)
    for suffix in ("json", "tar"):  # the marks first
        for path in task.directory.glob(f"{task.slice.name}-*.{suffix}"):
            number = path.stem.rpartition("-")[2]
            if number.isdecimal() and int(number) >= first:
                require(task.directory / OWNER, task.token)
                path.unlink(missing_ok=True)


def finished(task: ShardTask) -> Done | None:
    """What a finished task has done, from the marks and the sizes of the files; None if it is not finished."""
    marks = committed(task, thorough=False)
    if not _is_finished(task, marks):
        return None
    tally = tally_of(marks)
    return Done(tally, tally.seen, _again(task))


def committed(task: ShardTask, *, thorough: bool) -> list[Mark]:
    """The slice's shards from an earlier run, by their first view, up to the first that is not there in all views.

    All of the same images: of listed ones each view is a file of its own, and a build anew may have ended between two.
    """
    marks: list[Mark] = []
    while not marks or not marks[-1].last:
        names = [task.slice.shard(len(marks), view) for view in task.slice.views]
        found = [read(task.directory, name, task.plan, thorough) for name in names]
        # An input file without a usable image has one mark only, whatever its views.
        empty = task.slice.piece.items is None and found[0] and found[0].record is None
        found = found[:1] if empty else found
        if not all(found) or len({mark and mark.passed for mark in found}) > 1:
            break
        marks.append(cast(Mark, found[0]))
    return marks


def _views_there(task: ShardTask) -> dict[int, Mark]:
    """Of listed images, the views whose shard is there."""
    if task.slice.piece.items is None:
        return {}
    found = {view: read(task.directory, task.slice.shard(0, view), task.plan, True) for view in task.slice.views}
    return {view: mark for view, mark in found.items() if mark}


def records(task: ShardTask, marks: list[Mark]) -> list[tuple[ShardRecord, float]]:
    """The slice's shards, of all views that it writes: each one's record and the palette's squared error in it."""
    names = [task.slice.shard(i, view) for i, mark in enumerate(marks) if mark.record for view in task.slice.views]
    found = [mark for name in names if (mark := read_mark(task.directory, name))]
    return [(record, float(note["squared_error"])) for record, note in found]


class _Shard:
    """The rows of one shard, in some views, until it is published."""

    def __init__(self, task: ShardTask, number: int, views: list[int]) -> None:
        self.task, self.number, self.rows = task, number, 0
        self.capacity = task.rows_per_shard
        tokens = cast(int, task.transform.resolution) ** 2
        shape = (min(self.capacity, max(1, _FIRST_BYTES // (2 * tokens))), tokens)
        self.tokens = {view: np.empty(shape, np.uint16) for view in views}
        self.ids: list[bytes] = []
        self.labels: list[int | None] = []
        self.rejected: list[Rejected] = []
        self.squared_error = dict.fromkeys(views, 0.0)  # of the palette, see `Palette.squared_error`

    def add(self, encoded: Encoded, rows: list["_Row"]) -> None:
        for view, (row, squared_error) in zip(self.tokens, rows, strict=True):
            array = self.tokens[view]
            self.squared_error[view] += squared_error
            if self.rows == len(array):
                array.resize((min(2 * self.rows, self.capacity), array.shape[1]), refcheck=False)
            array[self.rows] = row
        self.ids.append(encoded.item.id.encode("utf-8", "surrogateescape"))
        self.labels.append(encoded.item.label)
        self.rows += 1

    def publish(self, *, seen: int, last: bool, passed: str) -> None:
        task = self.task
        rejected = [list(each) for each in self.rejected]
        note = {"plan": task.plan, "seen": seen, "last": last, "passed": passed, "rejected": rejected}
        if not self.rows:
            require(task.directory / OWNER, task.token)
            mark = json.dumps({"rows": 0, "note": note}, indent=1) + "\n"
            for view in list(self.tokens)[: 1 if task.slice.piece.items is None else None]:
                publish_text(task.directory / f"{task.slice.shard(self.number, view)}.json", mark)
            return
        for view, tokens in self.tokens.items():
            require(task.directory / OWNER, task.token)
            write_shard(
                task.directory,
                task.slice.shard(self.number, view),
                tokens[: self.rows],
                np.array(self.ids, dtype=np.bytes_),
                None if task.source.classes is None else np.array(self.labels, np.int64),
                rows_per_block=ROWS_PER_BLOCK,
                view=view,
                note={**note, "squared_error": self.squared_error[view]},
                storage=task.storage,
            )


def _images(task: ShardTask) -> Iterator[Encoded]:
    """The slice's images that belong to the split and to the selection."""
    piece = task.slice.piece
    if piece.items is not None:  # chosen when they were listed
        yield from stream(task.source, piece)
        return
    mine = belongs(task.split, task.holdout)
    kept = task.selection.kept(piece.part) if task.selection else None
    met = 0
    for encoded in stream(task.source, piece):
        if kept is not None:
            if encoded.item.id.encode("utf-8", "surrogateescape") not in kept:
                continue
            met += 1
        if mine(encoded.sample or encoded.item.id):
            yield encoded
    if task.selection and kept is not None and met != len(kept):
        raise missing_selected(task.selection, piece.part, len(kept) - met, len(kept))


_Row = tuple[np.ndarray, float]  # tokens, and the squared error of their colours


def _encode(encoded: Encoded, transform: Transform, views: Sequence[int], palette: Palette) -> list[_Row] | Rejected:
    """The image in each of the views, or why there is none."""
    found = pixels(encoded, transform, views)
    if isinstance(found, Rejected):
        return found
    tokens = [palette.encode(view).reshape(-1) for view in found]
    return [(row, palette.squared_error(view, row)) for view, row in zip(found, tokens, strict=True)]


@lru_cache(maxsize=2)
def _palette(path: Path, sha256: str) -> Palette:
    """The palette of the dataset, loaded once a process: its table takes 32 MiB."""
    palette = Palette.load(path)
    if palette.sha256 != sha256:
        raise UserError(f"{path}: is not the palette that the build began with: restore it and run again")
    return palette
