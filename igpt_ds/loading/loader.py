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

import copy
import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, cycle, islice, repeat
from queue import SimpleQueue

import numpy as np
import torch

from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.loading.ahead import ahead
from igpt_ds.loading.order import NOTHING_LEFT_OUT, LeftOut, Order, SourceRows

Arrays = dict[str, np.ndarray]
Batch = dict[str, torch.Tensor]
Labels = Sequence[Sequence[np.ndarray]]  # by source and shard: int64 [rows]
# Micro-batches are found and handed over in groups of so many at most, unless that makes more rows (32 MiB of 4096
# tokens each): a hand-over from thread to thread takes as long as reading 32 rows.
_GROUP, _GROUP_ROWS = 64, 4096
Augment = Callable[[np.ndarray, np.ndarray], np.ndarray]  # tokens [m, n], positions [m] -> tokens [m, n]


def source_rows(dataset: Dataset) -> SourceRows:
    """What the order must know of a dataset: the same wherever the directory lies."""
    manifest = dataset.manifest
    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    shards = tuple(map(tuple, manifest.table[:, [0, 2]].tolist()))
    return SourceRows(f"{manifest.source}/{manifest.split}", shards, digest)


def shard_labels(dataset: Dataset) -> list[np.ndarray]:
    """The labels of every shard, of all views: int64 [rows] each, in the manifest's order."""
    return [dataset.shard_labels(shard) for shard in range(len(dataset.manifest.shards))]


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

    Attributes:
        accumulation: A, micro-batches of one rank in a global batch.

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

    def own(self) -> "MicroBatches":
        """The same for another thread."""
        found = copy.copy(self)
        found._datasets = tuple(dataset.own() for dataset in self._datasets)
        found._order = copy.copy(self._order)
        return found

    def groups(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """Endless indices in the groups to read them in. The first are small: a run starts with its first batch."""
        left, most, size = iter(indices), max(1, min(_GROUP, _GROUP_ROWS // self._micro_batch)), 1
        while True:
            yield list(islice(left, size))
            size = min(2 * size, most)

    def read(self, indices: Sequence[int]) -> Iterator[Arrays]:
        """The micro-batches of ascending indices, each read when it is asked for.

        Where all their rows lie is found at once: for 64 rows alone it would take a fifth of the time of reading them.

        Yields:
            {"tokens": uint16 [m, n], "positions": int64 [m]}, and "labels": int64 [m]; positions are the order's.
            Tokens stay as they are stored until they are on the device: a quarter of the bytes to write and to move.
        """
        m = self._micro_batch
        positions = (np.array(indices, np.int64) * self._stride + self._first)[:, None] + np.arange(m)
        places = self._order.places(positions.ravel())
        for i, tokens in enumerate(self._tokens(places)):
            batch = {"tokens": tokens, "positions": positions[i]}
            if self._augment is not None:
                batch["tokens"] = self._augment(tokens, positions[i])
            if self._labels is not None:
                here = places[i * m : i * m + m].tolist()
                labels = [self._labels[source][shard][row] for source, shard, row in here]
                batch["labels"] = np.array(labels, np.int64)
            yield batch

    def _tokens(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Tokens of int64 [k m, (source, shard, row)]: k times uint16 [m, n]."""
        m = self._micro_batch
        if len(self._datasets) == 1:
            yield from self._datasets[0].read_parts(places[:, 1:], repeat(m, len(places) // m))
            return
        of_source = [(places[:, 0] == source).reshape(-1, m) for source in range(len(self._datasets))]
        parts = [
            dataset.read_parts(places[here.ravel(), 1:], here.sum(1).tolist())
            for dataset, here in zip(self._datasets, of_source, strict=True)
        ]
        for each in zip(*of_source, strict=True):
            tokens = np.empty((m, self._datasets[0].sequence_length), np.uint16)
            for here, part in zip(each, parts, strict=True):
                tokens[here] = next(part)
            yield tokens


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


def evaluation_batches(
    dataset: Dataset, micro_batch: int, rank: int, world: int, labelled: bool = False, read_ahead: bool = False
) -> Iterator[Batch]:
    """Every row of view 0 once over all ranks, in the dataset's order; equally many batches on every rank.

    Args:
        read_ahead: whether the next batch is read while the last one is in use.

    Yields:
        {"tokens": uint16 [m, n], "weight": float32 [m], "positions": int64 [m]} and, where they are asked for,
        "labels": int64 [m]. The position of a row is its index among the rows of view 0. Surplus
        places repeat row 0 with weight 0; all other weights are 1.
    """
    if not dataset.rows:
        raise UserError(f"{dataset.path}: the dataset has no rows: build it again")
    if read_ahead:
        dataset = dataset.own()  # open files belong to one thread
    arrays = _evaluation_arrays(dataset, micro_batch, rank, world, labelled)
    yield from _tensors(ahead(arrays) if read_ahead else arrays)


def _evaluation_arrays(dataset: Dataset, micro_batch: int, rank: int, world: int, labelled: bool) -> Iterator[Arrays]:
    shards = [k for k, record in enumerate(dataset.manifest.shards) if record.view == 0]
    starts = list(accumulate((dataset.manifest.shards[k].rows for k in shards), initial=0))
    labels = dataset.labels() if labelled else None
    stride = world * micro_batch
    for first in range(rank * micro_batch, -(-dataset.rows // stride) * stride, stride):
        positions = np.arange(first, first + micro_batch)
        real = positions < dataset.rows
        positions[~real] = 0
        places = [bisect_right(starts, position) - 1 for position in positions.tolist()]
        rows = [(shards[k], int(row) - starts[k]) for k, row in zip(places, positions, strict=True)]
        batch = {"tokens": dataset.read_many(rows), "weight": real.astype(np.float32), "positions": positions}
        if labels is not None:
            batch["labels"] = labels[positions]
        yield batch


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
    """Reads its next group of micro-batches while the last one is in use.

    It is a daemon: a run must be able to end while its storage hangs.
    """

    def __init__(self, micro_batches: MicroBatches, groups: Iterable[list[int]]) -> None:
        super().__init__(name="reader", daemon=True)
        # Of its own: open files and the order's caches belong to one thread.
        self._micro_batches = micro_batches.own()
        self._groups = groups
        self._wanted = threading.Semaphore(1)
        self._found: SimpleQueue[list[Arrays | Exception]] = SimpleQueue()
        self._ended = False
        self.start()

    def run(self) -> None:
        for group in self._groups:
            self._wanted.acquire()
            found: list[Arrays | Exception] = []
            try:
                for batch in self._micro_batches.read(group):
                    if self._ended:
                        return
                    found.append(batch)
            except Exception as error:  # raised where its micro-batch is wanted
                found.append(error)
                return
            finally:
                self._found.put(found)

    def next(self) -> Iterator[Arrays]:
        found = self._found.get()
        self._wanted.release()
        for batch in found:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def end(self) -> None:
        self._ended = True
        self._wanted.release()


def _stream(micro_batches: MicroBatches, indices: _Indices, workers: int) -> Generator[Batch, None, None]:
    if workers == 0:
        for group in micro_batches.groups(indices):
            yield from _tensors(micro_batches.read(group))
        return
    readers = [
        _Reader(micro_batches, islice(micro_batches.groups(indices), first, None, workers)) for first in range(workers)
    ]
    try:
        for reader in cycle(readers):
            yield from _tensors(reader.next())
    finally:
        for reader in readers:
            reader.end()


def _tensors(batches: Iterable[Arrays]) -> Iterator[Batch]:
    """As tensors; in pinned memory, from which the copy to the device need not wait, where CUDA is available.

    Not in a reader: torch pins for the thread's current device, and aborts a process that ends while a thread is in it.
    """
    pin = torch.cuda.is_available()
    for batch in batches:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        yield {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors
