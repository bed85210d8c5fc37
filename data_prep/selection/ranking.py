"""The best of any number of images, exactly, without sorting them all.

A float32 as whole number keeps its order: the first pass counts the numbers by their upper 16 bits, the second one
those of the decisive bin by their lower 16 bits. Memory is two tables of 65,536 counts.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """Whatever is above `threshold` is in, and of what equals it the first `ties`."""

    threshold: float
    ties: int


def cut(values: Callable[[], Iterator[np.ndarray]], number: int) -> Cut | None:
    """Where to cut for the `number` largest values; None where there are no more than that.

    Args:
        values: gives all values by the chunk, float32 [n], finite; called twice.
        number: of values wanted, at least 1.
    """
    upper = np.zeros(1 << 16, np.int64)
    for chunk in values():
        upper += np.bincount(_ordered(chunk) >> 16, minlength=1 << 16)
    if upper.sum() <= number:
        return None
    bin_upper, left = _bin(upper, number)
    lower = np.zeros(1 << 16, np.int64)
    for chunk in values():
        keys = _ordered(chunk)
        lower += np.bincount(keys[keys >> 16 == bin_upper] & 0xFFFF, minlength=1 << 16)
    bin_lower, ties = _bin(lower, left)
    key = bin_upper << 16 | bin_lower
    bits = np.uint32(key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF)
    return Cut(float(bits.view(np.float32)), ties)


def _bin(counts: np.ndarray, number: int) -> tuple[int, int]:
    """The bin in which the number-th largest lies, and how many of the bin are among the largest."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, number))
    return len(counts) - 1 - place, number - (int(above[place - 1]) if place else 0)


def _ordered(values: np.ndarray) -> np.ndarray:
    """float32 -> int64 from 0 to 2^32 - 1, in the same order."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    keys: np.ndarray = np.where(bits & 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return keys
