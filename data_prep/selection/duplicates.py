"""Exact and near duplicates among any number of images, in bounded memory.

Records are scattered over files by a hash of the key that duplicates share; each file is then loaded, sorted and
compared on its own (`_scattered`). The disk holds one copy of the records at a time, memory one file's.

- `exact_duplicates`: the same sha256 as an earlier image.
- `near_duplicates`: a perceptual hash within d bits of an earlier image's, whether or not that one is dropped
  itself. The answer does not depend on the way it is found, and the first of each family always stays. The
  search is exact: the 64 bits are cut into d + 2 pieces; hashes that differ in at most d bits agree in at least
  two of them, so for every pair of pieces those that agree in both are compared.

The order of the images is that of their indices.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_prep.selection.perceptual_hash import distance
from igpt_ds.atomic import writing

MEMORY = 64 << 20  # bytes of records that are sorted at a time; sorting takes several times as much
MAX_NEAR = 6  # of the distance: 28 pairs of pieces of 8 bits
_EXACT = np.dtype([("sha256", "<u8", (4,)), ("index", "<i8")])
_HASHED = np.dtype([("hash", "<u8"), ("index", "<i8")])
_MIX = np.uint64(0x9E3779B97F4A7C15)


def exact_duplicates(
    images: Iterator[tuple[np.ndarray, np.ndarray]], total: int, scratch: Path
) -> Iterator[np.ndarray]:
    """The indices of images whose bytes an earlier image has.

    Args:
        images: (sha256 uint8 [n, 32], index int64 [n]) by the chunk.
        total: an upper bound of the number of images.
        scratch: a directory for temporary files, 40 bytes an image.

    Returns:
        int64 arrays, sorted each, without repetition among them.
    """

    def records() -> Iterator[np.ndarray]:
        for sha256, index in images:
            chunk = np.empty(len(index), _EXACT)
            chunk["sha256"], chunk["index"] = np.ascontiguousarray(sha256).view("<u8"), index
            yield chunk

    for load in _scattered(records(), total, lambda r: r["sha256"][:, 0], _EXACT, scratch):
        for repeated, _ in _repeated(load, _EXACT, lambda r: r["sha256"]):
            yield repeated


def near_duplicates(
    images: Iterator[tuple[np.ndarray, np.ndarray]], total: int, distance: int, scratch: Path
) -> Iterator[np.ndarray]:
    """The indices of images that look like an earlier one.

    Args:
        images: (perceptual hash uint64 [n], index int64 [n]) by the chunk.
        total: an upper bound of the number of images.
        distance: largest number of differing bits that counts as near, 0 to 6.
        scratch: a directory for temporary files, 32 bytes an image.

    Returns:
        int64 arrays, sorted each; an index may be in several of them.
    """
    if not 0 <= distance <= MAX_NEAR:
        raise ValueError(f"distance {distance} is not within 0 and {MAX_NEAR}")

    def records() -> Iterator[np.ndarray]:
        for hashes, index in images:
            chunk = np.empty(len(index), _HASHED)
            chunk["hash"], chunk["index"] = hashes, index
            yield chunk

    with writing(scratch), TemporaryDirectory(dir=scratch) as directory:
        # One of each hash, the first, stands for all of them: families of a million copies cost no more than one.
        kept_path = Path(directory) / "firsts"
        with kept_path.open("wb") as file:
            for load in _scattered(records(), total, lambda r: r["hash"], _HASHED, Path(directory)):
                kept = np.empty(0, _HASHED)
                for repeated, firsts in _repeated(load, _HASHED, lambda r: r["hash"][:, None]):
                    kept = firsts
                    yield repeated
                kept.tofile(file)
        count = kept_path.stat().st_size // _HASHED.itemsize
        for mask in _pairs_of_pieces(distance) if distance else []:
            representatives = _blocks(kept_path, _HASHED)
            for load in _scattered(representatives, count, partial(_masked, mask), _HASHED, Path(directory)):
                yield _later_of_pairs(np.fromfile(load, _HASHED), mask, distance)


def _masked(mask: np.uint64, records: np.ndarray) -> np.ndarray:
    keys: np.ndarray = records["hash"] & mask
    return keys


def _repeated(
    load: Path, kind: np.dtype, words: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """By the block: indices of records whose words [n, w] an earlier one has, and the first records of all so far.

    By the block, because a load may be far larger than the others: that of one image in a million copies.
    """
    firsts = np.empty(0, kind)
    for block in _blocks(load, kind):
        found = np.concatenate([firsts, block])
        key = words(found)
        order = np.lexsort((found["index"], *key.T))
        same = np.zeros(len(found), bool)
        same[1:] = (key[order[1:]] == key[order[:-1]]).all(1)
        firsts = found[order[~same]]
        yield np.sort(found["index"][order[same]]), firsts


def _pairs_of_pieces(distance: int) -> list[np.uint64]:
    """Masks of the bits in which pairs are to agree: for any distance + 2 pieces, two of them."""
    ends = np.linspace(0, 64, distance + 3).astype(int).tolist()
    pieces = [(1 << last) - (1 << first) for first, last in pairwise(ends)]
    return [np.uint64(a | b) for a, b in combinations(pieces, 2)]


def _later_of_pairs(records: np.ndarray, mask: np.uint64, most: int) -> np.ndarray:
    """Of all pairs that agree under the mask and are near, the later ones' indices, sorted: int64."""
    records = records[np.argsort(_masked(mask, records), kind="stable")]
    keys, hashes, index = _masked(mask, records), records["hash"], records["index"]
    dropped = np.zeros(len(records), bool)
    # Equal keys lie together: compare each with its next, its next but one, and so on, while any pair is left.
    left: np.ndarray = np.arange(len(records), dtype=np.int32)
    step = 0
    while len(left):
        step += 1
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        near = left[distance(hashes[left], hashes[left + step]) <= most]
        dropped[np.where(index[near] > index[near + step], near, near + step)] = True
    return np.sort(index[dropped])


def _scattered(
    chunks: Iterator[np.ndarray],
    total: int,
    key: Callable[[np.ndarray], np.ndarray],
    kind: np.dtype,
    scratch: Path,
) -> Iterator[Path]:
    """Files of about MEMORY bytes of records, those of one key together and in their order; gone when passed."""
    loads = max(1, -(-total * kind.itemsize // MEMORY))
    with writing(scratch), TemporaryDirectory(dir=scratch) as directory:
        paths = [Path(directory) / str(load) for load in range(loads)]
        files = [path.open("wb", buffering=0) for path in paths]
        try:
            for chunk in chunks:
                # The high half of the product depends on all bits of the key.
                where = (((key(chunk) * _MIX) >> np.uint64(32)) % np.uint64(loads)).astype(np.int64)
                ends = np.cumsum(np.bincount(where, minlength=loads))
                parts = np.split(chunk[np.argsort(where, kind="stable")], ends[:-1])
                for file, part in zip(files, parts, strict=True):
                    part.tofile(file)
        finally:
            for file in files:
                file.close()
        for path in paths:
            yield path
            path.unlink()


def _blocks(path: Path, kind: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, kind, max(1, MEMORY // kind.itemsize))):
            yield block
