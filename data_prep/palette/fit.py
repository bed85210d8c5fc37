"""Fit the palette: k-means over the colours of images, exact and reproducible to the byte.

1. Count how often each of the 2^24 colours occurs (`data_prep.palette.count`). Counts of parts add up to the counts of
   the whole, so the work can be split at will.
2. Cluster ever finer histograms, of 5, 6 and 7 bits a channel: each bin stands at the exact mean of its pixels, with
   their number as weight, and each histogram begins with the centres of the coarser one.
3. Finish on the unique colours with their counts.

Clustering unique colours with weights is clustering all pixels, at a fraction of the cost. Sums over colours are of
whole numbers, which no order changes, and only one thread works: the bytes depend on the counts and the seed alone.
"""

from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from igpt_ds.dataset.palette import MAX_COLOURS, Palette
from igpt_ds.errors import UserError

_BITS = (5, 6, 7)  # a channel, of the histograms
_GAIN = 1e-4  # of the distortion in a round, below which a histogram has told what it can
_MOST_ROUNDS = 300  # on a histogram
_LAST_ROUNDS = 2  # on the colours themselves: from there on a round gains less than half a thousandth
_STEP = 1.9  # of the way to its colours' mean that a centre goes, while that gains: half the rounds of 1.0
_EASY = 1 << 22  # colours times k, up to which ten starts on the colours themselves cost next to nothing
_EASY_ROUNDS = 30
_CHUNK = 1 << 20  # colours that are looked up at a time
_SLACK = 1e-9  # levels: far above the rounding of distances


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
    centres = _levels(packed).astype(np.float64)
    if len(packed) > k:
        centres = _cluster(packed, counts[packed].astype(np.float64), k, seed)
    centres = np.clip(centres / 127.5 - 1.0, -1.0, 1.0).astype(np.float32)
    return Palette(centres[np.lexsort(centres.T[::-1])])


def check_k(k: int) -> None:
    """Before any image is read."""
    if not 1 <= k <= MAX_COLOURS:
        raise UserError(f"--k {k}: a palette has 1 to {MAX_COLOURS} colours: choose a k in that range")


class _Weighted(NamedTuple):
    """Points [n, 3] in 8-bit levels, and the number of pixels [n] that each stands for."""

    points: np.ndarray
    weights: np.ndarray


def _cluster(packed: np.ndarray, weights: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centres [k, 3] of the colours' clusters, in 8-bit levels."""
    from sklearn.cluster import KMeans, kmeans_plusplus
    from threadpoolctl import threadpool_limits

    colours = _Weighted(_levels(packed).astype(np.float64), weights)
    # Threads of matrix products add up in an order of their own, which shows in the last bits.
    with threadpool_limits(limits=1), tqdm(desc="fit", unit=" rounds", disable=None, leave=False) as bar:
        if len(packed) * k <= _EASY:
            scaled = colours.points / 127.5 - 1.0
            easy = KMeans(k, n_init=10, max_iter=100, random_state=seed).fit(scaled, sample_weight=weights)
            return _rounds(colours, (easy.cluster_centers_ + 1.0) * 127.5, bar, _EASY_ROUNDS, gain=0.0, step=1.0)
        # Bins hide colours from one another: few of them are of no use.
        histograms = [found for bits in _BITS if len((found := _histogram(packed, weights, bits)).points) >= 4 * k]
        first = [*histograms, colours][0]
        centres, _ = kmeans_plusplus(first.points, k, sample_weight=first.weights, random_state=seed)
        for histogram in histograms:
            centres = _rounds(histogram, centres, bar, _MOST_ROUNDS, _GAIN, _STEP)
        return _rounds(colours, centres, bar, _LAST_ROUNDS if histograms else _EASY_ROUNDS, _GAIN, _STEP)


def _rounds(
    colours: _Weighted, centres: np.ndarray, bar: "tqdm[Any]", most: int, gain: float, step: float
) -> np.ndarray:
    """Lloyd's rounds: each colour belongs to its nearest centre, each centre goes to the mean of its colours.

    A colour whose second centre is farther than the first by more than both may have moved is not looked up again
    (Hamerly 2010, Making k-means even faster).

    Args:
        most: rounds.
        gain: share of the distortion, up to which a round's gain ends them.
        step: how far centres go, 1 being the mean; more is taken back to 1 where it does not gain.
    """
    from scipy.spatial import cKDTree

    points, weights = colours
    nearest, margin = np.zeros(len(points), np.int64), np.zeros(len(points))
    means, best, whole = centres, np.inf, float(weights @ np.square(points).sum(1))
    for _ in range(most):
        tree = cKDTree(centres)
        unsure = np.flatnonzero(margin <= _SLACK)
        for first in range(0, len(unsure), _CHUNK):
            some = unsure[first : first + _CHUNK]
            distances, found = tree.query(points[some], k=2)
            nearest[some], margin[some] = found[:, 0], distances[:, 1] - distances[:, 0]
        mass = np.bincount(nearest, weights, len(centres))
        sums = np.stack([np.bincount(nearest, weights * channel, len(centres)) for channel in points.T], 1)
        means = sums / np.maximum(mass, 1)[:, None]
        error = whole - float((sums * means).sum())
        if not mass.all():  # a centre without colours goes to where they are served worst
            far = np.argsort(weights * tree.query(points)[0] ** 2, kind="stable")
            means[mass == 0] = points[far[-int((mass == 0).sum()) :]]
        bar.set_postfix_str(f"{np.sqrt(max(error, 0) / weights.sum() / 3):.2f} levels", refresh=False)
        bar.update()
        if (1 - gain) * best <= error <= best and mass.all():
            break
        moved = means + (step - 1) * (means - centres) if error < best else means
        drift = np.sqrt(np.square(moved - centres).sum(1))
        margin -= drift[nearest] + drift.max()
        centres, best = moved, min(best, error)
    return means


def _histogram(packed: np.ndarray, weights: np.ndarray, bits: int) -> _Weighted:
    """The bins of so many bits a channel that hold any colour: their pixels' mean, and how many these are."""
    coarse = _levels(packed) >> (8 - bits)
    bins = coarse.astype(np.int64) @ (1 << bits * np.arange(3))
    pixels = np.bincount(bins, weights)
    sums = np.stack([np.bincount(bins, weights * channel) for channel in _levels(packed).T], 1)
    used = pixels > 0
    return _Weighted(sums[used] / pixels[used, None], pixels[used])


def _levels(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], -1).astype(np.uint8)


def distortion(counts: np.ndarray, palette: Palette) -> Distortion:
    """Distortion of all counted pixels under the palette as it is saved and used."""
    packed = np.flatnonzero(counts)
    levels = _levels(packed)
    squares = ((levels / 127.5 - 1.0 - palette.colours[palette.encode(levels)]) ** 2).sum(-1)
    mse = float(np.average(squares, weights=counts[packed]))
    return Distortion(mse, float(np.sqrt(mse / 3)) * 127.5)
