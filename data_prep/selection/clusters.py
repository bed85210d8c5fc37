"""Which images of a pool are like those of another collection, from their embeddings.

1. k-means on a sample of the pool divides it into clusters; those that no image of the other collection falls into
   are left out ("outside").
2. k-means on a sample of the other collection gives its sub-centroids; an image is as similar as the cosine to the
   nearest of them.

The samples are of bounded size, and all else is done by the chunk (see `data_prep.selection.embed`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from data_prep.files.npz import publish_arrays, read_arrays
from data_prep.images.rejects import Tally
from data_prep.selection.embed import Chunk
from data_prep.selection.perceptual_hash import NearAny
from data_prep.workers.pool import count
from data_prep.workers.run import Done

POINTS = 64  # of the sample, a cluster
_MOST_CLUSTERS = 10_000
_MOST_CENTROIDS = 4096
_ROWS = 1024  # whose distances to all centres are in memory at a time


def library() -> str:
    """What k-means is done with: faiss where it is installed, else scikit-learn."""
    return "faiss" if find_spec("faiss") else "scikit-learn"


def library_version() -> str:
    """Of the library that k-means is done with."""
    if library() == "faiss":
        import faiss

        return str(faiss.__version__)
    return version("scikit-learn")


def clusters_for(images: int) -> int:
    """How many clusters a pool of so many images is divided into: POINTS of the sample for each, at most 10,000."""
    return max(1, min(_MOST_CLUSTERS, images // POINTS))


def centroids_for(images: int) -> int:
    """How many sub-centroids a collection of so many images gets: one for each 16, at most 4,096."""
    return max(1, min(_MOST_CENTROIDS, images // 16))


def sample(chunks: list[Chunk], number: int, seed: int) -> np.ndarray:
    """At most `number` of the vectors, at equal steps from a seeded start: float32 [number, dimension], of length 1."""
    total = sum(chunk.rows for chunk in chunks)
    number = min(number, total)
    start = seed * 0x9E3779B97F4A7C15 % total
    wanted = (np.arange(number) * total + start) // number
    found, first = [], 0
    for chunk in chunks:
        begin, end = np.searchsorted(wanted, [first, first + chunk.rows])
        if end > begin:
            (vectors,) = chunk.read("vectors")
            found.append(vectors[wanted[begin:end] - first])
        first += chunk.rows
    return _unit(np.concatenate(found))


def k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centres of clusters: float32 [n, dimension] -> float32 [k, dimension]."""
    if library() == "faiss":
        import faiss

        # Else it takes a sample of its own and complains about small ones.
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
        means = faiss.Kmeans(points.shape[1], k, niter=20, seed=seed % (1 << 31), **limits)
        means.train(points)
        return np.asarray(means.centroids, np.float32)
    from sklearn.cluster import MiniBatchKMeans

    # Threads add up in an order of their own, which shows in the last bits.
    with threadpool_limits(limits=1):
        fitted = MiniBatchKMeans(k, batch_size=8192, n_init=1, random_state=seed).fit(points)
    return np.asarray(fitted.cluster_centers_, np.float32)


class Model(NamedTuple):
    """What images are judged by.

    Attributes:
        centres: of the pool's clusters, float32 [k, dimension].
        hit: bool [k], whether any image of the other collection falls into the cluster.
        centroids: of the other collection, float32 [m, dimension], of length 1.
    """

    centres: np.ndarray
    hit: np.ndarray
    centroids: np.ndarray

    def save(self, path: Path) -> None:
        """Publish it."""
        publish_arrays(path, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Model":
        """Read it again."""
        return cls(*read_arrays(path, *cls._fields))


def centroids(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Directions of clusters: float32 [n, dimension] -> float32 [k, dimension], of length 1."""
    means = k_means(points, k, seed)
    # Opposite points have a mean without a direction; no image is similar to it.
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float32)


@dataclass(frozen=True)
class HitTask:
    """A chunk of the other collection, and where the pool's centres are."""

    chunk: Chunk
    centres: Path


def hits(task: HitTask) -> np.ndarray:
    """How many of the chunk's images fall into each of the pool's clusters: int64 [k]."""
    (vectors,) = task.chunk.read("vectors")
    (centres,) = read_arrays(task.centres, "centres")
    found = np.zeros(len(centres), np.int64)
    with threadpool_limits(limits=1):
        for block in _blocks(vectors):
            found += np.bincount(nearest(block, centres), minlength=len(centres))
    count(len(vectors), 0)
    return found


@dataclass(frozen=True)
class ScoreTask:
    """A chunk of the pool to be judged, and where everything is; small and picklable.

    Attributes:
        out: the file to publish.
        model: a `Model`'s file.
        evaluation: a file of the array `hashes`, perceptual hashes of the evaluation sets; None without any.
        distance: largest number of differing bits at which an image counts as close to an evaluation set.
    """

    chunk: Chunk
    out: Path
    model: Path
    evaluation: Path | None
    distance: int


def scored(task: ScoreTask) -> Done | None:
    """What a task that is done has read; None if it is not done."""
    return Done(Tally(task.chunk.rows), task.chunk.rows) if task.out.exists() else None


def score(task: ScoreTask) -> Done:
    """Publish of a chunk's images: outside, close: bool [n], and similarity: float32 [n]; nothing if it is there."""
    if done := scored(task):
        return done
    model = _model(task.model)
    vectors, hashes = task.chunk.read("vectors", "hash")
    outside, similarity = [], []
    with threadpool_limits(limits=1):
        for block in _blocks(vectors):
            outside.append(~model.hit[nearest(block, model.centres)])
            # Added to nothing, so that there is one zero only.
            similarity.append((block @ model.centroids.T).max(1) + np.float32(0))
    close = _evaluation(task.evaluation, task.distance)(hashes) if task.evaluation else np.zeros(len(hashes), bool)
    publish_arrays(
        task.out, outside=np.concatenate(outside), close=close, similarity=np.concatenate(similarity).astype("<f4")
    )
    count(len(vectors), 0)
    return Done(Tally(len(vectors)))


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre by Euclidean distance, the first of several: float32 [n, d], [k, d] -> int64 [n]."""
    found: np.ndarray = (vectors @ centres.T - (centres**2).sum(1) / 2).argmax(1)
    return found


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(vectors), _ROWS):
        yield _unit(vectors[first : first + _ROWS])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """float16 -> float32, of length 1 to the precision of the latter."""
    wide = vectors.astype(np.float32)
    scaled: np.ndarray = wide / np.sqrt((wide**2).sum(1, keepdims=True))
    return scaled


@lru_cache(maxsize=1)
def _model(path: Path) -> Model:
    return Model.load(path)


@lru_cache(maxsize=1)
def _evaluation(path: Path, distance: int) -> NearAny:
    return NearAny(read_arrays(path, "hashes")[0], distance)
