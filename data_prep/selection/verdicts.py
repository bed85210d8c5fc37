"""What becomes of each image of a pool: the last steps of `data_prep.selection.job`, on scores instead of images.

An image that could be read has a number, its place in the order of the pool, and a fate, a byte. The fates lie in
one file, in the order of the images; memory holds a chunk's at a time.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.files.npz import read_arrays
from data_prep.selection.duplicates import exact_duplicates, near_duplicates
from data_prep.selection.embed import Chunk
from data_prep.selection.ranking import Cut, cut
from igpt_ds.atomic import publish_file, writing
from igpt_ds.errors import UserError

# In the order in which it is asked: an image that is outside and a duplicate counts as outside.
FATES = ("kept", "outside clusters", "close to evaluation", "exact duplicate", "near duplicate", "below threshold")
KEPT, OUTSIDE, CLOSE, EXACT, NEAR, BELOW = range(6)


class Scored(NamedTuple):
    """A chunk of the pool, and the file of its scores (see `data_prep.selection.clusters.score`)."""

    chunk: Chunk
    scores: Path


class Judged(NamedTuple):
    """A chunk of n images with their fates, uint8 [n], and similarities, float32 [n]."""

    chunk: Chunk
    fates: np.ndarray
    similarity: np.ndarray


def drop_duplicates(scored: list[Scored], out: Path, distance: int, scratch: Path) -> None:
    """Publish the fates of all images, but for the threshold, which is last: uint8 [images], no header.

    Args:
        distance: largest number of bits in which the hashes of near duplicates differ.
        scratch: an empty directory for temporary files, some 60 bytes an image.
    """
    total = sum(each.chunk.rows for each in scored)
    with writing(scratch):
        path = scratch / "fates"
        with path.open("xb") as file:
            for each in scored:
                outside, close = read_arrays(each.scores, "outside", "close")
                file.write(np.where(outside, OUTSIDE, np.where(close, CLOSE, KEPT)).astype(np.uint8).tobytes())
        fates = np.memmap(path, np.uint8, "r+", shape=(total,))
        for dropped in exact_duplicates(_left(scored, fates, "sha256"), total, scratch):
            fates[dropped] = EXACT
        for dropped in near_duplicates(_left(scored, fates, "hash"), total, distance, scratch):
            fates[dropped] = NEAR
        fates.flush()
    with publish_file(out) as target, path.open("rb") as file:
        shutil.copyfileobj(file, target, 1 << 20)
    path.unlink()


def _left(scored: list[Scored], fates: np.ndarray, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """An array of the images that are still kept, and their numbers, by the chunk."""
    first = 0
    for each in scored:
        rows = np.flatnonzero(fates[first : first + each.chunk.rows] == KEPT)
        (values,) = each.chunk.read(name)
        yield values[rows], rows + first
        first += each.chunk.rows


def threshold(scored: list[Scored], fates: Path, number: int) -> Cut | None:
    """Where the `number` most similar of the images that are left end; None where there are no more than that."""

    def values() -> Iterator[np.ndarray]:
        for judged in judge(scored, fates, None):
            yield judged.similarity[judged.fates == KEPT]

    return cut(values, number)


def judge(scored: list[Scored], fates: Path, where: Cut | None) -> Iterator[Judged]:
    """The chunks with their final fates, in order. Of equally similar images at the threshold the first are kept."""
    ties = where.ties if where else 0
    with fates.open("rb") as file:
        for each in scored:
            found = np.frombuffer(file.read(each.chunk.rows), np.uint8).copy()
            (similarity,) = read_arrays(each.scores, "similarity")
            whole = len(found) == len(similarity) == each.chunk.rows
            if not whole or found.max(initial=0) >= len(FATES):
                raise UserError(f"{fates}: damaged: remove it and give the same command again")
            if where:
                left = found == KEPT
                equal = np.flatnonzero(left & (similarity == np.float32(where.threshold)))
                found[left & (similarity < np.float32(where.threshold))] = BELOW
                found[equal[ties:]] = BELOW
                ties -= min(ties, len(equal))
            yield Judged(each.chunk, found, similarity)
