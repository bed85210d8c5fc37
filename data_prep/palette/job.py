"""From a source to a palette: count colours, add the counts up, fit, publish.

While it works the counts lie in the folder OUT.work (see `data_prep.palette.count`), on a cluster beside the logs; what
was fitted is told in its summary.json, and the counts are then removed. On one machine the folder goes, too.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from data_prep.palette.count import ColourTask, add_up, count_colours, counted
from data_prep.palette.fit import distortion, fit
from data_prep.workers.run import Here, Meter, Place, Step
from data_prep.workers.slurm import refuse_pending
from igpt_ds.atomic import publish_text, writing
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.lock import Lock
from igpt_ds.reading import read_json


@dataclass(frozen=True)
class Fitted:
    """A palette that was published.

    Attributes:
        sha256: the palette's identity.
        k, unique: colours of the palette, and of the images.
        mse, rms_levels: see `data_prep.palette.fit.Distortion`.
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


def fit_palette(
    tasks: Sequence[ColourTask], *, k: int, seed: int, out: Path, place: Place, meter: Meter
) -> Fitted | None:
    """Count the tasks' images and fit a palette of k colours to them. Counted images are not counted again.

    Returns:
        None: jobs of a cluster have still to end.
    """
    first = tasks[0]
    work = first.path.parent
    inputs = hashlib.sha256(json.dumps([task.inputs for task in tasks]).encode()).hexdigest()
    last = _Fit([task.path for task in tasks], first.key, inputs, k, seed, out.resolve(), first.max_reject_rate)
    step = Step(
        "parts are not counted",
        tasks,
        count_colours,
        counted,
        last,
        last.made,
        images=first.images,
        readings=first.images,
        max_reject_rate=first.max_reject_rate,
    )
    if place.busy():
        return place.run(step, meter)
    if isinstance(place, Here):
        refuse_pending(work, out)
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(work)
    try:
        fitted = place.run(step, meter)
        if fitted and isinstance(place, Here):
            lock.require()
            shutil.rmtree(work)
    finally:
        lock.release()
    return fitted


@dataclass(frozen=True)
class _Fit:
    """The fit, when all is counted. Picklable: on a cluster it is the last job."""

    counts: list[Path]
    key: str
    inputs: str
    k: int
    seed: int
    out: Path
    allowed: float

    def __call__(self) -> Fitted:
        """Add up, fit, publish the palette, and only then forget the counts."""
        counts, tally = add_up(self.counts, self.key)
        tally.judge(self.allowed, tally.seen)
        if not counts.any():
            what = (
                f"all {tally.seen} images were rejected ({tally.table()})" if tally.seen else "the source has no images"
            )
            raise UserError(f"{self.out}: no palette: {what}: mend the path, or look at the images")
        palette = fit(counts, self.k, self.seed)
        palette.save(self.out)
        found, unique = distortion(counts, palette), int((counts > 0).sum())
        fitted = Fitted(palette.sha256, palette.k, unique, *found, tally.seen, tally.rejected, tally.table())
        summary = {"key": self.key, "inputs": self.inputs, "k": self.k, "seed": self.seed, **asdict(fitted)}
        publish_text(self._summary, json.dumps(summary, indent=1) + "\n")
        for path in self.counts:
            path.unlink()
        return fitted

    @property
    def _summary(self) -> Path:
        return self.counts[0].with_name("summary.json")

    def made(self) -> Fitted | None:
        """What an earlier run has fitted to the same counts."""
        try:
            told: dict[str, Any] = read_json(self._summary)
            mine = {"key": self.key, "inputs": self.inputs, "k": self.k, "seed": self.seed}
            if {name: told.pop(name) for name in mine} != mine:
                return None
            fitted = Fitted(**cast(Any, {**told, "k": self.k}))
            return fitted if Palette.load(self.out).sha256 == fitted.sha256 else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            return None
