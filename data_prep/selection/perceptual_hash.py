"""A 64-bit fingerprint of how an image looks, and an exact search for fingerprints that are close.

The hash (after Zauner 2010, "pHash"): the image as grey of 32 x 32, its two-dimensional cosine transform, the 64
lowest frequencies (in zigzag order, the constant left out), a bit each for being above their median. Scaling,
recompression and changes of brightness move few bits; cropping, turning and mirroring move many. As many bits are
set as not, so distances are even but for ties. The cosines are whole numbers and all sums stay below 2^53: the
hash of given pixels is the same on every machine.

`NearAny` answers whether a hash lies within d bits of any of a set, exactly (multi-index hashing, Norouzi et al.
2012): the bits are cut into four pieces; two hashes that differ in at most d bits differ in at most d // 4 bits in
one of the pieces, so a table per piece of all such neighbours finds every candidate.
"""

from itertools import combinations

import numpy as np
from PIL import Image

MAX_DISTANCE = 8  # beyond it the tables of neighbours outgrow what they save
_SIDE = 32
_BITS = 64
_PIECES, _WIDTH = 4, 16
_CANDIDATES = 1 << 20  # pairs that are compared at a time

_ZIGZAG = sorted(((u, v) for u in range(_SIDE) for v in range(_SIDE) if u + v > 0), key=lambda w: (sum(w), w))[:_BITS]
_ROWS, _COLUMNS = np.array(_ZIGZAG).T
_FREQUENCIES = np.arange(1 + max(_ROWS.max(), _COLUMNS.max()))
# Orthogonal, twelve bits and a sign each: [32, frequencies].
_COSINES = np.rint(
    np.where(_FREQUENCIES == 0, np.sqrt(0.5), 1.0)
    * np.cos(np.pi / _SIDE * np.outer(np.arange(_SIDE) + 0.5, _FREQUENCIES))
    * 4096
)


def small_grey(image: Image.Image) -> np.ndarray:
    """What an image is hashed by: RGB -> uint8 [32, 32]. This filter moves the fewest bits between sizes."""
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """Hashes of small grey images: uint8 [n, 32, 32] -> uint64 [n]; see `small_grey`."""
    spectrum = _COSINES.T @ images.astype(np.float64) @ _COSINES
    lowest = spectrum[:, _ROWS, _COLUMNS]
    ordered = np.sort(lowest, axis=1)
    # The median is the mean of the two in the middle: twice both sides, no half.
    above = 2 * lowest > (ordered[:, _BITS // 2 - 1] + ordered[:, _BITS // 2])[:, None]
    packed = np.ascontiguousarray(np.packbits(above, axis=1, bitorder="little"))
    return packed.view("<u8")[:, 0].astype(np.uint64)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes differ: uint64, broadcast together -> uint8."""
    x = np.bitwise_xor(a, b)
    if hasattr(np, "bitwise_count"):  # NumPy 2
        bits: np.ndarray = np.bitwise_count(x)
        return bits
    return np.unpackbits(x[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint8)


class NearAny:
    """Is a hash within so many bits (0 to 8) of any of a set of them?

    Args:
        hashes: uint64 [m], up to some millions: the tables take 16 bytes x m x neighbours, there being 1 neighbour
            up to distance 3, 17 up to 7 and 137 at 8.
        distance: largest number of differing bits that counts as near.
    """

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"distance {distance} is not within 0 and {MAX_DISTANCE}")
        self.hashes, self.distance = np.unique(hashes), distance
        errors = [bits for count in range(distance // _PIECES + 1) for bits in combinations(range(_WIDTH), count)]
        masks = np.array([sum(1 << bit for bit in bits) for bits in errors], np.uint16)
        self._tables = [self._table(piece, masks) for piece in range(_PIECES)]

    def _table(self, piece: int, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the neighbours of each value of the piece start, int64 [2^16 + 1]; who they are, int32."""
        keys = (_piece(self.hashes, piece)[:, None] ^ masks).reshape(-1)
        starts = np.zeros((1 << _WIDTH) + 1, np.int64)
        np.cumsum(np.bincount(keys, minlength=1 << _WIDTH), out=starts[1:])
        return starts, (np.argsort(keys, kind="stable") // len(masks)).astype(np.int32)

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] -> bool [n]."""
        found = np.zeros(len(hashes), bool)
        for piece, (starts, neighbours) in enumerate(self._tables):
            values = _piece(hashes, piece).astype(np.int64)
            begin, counts = starts[values], starts[values + 1] - starts[values]
            rows = np.flatnonzero((counts > 0) & ~found)
            while len(rows):
                # As many queries as fill the budget, one at least.
                now = max(1, int(np.searchsorted(np.cumsum(counts[rows]), _CANDIDATES, "right")))
                rows, turn = rows[now:], rows[:now]
                which = np.repeat(turn, counts[turn])
                within = np.arange(len(which)) - np.repeat(np.cumsum(counts[turn]) - counts[turn], counts[turn])
                candidates = self.hashes[neighbours[begin[which] + within]]
                found[which[distance(hashes[which], candidates) <= self.distance]] = True
        return found


def _piece(hashes: np.ndarray, piece: int) -> np.ndarray:
    return (hashes >> np.uint64(_WIDTH * piece)).astype(np.uint16)
