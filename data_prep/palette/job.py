"""From a source to a palette: count colours on this machine or on a cluster, add the counts up, fit, publish.

On a cluster each job of the array leaves its counts in a file of the work folder OUT.work, beside the logs:

    counts-00000.npz    packed uint32 [n], times int64 [n], tally: of one piece of the tasks
    summary.json        what was fitted; the counts are then removed
"""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL

from data_prep.images.rejects import Rejected, Tally
from data_prep.palette.count import ColourTask, Counts, Total, count_all, count_batch
from data_prep.palette.fit import Distortion, distortion, fit
from data_prep.shards.progress import Meter
from data_prep.workers import pool as executors
from data_prep.workers.slurm import Cluster, batches
from igpt_ds.atomic import publish_file, publish_text
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError

_PIECES = 100  # jobs of an array: each leaves a file of up to a hundred megabytes


@dataclass(frozen=True)
class Fitted:
    """A palette that was published.

    Attributes:
        sha256: the palette's identity.
        k, unique: colours of the palette, and of the images.
        images, rejected: counted images and those that could not be used.
        reasons: the rejects by reason.
    """

    sha256: str
    k: int
    unique: int
    mse: float
    rms_levels: float
    images: int
    rejected: int
    reasons: str


@dataclass(frozen=True)
class Piece:
    """Some tasks, and the file that takes their counts; `key` tells what they are counts of."""

    path: Path
    key: str
    tasks: Sequence[ColourTask]


@dataclass(frozen=True)
class Fit:
    """What is left when all pieces are counted: the fit. Picklable: it is the last job."""

    pieces: list[Path]
    key: str
    k: int
    seed: int
    out: Path
    allowed: float

    def __call__(self) -> Fitted:
        """Add up, fit, publish the palette, and only then forget the counts."""
        total = Total(self.allowed)
        for path in self.pieces:
            total.add(_load(path))
        fitted = publish(*total.close(), k=self.k, seed=self.seed, out=self.out)
        summary = {"key": self.key, "k": self.k, "seed": self.seed, **asdict(fitted)}
        publish_text(self.pieces[0].with_name("summary.json"), json.dumps(summary, indent=1) + "\n")
        for path in self.pieces:
            path.unlink()
        return fitted


def publish(counts: np.ndarray, tally: Tally, *, k: int, seed: int, out: Path) -> Fitted:
    """Fit a palette to counts int64 [2^24] and publish it.

    Raises:
        UserError: there are fewer colours than k, or `out` cannot be written.
    """
    palette = fit(counts, k, seed)
    palette.save(out)
    found: Distortion = distortion(counts, palette)
    unique = int((counts > 0).sum())
    return Fitted(palette.sha256, palette.k, unique, *found, tally.seen, tally.rejected, tally.table())


def fit_here(
    tasks: Sequence[ColourTask],
    *,
    k: int,
    seed: int,
    out: Path,
    executor: Executor | None = None,
    meter: Meter | None = None,
) -> Fitted:
    """Count the tasks' images and fit, on this machine.

    Raises:
        UserError: too many rejects, fewer colours than k, or `out` cannot be written.
    """
    return publish(*count_all(tasks, executor, meter), k=k, seed=seed, out=out)


def fit_on_cluster(
    tasks: Sequence[ColourTask],
    cluster: Cluster,
    *,
    options: dict[str, str],
    k: int,
    seed: int,
    out: Path,
    wait: bool,
    meter: Meter | None = None,
) -> Fitted | None:
    """As `fit_here`, counting in an array of jobs and fitting in a job after it. Counted pieces are not counted again.

    Args:
        options: that the source was opened with; counts of others are not mixed with these.
        wait: until the jobs have ended; else return when they are submitted.

    Returns:
        None when the palette is not fitted yet.

    Raises:
        UserError: the jobs ended and the palette is not fitted; and what `fit_here` raises.
    """
    key = _key(tasks, options)
    folder, out = cluster.folder.resolve(), out.resolve()
    split = batches(tasks, _PIECES)
    pieces = [Piece(folder / f"counts-{i:05d}.npz", key, piece) for i, piece in enumerate(split)]
    last = Fit([piece.path for piece in pieces], key, k, seed, out, tasks[0].max_reject_rate)
    if not cluster.running():
        if fitted := _summary(last):
            return fitted
        left = [piece for piece in pieces if not _counted(piece)]
        if not left:
            return last()
        cluster.submit(count_pieces, [[piece] for piece in left], last)
    if not wait:
        return None
    cluster.wait(lambda: _show(pieces, meter))
    if fitted := _summary(last):
        return fitted
    if any(not _counted(piece) for piece in pieces):
        raise cluster.failure(f"{out}: not all colours are counted")
    return last()


def count_pieces(pieces: Sequence[Piece], workers: int) -> None:
    """One job of the array."""
    for piece in pieces:
        if _counted(piece):
            continue
        split = batches(piece.tasks, len(piece.tasks) if workers > 1 else 1)
        total = Total(piece.tasks[0].max_reject_rate)
        with executors.pool(workers) as executor:
            for counts in executors.run(count_batch, split, executor):
                total.add(counts)
        counts = Counts.of(total.dense, total.tally)
        tally = {"key": piece.key, "seen": total.tally.seen, "reasons": total.tally.reasons, "last": total.tally.last}
        with publish_file(piece.path) as file:
            np.savez(
                file,
                packed=counts.packed.astype(np.uint32),
                times=counts.times,
                tally=np.frombuffer(json.dumps(tally).encode(), np.uint8),
            )


def _key(tasks: Sequence[ColourTask], options: dict[str, str]) -> str:
    """What the counts are counts of."""
    first = tasks[0]
    record = [first.source.name, options, first.transform.record(), first.sample, PIL.__version__]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for task in tasks:
        for name in [task.part] if task.items is None else [item.id for item in task.items]:
            digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _load(path: Path) -> Counts:
    try:
        with np.load(path, allow_pickle=False) as file:
            told = json.loads(file["tally"].tobytes())
            return Counts(file["packed"], file["times"], _tally(told))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: delete it; the same command again continues") from error


def _counted(piece: Piece) -> Tally | None:
    """The tally of a piece that is counted, without its counts; None where it is not."""
    try:
        with np.load(piece.path, allow_pickle=False) as file:
            told = json.loads(file["tally"].tobytes())
        return _tally(told) if told["key"] == piece.key else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None


def _tally(told: dict[str, Any]) -> Tally:
    last = None if told["last"] is None else Rejected(*told["last"])
    return Tally(told["seen"], Counter(told["reasons"]), last)


def _summary(last: Fit) -> Fitted | None:
    """What an earlier run has fitted to the same counts."""
    try:
        told: dict[str, Any] = json.loads(last.pieces[0].with_name("summary.json").read_text(encoding="utf-8"))
        if [told.pop(name) for name in ("key", "k", "seed")] != [last.key, last.k, last.seed]:
            return None
        fitted = Fitted(**cast(Any, {**told, "k": last.k}))
        return fitted if Palette.load(last.out).sha256 == fitted.sha256 else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _show(pieces: list[Piece], meter: Meter | None) -> None:
    if meter:
        tallies = [tally for piece in pieces if (tally := _counted(piece))]
        seen = sum(tally.seen for tally in tallies)
        total = pieces[0].tasks[0].images or (seen * len(pieces) // len(tallies) if tallies else None)
        meter.show(seen, sum(tally.rejected for tally in tallies), total)
