"""The sample order: every row once an epoch, whatever is mixed; against plain integers and literals."""

import itertools
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.errors import UserError
from igpt_ds.hashing import stable_hash
from igpt_ds.loading import order as order_module
from igpt_ds.loading.order import Order, SourceRows

VIEWS = SourceRows("views", ((5, 0), (4, 0), (4, 1), (5, 1)))
UNEVEN = SourceRows("uneven", ((7, 0), (1, 0), (12, 0), (3, 0), (8, 0)))
ONE_ROW = SourceRows("one", ((1, 0),))
MIXTURES = [
    ([UNEVEN], [1], 2),
    ([UNEVEN], [5], 100),
    ([VIEWS], None, 1),
    ([UNEVEN, VIEWS], [3, 2], 2),
    ([UNEVEN, VIEWS, ONE_ROW], [7, 1, 2], 3),
    ([ONE_ROW, UNEVEN], None, 4),
]


@pytest.mark.parametrize(("sources", "weights", "window"), MIXTURES)
def test_many_places_at_once_are_the_single_ones(
    sources: list[SourceRows], weights: list[int] | None, window: int
) -> None:
    holes = [SourceRows(s.name, ((0, 0), *s.shards, (0, 0)), s.digest) for s in sources]
    for given_sources in (sources, holes):
        order = Order(9, given_sources, weights, window)
        for first in (0, 1, 30, 61, 10**9):
            for count in (1, 2, 7, 64, 200):
                expected = [order(position) for position in range(first, first + count)]
                places = order.places(np.arange(first, first + count))
                assert places.dtype == np.int64
                assert [tuple(place) for place in places.tolist()] == expected
        # As of one rank of several, and over batches that are left out.
        apart = np.array([0, 1, 8, 9, 16, 17, 240, 241, 10**9])
        assert [tuple(place) for place in order.places(apart).tolist()] == [order(p) for p in apart.tolist()]
    for positions in ([-1, 0, 1], [], [3, 2], [4, 4]):
        with pytest.raises(ValueError, match="do not ascend"):
            order.places(np.array(positions, np.int64))


def rows_of_epoch(source: SourceRows, epoch: int) -> set[tuple[int, int]]:
    views = 1 + max(view for _, view in source.shards)
    return {
        (shard, row) for shard, (rows, view) in enumerate(source.shards) if view == epoch % views for row in range(rows)
    }


def streams(order: Order, epochs: int) -> list[list[tuple[int, int]]]:
    """Of each source its (shard, row) in order, until every source has gone through `epochs` epochs."""
    found: list[list[tuple[int, int]]] = [[] for _ in order.sources]
    for position in itertools.count():
        if all(len(rows) >= epochs * order.epoch_rows(i) for i, rows in enumerate(found)):
            return found
        source, shard, row = order(position)
        found[source].append((shard, row))
    raise AssertionError


def reference_stream(
    seed: int, sources: Sequence[SourceRows], weights: Sequence[int], window: int
) -> Iterator[tuple[int, int, int]]:
    """The definition, slowly: whole epochs in lists, the generator in plain integers, exact fractions."""
    mask = (1 << 64) - 1

    def keys(state: int) -> Iterator[int]:
        while True:
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = state
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    def shuffled(items: list, key: int) -> list:
        return [item for _, item in sorted(zip(keys(key), items, strict=False))]

    def source_stream(i: int) -> Iterator[tuple[int, int]]:
        views = 1 + max(view for _, view in sources[i].shards)
        for epoch in itertools.count():
            of_view = [k for k, (_, view) in enumerate(sources[i].shards) if view == epoch % views]
            shards = shuffled(of_view, stable_hash(seed, i, epoch, 0))
            for number, first in enumerate(range(0, len(shards), window)):
                chosen = shards[first : first + window]
                # The key of a row is its place in the window, so equal (shard, row) never meet.
                rows = [(shard, row) for shard in chosen for row in range(sources[i].shards[shard][0])]
                places = shuffled(list(range(len(rows))), stable_hash(seed, i, epoch, 1, number))
                yield from (rows[place] for place in places)

    slots = [(Fraction(2 * j + 1, 2 * weight), i) for i, weight in enumerate(weights) for j in range(weight)]
    of_source = [source_stream(i) for i in range(len(sources))]
    for _, i in itertools.cycle(sorted(slots)):
        yield (i, *next(of_source[i]))


