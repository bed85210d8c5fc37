"""Choose from a pool of web images those that are like ImageNet, and none that the evaluations use.

Five steps, each of which publishes what it makes in the directory WORK, under a name that is a hash of all that it
depends on. A run that was stopped, or one with other settings, finds the steps that are done already:

1. embedded-*  every image of the pool, of what it is to be like and of the evaluation sets is read once (`embed`)
2. model-*     the pool's clusters, those that are hit, and the sub-centroids (`clusters`)
3. scores-*    every image of the pool by these: outside, close to an evaluation set, how similar (`clusters`)
4. fates-*     of the images that are neither, those that an earlier one equals or resembles (`duplicates`)
5.             of the images left, the most similar ones, to the number wanted (`ranking`)

The pool is never in memory: a step holds a chunk of images, or a sample of bounded size. The result depends on the
images, their order and the settings alone, not on workers or on how often it was stopped.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.files.npz import publish_arrays, read_all_arrays, read_arrays
from data_prep.images.pieces import Piece
from data_prep.selection import clusters
from data_prep.selection.clusters import HitTask, Model, ScoreTask
from data_prep.selection.collections import Collection, Read, Reading, fingerprint, read_all
from data_prep.selection.embed import images
from data_prep.selection.embedders import Embedder
from data_prep.selection.file import Selection, write_selection
from data_prep.selection.pictures import Pictures
from data_prep.selection.ranking import Cut
from data_prep.selection.verdicts import FATES, KEPT, Scored, drop_duplicates, judge, threshold
from data_prep.workers import pool as executors
from data_prep.workers.run import Here, Meter, Place, Step, nothing
from data_prep.workers.slurm import refuse_pending
from igpt_ds.atomic import writing
from igpt_ds.errors import UserError
from igpt_ds.lock import Lock

UNREADABLE = "unreadable"
Stages = Callable[[str], AbstractContextManager[Meter]]


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        number: of images wanted.
        clusters: that the pool is divided into; None: by its size, see `data_prep.selection.clusters.clusters_for`.
        duplicate_distance: largest number of differing bits of the perceptual hashes of near duplicates.
        evaluation_distance: the same, of images that count as close to an evaluation set.
        seed: of the samples and the clustering.
    """

    number: int
    clusters: int | None = None
    duplicate_distance: int = 4
    evaluation_distance: int = 6
    seed: int = 0


class Selected(NamedTuple):
    """A selection, and what is to be told of it.

    Attributes:
        cut: where the similarity was cut; None where all that were left are kept.
        unreadable: the pool's images that cannot be read, by reason.
        hit, clusters: how many of how many clusters were kept.
        pictures: the files of the histogram and of the contact sheet.
    """

    selection: Selection
    cut: Cut | None
    unreadable: Counter[str]
    hit: int
    clusters: int
    pictures: list[Path]


