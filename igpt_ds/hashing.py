"""Integer hashing that is the same for ever: splitmix64, scalar and vectorised.

The order of the samples and the masks of masked pixel modelling are pure functions of a few integers (seed,
position, epoch, ...). NumPy and PyTorch may change their generators between versions; this arithmetic cannot
change. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), with the
finaliser constants of Vigna's reference `splitmix64.c`.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each element: the first output of the reference generator whose state is `x`.

    Args:
        x: uint64 array of any shape.

    Returns:
        uint64 array of the same shape. The map is a bijection: distinct inputs give distinct outputs.
    """
    # Arithmetic modulo 2^64 is meant; NumPy warns of it where the array has no dimensions.
    with np.errstate(over="ignore"):
        z = x + np.uint64(_GAMMA)
        z ^= z >> np.uint64(30)
        z *= np.uint64(_FIRST)
        z ^= z >> np.uint64(27)
        z *= np.uint64(_SECOND)
        z ^= z >> np.uint64(31)
    return z


def stable_hash(*values: int) -> int:
    """Mix integers, each taken modulo 2^64, into one in [0, 2^64); their order and number matter."""
    hashed = len(values)
    for value in values:
        z = ((hashed ^ (value & _MASK)) + _GAMMA) & _MASK
        z = ((z ^ (z >> 30)) * _FIRST) & _MASK
        z = ((z ^ (z >> 27)) * _SECOND) & _MASK
        hashed = z ^ (z >> 31)
    return hashed


def random_keys(seed: int, count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of the reference generator seeded with `seed`: uint64 [count], distinct."""
    steps = np.arange(count, dtype=np.uint64)
    steps *= np.uint64(_GAMMA)
    steps += np.uint64(seed & _MASK)
    return splitmix64(steps)