@pytest.mark.parametrize(("sources", "weights", "window"), MIXTURES)
def test_every_row_once_an_epoch(sources: list[SourceRows], weights: list[int] | None, window: int) -> None:
    order = Order(3, sources, weights, window)
    for source, rows in zip(sources, streams(order, 4), strict=True):
        size = len(rows_of_epoch(source, 0))
        for epoch in range(4):
            seen = rows[epoch * size : (epoch + 1) * size]
            assert len(set(seen)) == size
            assert set(seen) == rows_of_epoch(source, epoch)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    window=st.integers(1, 7),
    seed=st.integers(-5, 5),
)
def test_equals_the_definition(sizes: list[list[int]], weights: list[int], window: int, seed: int) -> None:
    sources = [
        SourceRows(str(i), tuple((rows, view) for view in range(1 + i % 2) for rows in shards))
        for i, shards in enumerate(sizes)
    ]
    order = Order(seed, sources, weights[: len(sources)], window)
    expected = list(itertools.islice(reference_stream(seed, sources, weights[: len(sources)], window), 120))
    assert [order(position) for position in range(120)] == expected


def test_golden_order() -> None:
    order = Order(7, [VIEWS, UNEVEN], [2, 1], window=2)
    assert [order(position) for position in range(20)] == GOLDEN
    assert order.fingerprint == GOLDEN_FINGERPRINT


def test_a_pure_function_of_the_position() -> None:
    order = Order(5, [UNEVEN, VIEWS], [3, 1], window=2)
    stream = [order(position) for position in range(300)]
    jumps = np.random.default_rng(0).permutation(300).tolist()
    assert [order(position) for position in jumps] == [stream[position] for position in jumps]
    assert [Order(5, [UNEVEN, VIEWS], [3, 1], window=2)(position) for position in range(300)] == stream
    with pytest.raises(ValueError, match="negative"):
        order(-1)


def test_seeds_epochs_and_sources_differ() -> None:
    source = SourceRows("a", ((50, 0),) * 6)
    first, second = (streams(Order(seed, [source], window=2), 2)[0] for seed in (0, 1))
    assert first[:300] != second[:300]
    assert first[:300] != first[300:600]
    assert [shard for shard, _ in first[:300]] != [shard for shard, _ in first[300:600]]
    twins = streams(Order(0, [source, source], [1, 1], window=2), 1)
    assert twins[0] != twins[1]


@pytest.mark.parametrize("weights", [[1, 1], [5, 2], [1, 9], [7, 7, 3], [100, 1, 13]])
def test_quotas_are_exact_and_even(weights: list[int]) -> None:
    sources = [SourceRows(str(i), ((11 + i, 0),)) for i in range(len(weights))]
    order = Order(0, sources, weights)
    cycle = sum(weights)
    chosen = [order(position)[0] for position in range(3 * cycle)]
    for k in range(3):
        counts = Counter(chosen[k * cycle : (k + 1) * cycle])
        assert [counts[i] for i in range(len(weights))] == weights
    # Nowhere is a source more than a slot or so away from its share.
    for i, weight in enumerate(weights):
        had = np.cumsum(np.array(chosen) == i)
        due = np.arange(1, len(chosen) + 1) * weight / cycle
        assert np.abs(had - due).max() < len(weights)


def test_common_divisors_of_weights_change_nothing() -> None:
    plain, doubled = (Order(0, [UNEVEN, VIEWS], weights) for weights in ([3, 2], [600, 400]))
    assert [plain(position) for position in range(200)] == [doubled(position) for position in range(200)]
    assert plain.fingerprint == doubled.fingerprint


def test_weights_follow_the_row_counts() -> None:
    assert Order(0, [UNEVEN, VIEWS, ONE_ROW]).weights == (31, 9, 1)
    web, imagenet, dot = (
        SourceRows(name, ((rows, 0),)) for name, rows in [("w", 99_999_999), ("i", 1_230_000), ("d", 1)]
    )
    weights = Order(0, [web, imagenet, dot]).weights
    assert sum(weights) <= 4096
    assert weights[2] == 1
    assert weights[0] / weights[1] == pytest.approx(99_999_999 / 1_230_000, rel=0.02)
    many = [SourceRows(str(i), ((1 if i else 10**9, 0),)) for i in range(4096)]
    assert Order(0, many).weights == (1,) * 4096


