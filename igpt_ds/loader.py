"""From the sample order and the token shards to the micro-batches of one rank.

The global batch of step s holds the positions [s B, (s + 1) B) of the order. With accumulation A, world size
W and micro-batch m (A W m = B), rank r reads for accumulation a the m positions from

    s B + a W m + r m

so that the micro-batches of all ranks, laid end to end, are the same stream for every (W, m) and any number
of workers. There is no other state: a run that resumes at step k asks for start_step = k.

Threads read ahead, not processes: reading and unpacking leave Python's lock free, while a batch that comes out of a
process has been copied through a pipe (three to seven times the time of reading it: benchmarks/loader.py) or /dev/shm,
which is small in containers, and a process that was forked beside CUDA and NCCL is a hazard.
"""

import hashlib
import pickle
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, cycle, islice
from queue import SimpleQueue

import numpy as np
import torch

from igpt_ds.blocks import blocks, damaged
from igpt_ds.errors import UserError
from igpt_ds.order import NOTHING_LEFT_OUT, LeftOut, Order, SourceRows
from igpt_ds.shards import Dataset

Batch = dict[str, torch.Tensor]
Labels = Sequence[Sequence[np.ndarray]]  # by source and shard: int64 [rows]
_AHEAD = 2  # micro-batches that a worker reads ahead
Augment = Callable[[np.ndarray, np.ndarray], np.ndarray]  # tokens [m, n], positions [m] -> tokens [m, n]


def source_rows(dataset: Dataset) -> SourceRows:
    """What the order must know of a dataset: the same wherever the directory lies."""
    manifest = dataset.manifest
    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    shards = tuple((shard.rows, shard.view) for shard in manifest.shards)
    return SourceRows(f"{manifest.source}/{manifest.split}", shards, digest)


def shard_labels(dataset: Dataset, classes: int) -> list[np.ndarray]:
    """The labels of every shard, of all views: int64 [rows] each, in the manifest's order.

    Raises:
        UserError: a shard has none, or a label that is no class.
    """
    found = []
    for record in dataset.manifest.shards:
        path = dataset.path / f"{record.name}.tar"
        parts = [block["labels"] for block in blocks(path, ("labels",)) if "labels" in block]
        labels = np.concatenate([np.empty(0, np.int64), *parts])
        if len(labels) != record.rows:
            raise damaged(path, f"{len(labels)} labels for {record.rows} rows")
        if labels.min() < 0 or labels.max() >= classes:
            raise damaged(path, f"labels from {labels.min()} to {labels.max()} of {classes} classes")
        found.append(labels)
    return found


