"""Rows a second from shards to batches, against the bare pread of the same bytes: `python benchmarks/loader.py`.

The target: at batch 64 not slower than the bare pread by more than a factor 1.5; packed9 may add its decoding, whose
target is 1.6 microseconds a row of 1024 tokens. The bare pread is a loop over (descriptor, offset) pairs that are
known beforehand, and drops what it has read. What is timed beside it, in turn, medians of the rounds, each on the
same rows in the sample order's order (the streams with workers in turns of their own with the bare pread, for their
threads read ahead while nobody waits for them):

    unpack       packed9 to uint16, in memory
    read_many    the rows' tokens as one uint16 array, checked against the palette
    workers 0    the same as a batch, with the sample order asked where the rows lie, in the training process
    workers 1, 2 the same, read ahead by threads

16 shards of 32 MiB of tokens a dataset, so that the bytes come from the page cache but not from the processor's.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from igpt_ds.loader import Batch, source_rows, train_batches
from igpt_ds.manifest import Manifest
from igpt_ds.memory import keep_freed_memory
from igpt_ds.order import Order
from igpt_ds.palette import Palette
from igpt_ds.shards import Dataset, write_shard
from igpt_ds.storage import STORAGES

SHARDS, SHARD_TOKENS, K, BATCH = 16, 1 << 24, 512, 64
READ_AHEAD = ("workers 1", "workers 2")
Action = Callable[[int], object]


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


def contestants(dataset: Dataset, batches: int, rounds: int) -> dict[str, Action]:
    """What is timed: called with the round's number, each reads that round's batches."""
    order = Order(1, [source_rows(dataset)])
    storage, n = STORAGES[dataset.manifest.storage], dataset.sequence_length
    size = np.dtype(storage.dtype).itemsize * storage.width(n)
    places = [np.array([order(i * BATCH + j)[1:] for j in range(BATCH)]) for i in range(batches * rounds)]
    shards, step = dataset.manifest.shards, dataset.manifest.rows_per_block
    files = [os.open(dataset.path / f"{shard.name}.tar", os.O_RDONLY) for shard in shards]
    reads = [
        [
            (files[s], shards[s].token_offset + r // step * shards[s].block_bytes + r % step * size)
            for s, r in batch.tolist()
        ]
        for batch in places
    ]
    packed = storage.pack(dataset.read_many(places[0]))
    pread = os.pread

    def of_round(number: int) -> range:
        return range(number * batches, (number + 1) * batches)

    def bare(number: int) -> None:
        for index in of_round(number):
            for descriptor, offset in reads[index]:
                pread(descriptor, size, offset)

    def unpack(number: int) -> None:
        for _ in of_round(number):
            storage.unpack(packed, n)

    def read_many(number: int) -> None:
        for index in of_round(number):
            dataset.read_many(places[index])

    decoding = {"unpack": unpack} if storage.name == "packed9" else {}
    return {"bare pread": bare, **decoding, "read_many": read_many}


def stream(dataset: Dataset, batches: int, workers: int) -> tuple[Generator[Batch, None, None], Action]:
    """The loader's stream, and what takes the next round's batches from it."""
    order = Order(1, [source_rows(dataset)])
    found = train_batches([dataset], order, batch=BATCH, micro_batch=BATCH, rank=0, world=1, workers=workers)

    def drain(_number: int) -> None:
        for _ in itertools.islice(found, batches):
            pass

    return found, drain


def in_turn(actions: dict[str, Action], rounds: int) -> dict[str, float]:
    """Seconds a call, median of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        # Who comes first finds the rows in the page cache only, the others in the processor's, too: all take turns.
        names = list(actions)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            actions[name](number)
            if number:  # the first starts the workers
                seconds[name].append(time.perf_counter() - begin)
            if name in READ_AHEAD:
                time.sleep(0.1)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100, help="of 64 rows, a round")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--where", type=Path, help="folder for the datasets (0.6 GB, one at a time)")
    arguments = parser.parse_args()
    keep_freed_memory()  # as igpt-ds does
    print(f"{'storage':<9}{'tokens':>7}  {'what':<12}{'rows/s':>12}{'us/row':>9}{'ratio':>7}")
    for storage, resolution in itertools.product(STORAGES, (32, 64)):
        with tempfile.TemporaryDirectory(dir=arguments.where) as folder:
            dataset = build(Path(folder) / "d", resolution, storage)
            actions = contestants(dataset, arguments.batches, arguments.rounds)
            bare = actions["bare pread"]
            actions["workers 0"] = stream(dataset, arguments.batches, 0)[1]
            groups = [in_turn(actions, arguments.rounds)]
            for workers, name in enumerate(READ_AHEAD, 1):
                source, drain = stream(dataset, arguments.batches, workers)
                groups.append(in_turn({"bare pread": bare, name: drain}, arguments.rounds))
                source.close()
            for number, medians in enumerate(groups):
                for name, median in medians.items():
                    if name != "bare pread" or not number:
                        row, ratio = median / arguments.batches / BATCH, median / medians["bare pread"]
                        print(
                            f"{storage:<9}{resolution**2:>7}  {name:<12}{1 / row:>12,.0f}{row * 1e6:>9.2f}{ratio:>7.2f}"
                        )


if __name__ == "__main__":
    main()
