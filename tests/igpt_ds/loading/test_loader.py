"""Micro-batches of one rank: one global stream however it is cut, and workers that leave no trace."""

import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset, write_shard
from igpt_ds.errors import UserError
from igpt_ds.loading.loader import MicroBatches, evaluation_batches, source_rows, train_batches
from igpt_ds.loading.order import Order

K = 8


def build(
    directory: Path,
    shards: list[tuple[int, int]],
    *,
    resolution: int = 2,
    labelled: bool = False,
    seed: int = 0,
) -> Dataset:
    """A dataset of random tokens with (rows, view) shards; the label of a row is its index in its view."""
    directory.mkdir()
    generator = np.random.default_rng(seed)
    palette = Palette(np.linspace(-1, 1, 3 * K, dtype=np.float32).reshape(K, 3))
    palette.save(directory / "palette.npy")
    views = 1 + max(view for _, view in shards)
    done = [0] * views
    records = []
    for number, (rows, view) in enumerate(shards):
        index = np.arange(done[view], done[view] + rows)
        done[view] += rows
        tokens = generator.integers(0, K, (rows, resolution**2)).astype(np.uint16)
        ids = np.array([f"{i:08d}" for i in index], dtype=np.bytes_)
        labels = index if labelled else None
        records.append(write_shard(directory, f"s-{number:05d}", tokens, ids, labels, rows_per_block=4, view=view))
    Manifest(
        rows=done[0],
        sequence_length=resolution**2,
        resolution=resolution,
        rows_per_block=4,
        storage="uint16",
        palette={"k": K, "sha256": palette.sha256},
        source="image_folder",
        split="train",
        views=views,
        transform={},
        seed=0,
        classes=[str(label) for label in range(50)] if labelled else None,
        versions={},
        rejected=0,
        shards=records,
    ).save(directory)
    return Dataset.open(directory)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[Dataset], Order]:
    datasets = [
        build(tmp_path / "plain", [(11, 0), (6, 0), (9, 0)]),
        build(tmp_path / "views", [(7, 0), (3, 0), (5, 1), (5, 1)], seed=1),
    ]
    return datasets, Order(4, [source_rows(dataset) for dataset in datasets], [3, 1], window=2)