@dataclass(frozen=True)
class Job:
    """A selection to be made.

    Attributes:
        pool: what is chosen from.
        like: what its images are to be like.
        evaluations: whose images, and images close to them, are dropped.
        work: directory for the steps' results.
    """

    pool: Collection
    like: list[Collection]
    evaluations: list[Collection]
    embedder: Embedder
    settings: Settings
    work: Path

    def run(self, out: Path, place: Place, stages: Stages) -> Selected | None:
        """Do the steps that are not done; publish the selection, and a histogram and a contact sheet beside it.

        Args:
            place: where tasks run.
            stages: opens a meter for the step of that name.

        Returns:
            None: jobs of a cluster have still to end; then the same call goes on.
        """
        if isinstance(place, Here):
            refuse_pending(self.work / "jobs", self.work)
        with _alone(self.work):
            found = [each.pieces() for each in self._collections]
            fitted = self._fitted(found[1 : 1 + len(self.like)], stages)
            readings = [
                Reading(collection, its, *(fitted if number <= len(self.like) else (None, None)))
                for number, (collection, its) in enumerate(zip(self._collections, found, strict=True))
            ]
            with stages("read") as meter:
                reads = read_all(readings, self.work, place, meter)
            if reads is None:
                return None
            pool, like = reads[0], reads[1 : 1 + len(self.like)]
            model = self._model(pool, like, place, stages)
            scored = self._score(pool, reads[1 + len(like) :], model, place, stages)
            if scored is None:
                return None
            scores, distance = scored[0].scores.parent.name, self.settings.duplicate_distance
            fates = self.work / f"fates-{fingerprint(scores, distance)}.u8"
            if not fates.exists():
                with stages("find duplicates"):
                    drop_duplicates(scored, fates, distance, _scratch(self.work))
            with stages("write"):
                return self._publish(out, reads, scored, fates, Model.load(model))

    @property
    def _collections(self) -> list[Collection]:
        return [self.pool, *self.like, *self.evaluations]

    def _fitted(self, like: list[list[Piece]], stages: Stages) -> tuple[Embedder, str]:
        """The embedder, fitted where it needs it to what the pool is to be like; and what its vectors depend on."""
        record = self.embedder.record()
        if not self.embedder.fit_images:
            return self.embedder, fingerprint(record)
        identity = fingerprint(
            record, [(each.where, [piece.digest for piece in its]) for each, its in zip(self.like, like, strict=True)]
        )
        path = self.work / f"embedder-{identity}.npz"
        if not path.exists():
            share = -(-self.embedder.fit_images // len(like))

            def sample() -> Iterator[Any]:
                for collection, its in zip(self.like, like, strict=True):
                    yield from images(collection.source, its, share)

            with stages("fit the embedder"):
                publish_arrays(path, **self.embedder.fit(sample()))
        return self.embedder.fitted(read_all_arrays(path)), identity

    def _model(self, pool: Read, like: list[Read], place: Place, stages: Stages) -> Path:
        chunks = [chunk for each in like for chunk in each.chunks]
        number = self.settings.clusters or clusters.clusters_for(pool.images)
        if number > pool.images:
            raise UserError(f"--clusters {number}: the pool has {pool.images} images that can be read: choose fewer")
        seed = self.settings.seed
        identity = fingerprint(pool.identity, [each.identity for each in like], number, seed, clusters.library())
        path = self.work / f"model-{identity}.npz"
        if path.exists():
            return path
        with stages("cluster") as meter:
            centres = self.work / f"centres-{identity}.npz"
            if not centres.exists():
                points = clusters.sample(pool.chunks, clusters.POINTS * number, seed)
                publish_arrays(centres, centres=clusters.k_means(points, number, seed))
            found = clusters.centroids_for(sum(each.images for each in like))
            points = clusters.sample(chunks, clusters.POINTS * found, seed)
            centroids = clusters.centroids(points, found, seed)
            hit = np.zeros(number, np.int64)
            tasks = [HitTask(chunk, centres) for chunk in chunks]
            total = sum(chunk.rows for chunk in chunks)

            def watch(read: int, rejected: int) -> None:
                meter.show(read, rejected, total)

            for counts in executors.run(clusters.hits, tasks, place.executor, watch):
                hit += counts
            Model(read_arrays(centres, "centres")[0], hit > 0, centroids).save(path)
        return path

    def _score(
        self, pool: Read, evaluations: list[Read], model: Path, place: Place, stages: Stages
    ) -> list[Scored] | None:
        distance = self.settings.evaluation_distance
        directory = self.work / f"scores-{fingerprint(model.name, [each.identity for each in evaluations], distance)}"
        hashes = None
        if evaluations:
            hashes = directory / "evaluation.npz"
            if not hashes.exists():
                found = [chunk.read("hash")[0] for each in evaluations for chunk in each.chunks]
                publish_arrays(hashes, hashes=np.unique(np.concatenate(found)))
        scored = [Scored(chunk, directory / chunk.path.name) for chunk in pool.chunks]
        tasks = [ScoreTask(each.chunk, each.scores, model, hashes, distance) for each in scored]
        step = Step(
            "parts are not scored",
            tasks,
            clusters.score,
            clusters.scored,
            nothing,
            images=pool.images,
            readings=pool.images,
        )
        with stages("score") as meter:
            return scored if place.run(step, meter) else None

    def _publish(self, out: Path, reads: list[Read], scored: list[Scored], fates: Path, model: Model) -> Selected:
        pool, like, evaluations = reads[0], reads[1 : 1 + len(self.like)], reads[1 + len(self.like) :]
        where = threshold(scored, fates, self.settings.number)
        counts = np.zeros(len(FATES), np.int64)
        pictures = Pictures()
        for judged in judge(scored, fates, where):
            counts += np.bincount(judged.fates, minlength=len(FATES))
            pictures.add(judged)
        unreadable = pool.unreadable
        dropped = {UNREADABLE: unreadable.total(), **dict(zip(FATES[1:], counts[1:].tolist(), strict=True))}
        settings = {
            **asdict(self.settings),
            "embedder": self.embedder.record(),
            "clusters": len(model.centres),
            "clusters_hit": int(model.hit.sum()),
            "centroids": len(model.centroids),
            "threshold": where.threshold if where else None,
            "like": [each.record() for each in like],
            "evaluations": [each.record() for each in evaluations],
            "unreadable": dict(sorted(unreadable.items())),
            "versions": {
                **{name: version(name) for name in ("numpy", "pillow")},
                clusters.library(): clusters.library_version(),
            },
        }
        selection = write_selection(
            out,
            pool.collection.source.name,
            _parts(pool, judge(scored, fates, where)),
            inputs=pool.images + unreadable.total(),
            dropped=dropped,
            settings=settings,
        )
        paths = [out.with_name(f"{out.stem}.{name}.png") for name in ("histogram", "sheet")]
        pictures.save(paths[0], paths[1], where)
        return Selected(selection, where, unreadable, settings["clusters_hit"], len(model.centres), paths)


def _parts(pool: Read, judged: Iterator[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The kept ids of each part, also where none is kept or none could be read."""
    pairs = zip(pool.pieces, pool.found, strict=True)
    for part, group in groupby(pairs, key=lambda pair: pair[0].part):
        kept = [np.empty(0, "S1")]
        for _, found in group:
            for chunk in found.chunks:
                its = next(judged)
                if its.chunk != chunk:
                    raise RuntimeError(f"{chunk.path}: judged out of order")
                kept.append(chunk.read("ids")[0][its.fates == KEPT])
        yield part, np.concatenate(kept)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second run out of the directory."""
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(work)
    try:
        yield
    finally:
        lock.release()


def _scratch(work: Path) -> Path:
    """An empty directory; what a killed run left there goes."""
    path = work / "scratch"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path
