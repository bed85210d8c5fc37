"""Fit the palette: k-means over the colours of images, exact and reproducible to the byte.

1. Count how often each of the 2^24 colours occurs (`data_prep.palette.count`). Counts of parts add up to the counts of
   the whole, so the work can be split at will.
2. Find good starting centres on a coarse histogram: 6 bits a channel, each bin standing at the exact mean of
   its pixels with their number as weight, k-means++ and Lloyd iterations.
3. Finish by exact Lloyd iterations on the unique colours with their counts (`fit`).

Clustering unique colours with weights is clustering all pixels, at a fraction of the cost.
"""

from typing import NamedTuple

import numpy as np

from igpt_ds.dataset.palette import MAX_COLOURS, Palette
from igpt_ds.errors import UserError

_COARSE_ITERATIONS = 100
_EXACT_ITERATIONS = 30
_EASY = 1 << 22  # colours times k, up to which ten starts cost next to nothing


class Distortion(NamedTuple):
    """How far pixels are from their palette colours.

    `mse` is the mean over pixels of the squared Euclidean distance, in [-1, 1] units and summed over the
    channels; `rms_levels` the root of the mean square over pixels and channels, in 8-bit levels.
    """

    mse: float
    rms_levels: float


def fit(counts: np.ndarray, k: int, seed: int) -> Palette:
    """The palette of k colours for pixels with these counts, sorted by (red, green, blue).

    Args:
        counts: int64 [2^24] at r << 16 | g << 8 | b.
    """
    check_k(k)
    packed = np.flatnonzero(counts)
    if len(packed) < k:
        raise UserError(
            f"--k {k}: the images have only {len(packed)} unique colours: choose a k of at most {len(packed)}"
        )
    centres = _colours(packed)
    if len(packed) > k:
        centres = _cluster(packed, counts[packed].astype(np.float64), k, seed)
    centres = np.clip(centres, -1.0, 1.0).astype(np.float32)
    return Palette(centres[np.lexsort(centres.T[::-1])])


def check_k(k: int) -> None:
    """Before any image is read."""
    if not 1 <= k <= MAX_COLOURS:
        raise UserError(f"--k {k}: a palette has 1 to {MAX_COLOURS} colours: choose a k in that range")


def _cluster(packed: np.ndarray, weights: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    exact = _colours(packed)
    coarse, coarse_weights = exact, weights
    if len(packed) * k > _EASY:
        means, mean_weights = _coarse(packed, exact, weights)
        # Bins hide colours from one another: with few of them, start on the colours themselves.
        if len(means) >= 4 * k:
            coarse, coarse_weights = means, mean_weights
    starts = 10 if len(coarse) * k <= _EASY else 1
    # Threads add up partial sums in an order of their own, which shows in the last bits of the centres.
    with threadpool_limits(limits=1):
        start = KMeans(k, init="k-means++", n_init=starts, max_iter=_COARSE_ITERATIONS, random_state=seed).fit(
            coarse, sample_weight=coarse_weights
        )
        finish = KMeans(k, init=start.cluster_centers_, n_init=1, max_iter=_EXACT_ITERATIONS, tol=0.0).fit(
            exact, sample_weight=weights
        )
    centres: np.ndarray = finish.cluster_centers_
    return centres


def _coarse(packed: np.ndarray, exact: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means [bins, 3] and weights [bins] of the 6-bit bins that hold any colour."""
    bins = (packed >> 18 << 12) | (packed >> 10 & 63) << 6 | (packed >> 2 & 63)
    bin_weights = np.bincount(bins, weights, 1 << 18)
    sums = np.stack([np.bincount(bins, weights * channel, 1 << 18) for channel in exact.T], 1)
    used = bin_weights > 0
    return sums[used] / bin_weights[used, None], bin_weights[used]


def _levels(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], -1).astype(np.uint8)


def _colours(packed: np.ndarray) -> np.ndarray:
    return _levels(packed) / 127.5 - 1.0


def distortion(counts: np.ndarray, palette: Palette) -> Distortion:
    """Distortion of all counted pixels under the palette as it is saved and used."""
    packed = np.flatnonzero(counts)
    tokens = palette.encode(_levels(packed))
    squares = ((_colours(packed) - palette.colours[tokens]) ** 2).sum(-1)
    mse = float(np.average(squares, weights=counts[packed]))
    return Distortion(mse, float(np.sqrt(mse / 3)) * 127.5)
