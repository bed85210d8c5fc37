"""Rows a second from shards to batches, against the bare pread of the same bytes: `python benchmarks/loader.py`.

The target: at batch 64 not slower than the bare pread by more than a factor 1.5; packed9 may add its decoding, whose
target is 1.6 microseconds a row of 1024 tokens. The bare pread is a loop over (descriptor, offset) pairs that are
known beforehand, and drops what it has read. What is timed beside it, in turn:

    unpack       packed9 to uint16, in memory
    read_many    the rows' tokens as one uint16 array, checked against the palette
    workers 0    the same as a batch, with the sample order asked where the rows lie, in the training process
    workers 1, 2 the same, read ahead by threads; taken alone with the bare pread, since they run while others are
                 timed. What they read ahead meanwhile is taken before the clock starts.

A round is an epoch, so that the shuffling of it counts, and everybody has an order of his own, so that nobody finds in
the processor's cache what another has read. 16 shards of 32 MiB of tokens a dataset: the bytes come from the page
cache.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset, write_shard
from igpt_ds.dataset.storage import STORAGES
from igpt_ds.loading.loader import source_rows, train_batches
from igpt_ds.loading.order import Order
from igpt_ds.memory import keep_freed_memory

SHARDS, SHARD_TOKENS, K, BATCH = 16, 1 << 24, 512, 64
READ_AHEAD = 128  # batches, what a worker holds
Action = Callable[[], float]  # reads an epoch; the seconds that it took


def build(directory: Path, resolution: int, storage: str, shards: int = SHARDS, rows: int | None = None) -> Dataset:
    """A dataset of random tokens; without a number of rows, shards of 32 MiB."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    palette = Palette(generator.uniform(-1, 1, (K, 3)).astype(np.float32))
    palette.save(directory / "palette.npy")
    rows = rows or SHARD_TOKENS // resolution**2
    ids = np.array([f"{i:08d}" for i in range(rows)], np.bytes_)
    records = []
    for number in range(shards):
        tokens = generator.integers(0, K, (rows, resolution**2), np.uint16)
        name = f"s-{number:05d}"
        records.append(write_shard(directory, name, tokens, ids, None, rows_per_block=256, view=0, storage=storage))
    Manifest(
        rows=shards * rows,
        sequence_length=resolution**2,
        resolution=resolution,
        rows_per_block=256,
        storage=storage,
        palette={"k": K, "sha256": palette.sha256},
        source="random",
        split="train",
        views=1,
        transform={},
        seed=0,
        classes=None,
        versions={},
        rejected=0,
        shards=records,
    ).save(directory)
    return Dataset.open(directory)


def timed(action: Callable[[], None]) -> Action:
    """Seconds of a call, by the clock."""

    def seconds() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return seconds


def bare_pread(dataset: Dataset, seed: int) -> Action:
    """An epoch of preads in an order of its own."""
    storage = STORAGES[dataset.manifest.storage]
    size = np.dtype(storage.dtype).itemsize * storage.width(dataset.sequence_length)
    shards, step = dataset.manifest.shards, dataset.manifest.rows_per_block
    files = [os.open(dataset.path / f"{shard.name}.tar", os.O_RDONLY) for shard in shards]
    reads = [
        (files[s], shards[s].token_offset + r // step * shards[s].block_bytes + r % step * size)
        for s, r in epoch(dataset, seed).tolist()
    ]
    pread = os.pread

    @timed
    def bare() -> None:
        for descriptor, offset in reads:
            pread(descriptor, size, offset)

    return bare


def epoch(dataset: Dataset, seed: int) -> np.ndarray:
    """(shard, row) of an epoch: int64 [rows, 2]."""
    return Order(seed, [source_rows(dataset)]).places(np.arange(dataset.rows))[:, 1:]


def in_memory(dataset: Dataset) -> Action:
    """The decoding of an epoch, the same batch again and again."""
    storage, n = STORAGES[dataset.manifest.storage], dataset.sequence_length
    packed = storage.pack(dataset.span(0, 0, BATCH))

    @timed
    def unpack() -> None:
        for _ in range(dataset.rows // BATCH):
            storage.unpack(packed, n)

    return unpack


def batch_by_batch(dataset: Dataset, seed: int) -> Action:
    """An epoch by `read_many`."""
    batches = np.split(epoch(dataset, seed), dataset.rows // BATCH)

    @timed
    def read_many() -> None:
        for batch in batches:
            dataset.read_many(batch)

    return read_many


def stream(dataset: Dataset, seed: int, workers: int) -> Action:
    """An epoch of what a training of one rank takes its batches from."""
    order = Order(seed, [source_rows(dataset)])
    batches = train_batches([dataset], order, batch=BATCH, micro_batch=BATCH, rank=0, world=1, workers=workers)

    def take(count: int) -> None:
        for _ in itertools.islice(batches, count):
            pass

    @timed
    def epoch_of_batches() -> None:
        take(dataset.rows // BATCH)

    def drained() -> float:
        take(READ_AHEAD * workers)
        seconds = epoch_of_batches()
        time.sleep(0.1)  # reads ahead, which nobody else's time should hold
        return seconds

    return drained


def in_turn(actions: dict[str, Action], rounds: int) -> dict[str, tuple[float, float]]:
    """(seconds, ratio to the first) of an epoch, medians of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            found[name].append(action())
    found = {name: each[1:] for name, each in found.items()}  # the first round fills the caches
    first = next(iter(found.values()))
    return {
        name: (statistics.median(each), statistics.median(a / b for a, b in zip(each, first, strict=True)))
        for name, each in found.items()
    }


def measure(dataset: Dataset, rounds: int) -> dict[str, tuple[float, float]]:
    """What the table shows of a dataset."""
    bare = bare_pread(dataset, 1)
    actions = {"bare pread": bare}
    if dataset.manifest.storage == "packed9":
        actions["unpack"] = in_memory(dataset)
    actions |= {"read_many": batch_by_batch(dataset, 2), "workers 0": stream(dataset, 3, workers=0)}
    found = in_turn(actions, rounds)
    for workers in (1, 2):
        name = f"workers {workers}"
        found[name] = in_turn({"bare pread": bare, name: stream(dataset, 3 + workers, workers)}, rounds)[name]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--where", type=Path, help="folder for the datasets (0.6 GB, one at a time)")
    arguments = parser.parse_args()
    keep_freed_memory()  # as igpt-ds does
    print(f"{'storage':<9}{'tokens':>7}  {'what':<12}{'rows/s':>12}{'us/row':>9}{'ratio':>7}")
    for storage, resolution in itertools.product(STORAGES, (32, 64)):
        with tempfile.TemporaryDirectory(dir=arguments.where) as folder:
            dataset = build(Path(folder) / "d", resolution, storage)
            for name, (median, ratio) in measure(dataset, arguments.rounds).items():
                row = median / dataset.rows
                print(
                    f"{storage:<9}{resolution**2:>7}  {name:<12}{1 / row:>12,.0f}{row * 1e6:>9.2f}{ratio:>7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