class MicroBatches:
    """The micro-batches of one rank by index s A + a; a pure function of the index.

    Args:
        datasets: one per source of the order; same sequence length, same palette.
        order: made from `source_rows` of these datasets.
        batch: B, global, in sequences.
        micro_batch: m, of one rank.
        rank, world: r and W.
        labels: what `shard_labels` gave of each dataset, where classes are to be learnt.
        augment: changes an image's tokens by its position.

    Raises:
        UserError: W m does not divide B, or the datasets differ in sequence length or palette.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        order: Order,
        *,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        labels: Labels | None = None,
        augment: Augment | None = None,
    ) -> None:
        if len(datasets) != len(order.sources) or not 0 <= rank < world:
            raise ValueError(f"{len(datasets)} datasets, {len(order.sources)} sources, rank {rank} of {world}")
        if micro_batch < 1 or batch < 1 or batch % (world * micro_batch):
            raise UserError(
                f"batch: {batch} is not a multiple of world size {world} times micro-batch {micro_batch}: "
                "change one of them"
            )
        for other in datasets[1:]:
            if other.sequence_length != datasets[0].sequence_length:
                raise UserError(
                    f"{other.path}: sequences of {other.sequence_length} tokens, those of "
                    f"{datasets[0].path} have {datasets[0].sequence_length}: mix one resolution only"
                )
            if other.palette.sha256 != datasets[0].palette.sha256:
                raise UserError(f"{other.path}: another palette than {datasets[0].path}: build both with one palette")
        self._datasets = tuple(datasets)
        self._order = order
        self._labels, self._augment = labels, augment
        self._micro_batch = micro_batch
        self._first = rank * micro_batch
        self._stride = world * micro_batch
        self.accumulation = batch // self._stride

    def __getitem__(self, index: int) -> Batch:
        """{"tokens": uint16 [m, n], "positions": int64 [m]}, and "labels": int64 [m]; positions are the order's.

        Tokens stay as they are stored until they are on the device: a quarter of the bytes to write here and to move.
        """
        first = index * self._stride + self._first
        positions = np.arange(first, first + self._micro_batch)
        places = self._order.places(first, self._micro_batch)
        if len(self._datasets) == 1:
            tokens = self._datasets[0].read_many(places[:, 1:])
        else:
            tokens = np.empty((self._micro_batch, self._datasets[0].sequence_length), np.uint16)
            for source in np.unique(places[:, 0]).tolist():
                here = places[:, 0] == source
                tokens[here] = self._datasets[source].read_many(places[here, 1:])
        if self._augment is not None:
            tokens = self._augment(tokens, positions)
        batch = {"tokens": torch.from_numpy(tokens), "positions": torch.from_numpy(positions)}
        if self._labels is not None:
            labels = [self._labels[source][shard][row] for source, shard, row in places.tolist()]
            batch["labels"] = torch.from_numpy(np.array(labels, np.int64))
        return batch


def train_batches(
    datasets: Sequence[Dataset],
    order: Order,
    *,
    batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int = 0,
    left_out: LeftOut = NOTHING_LEFT_OUT,
    workers: int = 0,
    labels: Labels | None = None,
    augment: Augment | None = None,
) -> Generator[Batch, None, None]:
    """The micro-batches of one rank from a step on, without end; see `MicroBatches`. Some batches can be left out.

    With workers > 0 so many threads read ahead; they end when the generator is closed or dropped. Where CUDA is
    available the tensors lie in pinned memory.

    Raises:
        UserError: as `MicroBatches` at once; while iterating, a damaged shard.
    """
    micro_batches = MicroBatches(
        datasets, order, batch=batch, micro_batch=micro_batch, rank=rank, world=world, labels=labels, augment=augment
    )
    indices = _Indices(start_step, left_out, micro_batches.accumulation)
    return _stream(micro_batches, indices, workers)


def evaluation_batches(dataset: Dataset, micro_batch: int, rank: int, world: int) -> Iterator[Batch]:
    """Every row of view 0 once over all ranks, in the dataset's order; equally many batches on every rank.

    Yields:
        {"tokens": uint16 [m, n], "weight": float32 [m], "positions": int64 [m]} and, where the dataset has
        classes, "labels": int64 [m]. The position of a row is its index among the rows of view 0. Surplus
        places repeat row 0 with weight 0; all other weights are 1.

    Raises:
        UserError: the dataset is empty or damaged.
    """
    if not dataset.rows:
        raise UserError(f"{dataset.path}: the dataset has no rows: build it again")
    shards = [k for k, record in enumerate(dataset.manifest.shards) if record.view == 0]
    starts = list(accumulate((dataset.manifest.shards[k].rows for k in shards), initial=0))
    labels = dataset.labels() if dataset.manifest.classes is not None else None
    stride = world * micro_batch
    for first in range(rank * micro_batch, -(-dataset.rows // stride) * stride, stride):
        positions = np.arange(first, first + micro_batch)
        real = positions < dataset.rows
        positions[~real] = 0
        places = [bisect_right(starts, position) - 1 for position in positions.tolist()]
        rows = [(shards[k], int(row) - starts[k]) for k, row in zip(places, positions, strict=True)]
        batch = {
            "tokens": torch.from_numpy(dataset.read_many(rows)),
            "weight": torch.from_numpy(real.astype(np.float32)),
            "positions": torch.from_numpy(positions),
        }
        if labels is not None:
            batch["labels"] = torch.from_numpy(labels[positions])
        yield _pinned(batch)


@dataclass(frozen=True)
class _Indices:
    """The indices of the micro-batches from a step on, without end."""

    start_step: int
    left_out: LeftOut
    accumulation: int

    def __iter__(self) -> Iterator[int]:
        for step in count(self.start_step):
            first = self.left_out.batch(step) * self.accumulation
            yield from range(first, first + self.accumulation)


class _Reader(threading.Thread):
    """Reads micro-batches ahead. It is a daemon: a run must be able to end while its storage hangs."""

    def __init__(self, micro_batches: MicroBatches, indices: Iterable[int]) -> None:
        super().__init__(name="reader", daemon=True)
        # Of its own: open files and the order's caches belong to one thread.
        self._micro_batches: MicroBatches = pickle.loads(pickle.dumps(micro_batches))
        self._indices = indices
        self._room = threading.Semaphore(_AHEAD)
        self._found: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._ended = False
        self.start()

    def run(self) -> None:
        for index in self._indices:
            self._room.acquire()
            if self._ended:
                return
            try:
                self._found.put(self._micro_batches[index])
            except Exception as error:  # raised where the micro-batch is wanted
                self._found.put(error)
                return

    def next(self) -> Batch:
        found = self._found.get()
        self._room.release()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        self._ended = True
        self._room.release()


def _stream(micro_batches: MicroBatches, indices: _Indices, workers: int) -> Generator[Batch, None, None]:
    if workers == 0:
        for index in indices:
            yield _pinned(micro_batches[index])
        return
    readers = [_Reader(micro_batches, islice(indices, first, None, workers)) for first in range(workers)]
    try:
        for reader in cycle(readers):
            yield _pinned(reader.next())  # not in the reader, whose CUDA device would be the first
    finally:
        for reader in readers:
            reader.end()


def _pinned(batch: Batch) -> Batch:
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch
