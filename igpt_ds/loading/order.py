"""The order of the samples: a pure function from the position in training to (source, shard, row).

    position p --quotas--> source, its own position q --epochs--> view, t --windows--> shard, row

1. Quotas. Sources are mixed by integer weights. A cycle has W = sum(weights) positions, of which source i
   owns weights[i], spread evenly: its j-th slot lies at (j + 1/2) / weights[i] of the cycle.
2. Epochs. A source whose epoch has R rows is at row t = q mod R of its epoch e = q // R. Augmented views are
   copies of the same images; epoch e reads view e mod K.
3. Windows. The shards of that view are permuted, then cut into windows of a few shards, and the rows of each
   window are permuted. So a lookup sorts one window, never the epoch, and reads touch a few files at a time.

Every permutation is keyed by (seed, source, epoch[, window]) alone. Hence each row of a source is seen
exactly once in each of its epochs, whatever the world size, the workers and the micro-batch, and the whole
state of the data is one integer: the position. `Order.fingerprint` tells whether two runs mean the same
order by it.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ds.errors import UserError
from igpt_ds.hashing import random_keys, stable_hash

# Slots of a cycle when the weights follow the row counts, and the most that named weights may ask for.
_AUTOMATIC_SLOTS = 4096
MOST_SLOTS = 1 << 16
# Two neighbours: micro-batches of several ranks or workers may straddle the border of a window.
_WINDOWS_KEPT = 2
# Set apart the two uses of one (seed, source, epoch).
_SHARDS, _ROWS = 0, 1


@dataclass(frozen=True)
class SourceRows:
    """What the order must know of one source.

    Attributes:
        name: what messages call it; a part of the fingerprint, so not a path.
        shards: (rows, view) of each shard, in the manifest's order.
        digest: identifies the rows themselves (a hash over the shards' sha256); a part of the fingerprint.
    """

    name: str
    shards: tuple[tuple[int, int], ...]
    digest: str = ""


class _Window(NamedTuple):
    """Rows of one window: position q in [start, stop) of the source is the (shard, row) places[q - start]."""

    start: int
    stop: int
    places: NDArray[np.int64]  # [stop - start, 2]


class _SourceOrder:
    """The order of one source: its position q to (shard, row). Caching never changes an answer."""

    def __init__(self, seed: int, index: int, source: SourceRows, window: int) -> None:
        self._key = (seed, index)
        self._window_shards = window
        self._shards_of_view = _shards_of_views(source)
        self._rows_of_shard = np.array(source.shards, np.int64)[:, 0]
        self.epoch_rows = int(self._rows_of_shard[self._shards_of_view[0]].sum())
        self._current = _Window(0, 0, np.empty((0, 2), np.int64))
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def lookup(self, q: int) -> tuple[int, int]:
        """(shard, row) at position q of the source."""
        window = self._current
        if not window.start <= q < window.stop:
            window = self._current = self._find_window(q)
        shard, row = window.places[q - window.start].tolist()
        return shard, row

    def places(self, q: NDArray[np.int64]) -> NDArray[np.int64]:
        """(shard, row) at ascending positions of the source: [len(q), 2]."""
        parts = []
        while len(q):
            window = self._current = self._find_window(int(q[0]))
            here = int(np.searchsorted(q, window.stop))
            parts.append(window.places.take(q[:here] - window.start, axis=0))
            q = q[here:]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _find_window(self, q: int) -> _Window:
        epoch, t = divmod(q, self.epoch_rows)
        shards, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, t, "right")) - 1
        if (epoch, number) not in self._windows:
            first = number * self._window_shards
            chosen = shards[first : first + self._window_shards]
            rows = self._rows_of_shard[chosen].tolist()
            sorted_places = np.stack([np.repeat(chosen, rows), np.concatenate([np.arange(count) for count in rows])], 1)
            start = epoch * self.epoch_rows + int(starts[number])
            permutation = _permutation(stable_hash(*self._key, epoch, _ROWS, number), len(sorted_places))
            places = sorted_places.take(permutation, axis=0)
            self._windows[epoch, number] = _Window(start, start + len(places), places)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end((epoch, number))
        return self._windows[epoch, number]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of an epoch, and the epoch's row at which each window begins."""
        if epoch not in self._epochs:
            of_view = self._shards_of_view[epoch % len(self._shards_of_view)]
            shards = of_view.take(_permutation(stable_hash(*self._key, epoch, _SHARDS), len(of_view)))
            rows = self._rows_of_shard.take(shards)
            self._epochs[epoch] = shards, (rows.cumsum() - rows)[:: self._window_shards]
            if len(self._epochs) > _WINDOWS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


@dataclass(frozen=True)
class LeftOut:
    """Batches that are never trained on: sorted, disjoint (first, last + 1) in the numbering of the data order."""

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, spans: Iterable[Sequence[int]]) -> "LeftOut":
        """The union of any spans."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((int(first), int(last)) for first, last in spans):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            elif first < last:
                merged.append((first, last))
        return cls(tuple(merged))

    def batch(self, step: int) -> int:
        """The batch that the update after `step` updates is made from: the step-th that is not left out."""
        for first, last in self.spans:
            if step < first:
                break
            step += last - first
        return step


NOTHING_LEFT_OUT = LeftOut()


class Order:
    """`order(p) -> (source, shard, row)` for every position p >= 0; see the module's docstring.

    Args:
        seed: any integer (taken modulo 2^64).
        sources: at least one, none empty; the views of a source have equally many rows.
        weights: positive integers, one per source (only their ratios count); None follows the row counts.
        window: shards whose rows are shuffled together.
    """

    def __init__(
        self, seed: int, sources: Sequence[SourceRows], weights: Sequence[int] | None = None, window: int = 16
    ) -> None:
        if not sources:
            raise UserError("sources: none is given: name at least one dataset")
        if window < 1:
            raise UserError(f"window: {window} shards is too few: use 1 or more")
        self.seed = seed
        self.sources = tuple(sources)
        self.window = window
        self._orders = [_SourceOrder(seed, i, source, window) for i, source in enumerate(sources)]
        rows = [source.epoch_rows for source in self._orders]
        self.weights = _by_row_count(rows) if weights is None else _reduced(weights, self.sources)
        self._slots = _interleave(self.weights)
        self._slot_table = np.array(self._slots, np.int64)

    def __call__(self, position: int) -> tuple[int, int, int]:
        """(source, shard, row): indices into the sources, the source's shards and the shard's rows."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        cycle, slot = divmod(position, len(self._slots))
        source, rank = self._slots[slot]
        shard, row = self._orders[source].lookup(cycle * self.weights[source] + rank)
        return source, shard, row

    def places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """`self(p)` for ascending positions, at a fraction of the time: int64 [len(positions), 3]."""
        if not len(positions) or positions[0] < 0 or (np.diff(positions) <= 0).any():
            raise ValueError(f"positions {positions} do not ascend from 0 or more")
        places = np.empty((len(positions), 3), np.int64)
        if len(self.sources) == 1:
            places[:, 0], places[:, 1:] = 0, self._orders[0].places(positions)
            return places
        cycle, slot = np.divmod(positions, len(self._slots))
        places[:, 0], ranks = self._slot_table[slot].T
        for source, order in enumerate(self._orders):
            here = places[:, 0] == source
            if here.any():
                places[here, 1:] = order.places(cycle[here] * self.weights[source] + ranks[here])
        return places

    def epoch_rows(self, source: int) -> int:
        """Rows of one epoch (one view) of a source."""
        return self._orders[source].epoch_rows

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that the order depends on: equal fingerprints, equal orders."""
        facts = {
            "order": 1,
            "seed": self.seed,
            "sources": [[source.name, source.digest, source.shards] for source in self.sources],
            "weights": self.weights,
            "window": self.window,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[type["Order"], tuple[object, ...]]:
        # Caches of megabytes need not travel to the workers.
        return Order, (self.seed, self.sources, self.weights, self.window)


def _permutation(key: int, count: int) -> NDArray[np.int64]:
    """What sorts `count` random keys: int64 [count]."""
    keys = random_keys(key, count)
    permutation: NDArray[np.int64] = np.arange(count)
    # NumPy sorts 16 bits by radix, so that four such sorts take a quarter of the time of sorting 64 bits at once.
    for shift in (0, 16, 32, 48):
        digits = (keys >> np.uint64(shift)).astype(np.uint16)
        permutation = permutation.take(digits.take(permutation).argsort(kind="stable"))
    return permutation


def _shards_of_views(source: SourceRows) -> list[NDArray[np.int64]]:
    """Shard indices of each view, checked: views 0 to K - 1, equally many rows, not none."""
    views = 1 + max((view for _, view in source.shards), default=0)
    shards: list[list[int]] = [[] for _ in range(views)]
    rows = [0] * views
    for shard, (count, view) in enumerate(source.shards):
        shards[view].append(shard)
        rows[view] += count
    if not any(rows):
        raise UserError(f"{source.name}: the dataset has no rows: leave it out or build it again")
    for view, count in enumerate(rows):
        if count != rows[0]:
            raise UserError(
                f"{source.name}: view {view} has {count} rows, view 0 has {rows[0]}: build the dataset again"
            )
    return [np.array(of_view, np.int64) for of_view in shards]


def _reduced(weights: Sequence[int], sources: Sequence[SourceRows]) -> tuple[int, ...]:
    """Named weights, checked, without their common divisor (which changes nothing in the order)."""
    if len(weights) != len(sources):
        raise UserError(
            f"weights: {len(weights)} given for {len(sources)} sources: give one positive integer per source"
        )
    for weight, source in zip(weights, sources, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
            raise UserError(
                f"weights: {weight!r} for {source.name} is not a positive integer: give one, or leave the source out"
            )
    divisor = math.gcd(*weights)
    reduced = tuple(weight // divisor for weight in weights)
    if sum(reduced) > MOST_SLOTS:
        raise UserError(
            f"weights: their sum {sum(reduced)} (common divisor removed) is above {MOST_SLOTS}: use smaller integers"
        )
    return reduced


def _by_row_count(rows: Sequence[int]) -> tuple[int, ...]:
    """Weights as the row counts, rounded to a cycle of at most 4096 slots; each source has at least one."""
    if len(rows) > _AUTOMATIC_SLOTS:
        raise UserError(f"sources: {len(rows)} are more than {_AUTOMATIC_SLOTS}: give their weights")
    total = sum(rows)
    weights = list(rows)
    if total // math.gcd(*rows) > _AUTOMATIC_SLOTS:
        weights = [max(1, (2 * _AUTOMATIC_SLOTS * count + total) // (2 * total)) for count in rows]
        while sum(weights) > _AUTOMATIC_SLOTS:
            weights[weights.index(max(weights))] -= 1
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def _interleave(weights: Sequence[int]) -> list[tuple[int, int]]:
    """(source, rank among the source's slots) of each slot of a cycle, every source spread evenly."""
    slots = [((2 * j + 1) / (2 * weight), i, j) for i, weight in enumerate(weights) for j in range(weight)]
    return [(i, j) for _, i, j in sorted(slots)]