def global_stream(
    datasets: list[Dataset],
    order: Order,
    *,
    steps: int,
    batch: int,
    world: int,
    micro_batch: int,
    **options: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions of all ranks laid end to end: accumulation after accumulation, rank after rank."""
    count = steps * batch // (world * micro_batch)
    ranks = []
    for rank in range(world):
        stream = train_batches(datasets, order, batch=batch, micro_batch=micro_batch, rank=rank, world=world, **options)
        ranks.append(list(itertools.islice(stream, count)))
        stream.close()
    found = [item for micro_batches in zip(*ranks, strict=True) for item in micro_batches]
    return torch.cat([item["tokens"] for item in found]), torch.cat([item["positions"] for item in found])


def test_the_stream_is_that_of_the_order(pair: tuple[list[Dataset], Order]) -> None:
    datasets, order = pair
    tokens, positions = global_stream(datasets, order, steps=10, batch=12, world=1, micro_batch=12)
    assert (tokens.dtype, positions.dtype) == (torch.uint16, torch.int64)
    assert tokens.shape == (120, 4)
    assert positions.tolist() == list(range(120))
    whole = [[dataset.tokens(k) for k in range(len(dataset.manifest.shards))] for dataset in datasets]
    expected = [whole[source][shard][row] for source, shard, row in map(order, range(120))]
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"),
    [(1, 1, 0), (1, 4, 2), (2, 6, 0), (2, 3, 1), (3, 2, 0), (3, 4, 2), (4, 1, 0), (4, 3, 0), (12, 1, 0)],
)
def test_one_global_stream_however_it_is_cut(
    pair: tuple[list[Dataset], Order], world: int, micro_batch: int, workers: int
) -> None:
    datasets, order = pair
    expected, _ = global_stream(datasets, order, steps=5, batch=12, world=1, micro_batch=12)
    tokens, positions = global_stream(
        datasets, order, steps=5, batch=12, world=world, micro_batch=micro_batch, workers=workers
    )
    assert positions.tolist() == list(range(60))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("start", [1, 2, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_is_the_tail(pair: tuple[list[Dataset], Order], start: int, workers: int) -> None:
    datasets, order = pair
    cut = {"batch": 12, "world": 2, "micro_batch": 3}
    tokens, positions = global_stream(datasets, order, steps=9, **cut)
    tail, at = global_stream(
        datasets, pickle.loads(pickle.dumps(order)), steps=9 - start, start_step=start, workers=workers, **cut
    )
    assert torch.equal(tail, tokens[12 * start :])
    assert torch.equal(at, positions[12 * start :])


def test_micro_batches_by_index(pair: tuple[list[Dataset], Order]) -> None:
    datasets, order = pair
    micro_batches = MicroBatches(datasets, order, batch=12, micro_batch=2, rank=1, world=2)
    assert micro_batches.accumulation == 3
    # Step 5, accumulation 2, rank 1: 5 * 12 + 2 * 4 + 2.
    (item,) = pickle.loads(pickle.dumps(micro_batches)).read([5 * 3 + 2])
    assert item["positions"].tolist() == [70, 71]
    assert item["tokens"].dtype == np.uint16, "as stored"
    for indices in ([17], [3, 16, 17], range(18)):
        *_, last = micro_batches.read(indices)
        assert np.array_equal(last["tokens"], item["tokens"])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_workers_leave_nothing_behind(pair: tuple[list[Dataset], Order]) -> None:
    datasets, order = pair
    state, before = torch.get_rng_state(), descriptors()
    stream = train_batches(datasets, order, batch=4, micro_batch=4, rank=0, world=1, workers=2)
    kept = list(itertools.islice(stream, 40))
    assert [int(item["positions"][0]) for item in kept] == list(range(0, 160, 4))
    threads = readers()
    assert len(threads) == 2
    stream.close()
    for thread in threads:
        thread.join(timeout=20)
    del threads, thread
    assert readers() == []
    assert descriptors() == before
    assert torch.equal(torch.get_rng_state(), state)


def assert_comes(asked: list[int], expected: list[int]) -> None:
    """The threads have asked for these, in some order, and in a while for no more."""
    deadline = time.monotonic() + 20
    while len(asked) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(asked) == expected


def test_workers_read_a_little_ahead_only(pair: tuple[list[Dataset], Order], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, order = pair
    asked: list[int] = []

    def noted(self: MicroBatches, indices: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        for index in indices:
            asked.append(index)
            yield {"positions": np.array([index])}

    monkeypatch.setattr(MicroBatches, "read", noted)
    stream = train_batches(datasets, order, batch=4, micro_batch=4, rank=0, world=1, workers=2)
    assert next(stream)["positions"].tolist() == [0]
    # Groups of 1, 2, 4, ... 64: the one that was taken, and the next of each.
    assert_comes(asked, list(range(1 + 2 + 4)))
    taken = 1 + sum(1 for _ in itertools.islice(stream, 200))
    time.sleep(0.2)
    assert taken < len(asked) <= taken + 3 * 64, "the group in use and the next of each"
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_lies_before_a_damaged_row_comes_first(pair: tuple[list[Dataset], Order], workers: int) -> None:
    datasets, order = pair
    firsts: dict[tuple[int, int], int] = {}
    for position in range(32):  # of one group
        firsts.setdefault(order(position)[:2], position)
    (source, shard), first = max(firsts.items(), key=lambda item: item[1])
    assert first >= 8
    path = datasets[source].path / f"{datasets[source].manifest.shards[shard].name}.tar"
    stream = train_batches(datasets, order, batch=4, micro_batch=4, rank=0, world=1, workers=workers)
    os.truncate(path, 512)
    came = []
    with pytest.raises(UserError, match=path.name):
        for batch in stream:
            came += batch["positions"].tolist()
    assert came == list(range(first // 4 * 4))
    stream.close()


@pytest.mark.parametrize("fault", ["the run", "a worker", "the storage"])
def test_a_failed_run_ends_though_its_stream_is_alive(
    pair: tuple[list[Dataset], Order], tmp_path: Path, fault: str
) -> None:
    """Neither a reader that is alive nor one that waits for its storage for ever keeps the process."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pickle, signal, sys, threading, time
            from pathlib import Path
            from igpt_ds.loading.loader import train_batches
            from igpt_ds.dataset.shards import Dataset

            def fail(*_):
                raise RuntimeError("on purpose")

            datasets, order = pickle.loads(Path(sys.argv[1]).read_bytes())
            if sys.argv[2] == "a worker":
                Dataset.read_parts = fail
            elif sys.argv[2] == "the storage":
                Dataset.read_parts = lambda *_: time.sleep(1000)
            stream = train_batches(datasets, order, batch=4, micro_batch=4, rank=0, world=1, workers=2)
            if sys.argv[2] == "the storage":
                threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
                signal.signal(signal.SIGUSR1, fail)
            next(stream)
            fail()
            """
        )
    )
    (tmp_path / "pair").write_bytes(pickle.dumps(pair))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "pair"), fault],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: on purpose")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_worker_is_the_users_error_here(pair: tuple[list[Dataset], Order], workers: int) -> None:
    datasets, order = pair
    (datasets[0].path / "s-00001.tar").write_bytes(b"short")
    stream = train_batches(datasets, order, batch=4, micro_batch=4, rank=0, world=1, workers=workers)
    with pytest.raises(UserError, match=r"s-00001\.tar: damaged shard") as error:
        list(itertools.islice(stream, 20))
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_datasets_and_batches_that_do_not_fit(tmp_path: Path) -> None:
    small = build(tmp_path / "small", [(4, 0)])
    large = build(tmp_path / "large", [(4, 0)], resolution=3)
    other = build(tmp_path / "other", [(4, 0)])
    Palette(np.zeros((K, 3), np.float32)).save(other.path / "palette.npy")
    other = Dataset(other.path, other.manifest, Palette.load(other.path / "palette.npy"))

    def start(datasets: list[Dataset], batch: int = 8) -> None:
        order = Order(0, [source_rows(dataset) for dataset in datasets])
        train_batches(datasets, order, batch=batch, micro_batch=2, rank=0, world=2)

    start([small, small])
    with pytest.raises(UserError, match=r"large: sequences of 9 tokens, those of .*small have 4"):
        start([small, large])
    with pytest.raises(UserError, match=r"other: another palette than .*small"):
        start([small, other])
    with pytest.raises(UserError, match="batch: 10 is not a multiple of world size 2 times micro-batch 2"):
        start([small], batch=10)
    with pytest.raises(ValueError, match="1 datasets, 2 sources"):
        train_batches([small], Order(0, [source_rows(small)] * 2), batch=8, micro_batch=2, rank=0, world=2)


def test_source_rows_do_not_depend_on_the_place(tmp_path: Path) -> None:
    first = build(tmp_path / "a", [(4, 0), (3, 1), (1, 1)])
    assert source_rows(first).shards == ((4, 0), (3, 1), (1, 1))
    (tmp_path / "a").rename(tmp_path / "b")
    assert source_rows(Dataset.open(tmp_path / "b")) == source_rows(first)
    # Other tokens are another source.
    assert source_rows(build(tmp_path / "c", [(4, 0), (3, 1), (1, 1)], seed=1)) != source_rows(first)


def all_ranks(
    dataset: Dataset, micro_batch: int, world: int, read_ahead: bool = False
) -> Iterator[list[dict[str, torch.Tensor]]]:
    labelled = dataset.manifest.classes is not None
    return (list(evaluation_batches(dataset, micro_batch, rank, world, labelled, read_ahead)) for rank in range(world))


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 4, 13, 50])
def test_evaluation_sees_every_row_once(tmp_path: Path, world: int, micro_batch: int, read_ahead: bool) -> None:
    # View 1 lies between the shards of view 0 and must not be read.
    dataset = build(tmp_path / "val", [(9, 0), (13, 1), (4, 0)], labelled=True)
    ranks = list(all_ranks(dataset, micro_batch, world, read_ahead))
    assert {len(batches) for batches in ranks} == {-(-13 // (world * micro_batch))}
    batches = [batch for batches in ranks for batch in batches]
    assert {batch["tokens"].shape for batch in batches} == {(micro_batch, 4)}
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert joined["tokens"].dtype == torch.uint16
    assert joined["positions"].dtype == joined["labels"].dtype == torch.int64
    assert joined["weight"].dtype == torch.float32
    assert joined["weight"].sum() == 13
    real = joined["weight"] == 1
    assert sorted(joined["positions"][real].tolist()) == list(range(13))
    assert not joined["positions"][~real].any()
    assert torch.equal(joined["labels"], joined["positions"])
    rows = np.concatenate([dataset.tokens(0), dataset.tokens(2)])
    np.testing.assert_array_equal(joined["tokens"], rows[joined["positions"]])


def test_evaluation_follows_the_datasets_order(tmp_path: Path) -> None:
    dataset = build(tmp_path / "val", [(5, 0), (4, 0)])
    batches = list(evaluation_batches(dataset, 4, 0, 1))
    assert [batch["positions"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0]]
    assert batches[-1]["weight"].tolist() == [1, 0, 0, 0]
    assert "labels" not in batches[0]