def test_rows_move_far() -> None:
    # Eight windows of four shards: a shuffle within windows of randomly permuted shards moves a row by about
    # a third of the epoch; a uniformly random permutation by exactly a third.
    source = SourceRows("a", ((64, 0),) * 32)
    stream = np.array([shard * 64 + row for shard, row in streams(Order(0, [source], window=4), 1)[0]])
    assert np.abs(stream - np.arange(2048)).mean() / 2048 == pytest.approx(1 / 3, abs=0.06)
    # Within a window the rows of its four shards are mixed: a quarter of the neighbours are of one shard.
    assert (stream[1:] // 64 == stream[:-1] // 64).mean() == pytest.approx(1 / 4, abs=0.05)
    # A window touches four shards and no more.
    assert len(set((stream[:256] // 64).tolist())) == 4


def test_fingerprint_tells_every_difference() -> None:
    source = SourceRows("a", ((5, 0), (4, 0)), "digest")
    variants = [
        Order(1, [source]),
        Order(2, [source]),
        Order(1, [source], window=8),
        Order(1, [source, ONE_ROW], [1, 1]),
        Order(1, [source, ONE_ROW], [2, 1]),
        Order(1, [ONE_ROW, source], [1, 1]),
        Order(1, [SourceRows("b", source.shards, "digest")]),
        Order(1, [SourceRows("a", ((4, 0), (5, 0)), "digest")]),
        Order(1, [SourceRows("a", source.shards, "other")]),
    ]
    assert len({order.fingerprint for order in variants}) == len(variants)
    assert Order(1, [source]).fingerprint == variants[0].fingerprint


def test_pickles_small_and_equal() -> None:
    order = Order(1, [SourceRows("a", ((16_384, 0),) * 8), VIEWS], [3, 2], window=3)
    stream = [order(position) for position in range(100)]
    pickled = pickle.dumps(order)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert [copy(position) for position in range(100)] == stream
    assert copy.fingerprint == order.fingerprint


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "sources: none is given"),
        ([SourceRows("bare", ())], {}, "bare: the dataset has no rows"),
        ([UNEVEN, SourceRows("void", ((0, 0), (0, 1)))], {}, "void: the dataset has no rows"),
        ([SourceRows("skew", ((5, 0), (4, 1)))], {}, "skew: view 1 has 4 rows, view 0 has 5"),
        ([SourceRows("gap", ((5, 0), (5, 2)))], {}, "gap: view 1 has 0 rows"),
        ([UNEVEN, VIEWS], {"weights": [1]}, "weights: 1 given for 2 sources"),
        ([UNEVEN, VIEWS], {"weights": [1, 0]}, "weights: 0 for views is not a positive integer"),
        ([UNEVEN, VIEWS], {"weights": [-1, 1]}, "weights: -1 for uneven"),
        ([UNEVEN, VIEWS], {"weights": [0.5, 1]}, "weights: 0.5 for uneven"),
        ([UNEVEN, VIEWS], {"weights": [True, 1]}, "weights: True for uneven"),
        ([UNEVEN, VIEWS], {"weights": [99_999_999, 1]}, "weights: their sum 100000000"),
        ([ONE_ROW] * 5000, {}, "sources: 5000 are more than 4096"),
        ([UNEVEN], {"window": 0}, "window: 0 shards"),
    ],
)
def test_bad_input_is_told_in_one_line(sources: list[SourceRows], options: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Order(0, sources, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lookups_are_fast() -> None:
    """In 100 million rows: the first under 0.2 s, later ones under 20 microseconds. Best of three: a busy
    machine delays all but slows none down."""
    web = SourceRows("web", ((16_384, 0),) * 6104)
    first, later, straddling = [], [], []
    for attempt in range(3):
        begin = time.perf_counter()
        order = Order(attempt, [web])
        order(50_000_000)
        first.append(time.perf_counter() - begin)
        start = 16 * 16_384 * 100 - 10_000
        order(start)
        begin = time.perf_counter()
        # Crosses the border of a window.
        for position in range(start, start + 20_000):
            order(position)
        later.append((time.perf_counter() - begin) / 20_000)
        begin = time.perf_counter()
        for k in range(500):
            order(start + 10_000 + (k if k % 2 else -k))
        straddling.append((time.perf_counter() - begin) / 500)
    assert min(first) < 0.2
    assert min(later) < 20e-6
    assert min(straddling) < 20e-6


GOLDEN = [
    (0, 0, 2),
    (1, 1, 0),
    (0, 0, 1),
    (0, 1, 1),
    (1, 0, 6),
    (0, 1, 0),
    (0, 0, 3),
    (1, 0, 1),
    (0, 1, 3),
    (0, 1, 2),
    (1, 0, 5),
    (0, 0, 4),
    (0, 0, 0),
    (1, 0, 0),
    (0, 2, 3),
    (0, 3, 2),
    (1, 0, 4),
    (0, 3, 1),
    (0, 3, 3),
    (1, 0, 2),
]
GOLDEN_FINGERPRINT = "1c03ce3e3ca294f42f65550f7afb9d1137159981322185a694152f8dcdc7c480"


@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 5000])
def test_a_permutation_is_what_sorts_the_keys(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = order_module.random_keys(11, count)
    permuted = order_module._permutation(11, count)
    assert permuted.dtype == np.int64
    assert np.array_equal(permuted, np.argsort(keys, kind="stable"))
    near = np.uint64(1 << 40) + np.arange(count, dtype=np.uint64)[::-1]
    monkeypatch.setattr(order_module, "random_keys", lambda *_: near)
    assert order_module._permutation(11, count).tolist() == list(range(count))[::-1]
