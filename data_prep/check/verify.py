"""Read a whole dataset directory again and hold it against its manifest.

Shards are checked one by one, in any number of processes. What has to be known of all of them together, that no id
is there twice and that all views hold the same ids, is found from a 64-bit hash of each id: 8 bytes a row, 0.8 GB for
100 million. Equal ids have equal hashes, so no duplicate escapes; where hashes are equal, the ids themselves are
read again, so that nothing is called a duplicate that is none.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.workers.pool import run
from igpt_ds.atomic import sha256_file
from igpt_ds.dataset.blocks import blocks, damaged
from igpt_ds.dataset.manifest import Manifest, ShardRecord
from igpt_ds.dataset.shards import Dataset, read_mark
from igpt_ds.dataset.storage import STORAGES
from igpt_ds.errors import UserError

_LOOKED_UP = 1 << 20  # hashes of possible duplicates whose ids are compared in one pass over the dataset


@dataclass(frozen=True)
class Summary:
    """What `verify` has read: rows of all views, bytes of all shards, and the tokens' use of the palette."""

    rows: int
    views: int
    shards: int
    bytes: int
    labelled: bool
    colours_used: int
    entropy: float  # nats a token, of the tokens' frequencies


@dataclass(frozen=True)
class _Task:
    """One shard to check, as a dataset that holds no other."""

    dataset: Dataset

    @property
    def record(self) -> ShardRecord:
        return self.dataset.manifest.shards[0]


@dataclass(frozen=True)
class _Checked:
    record: ShardRecord
    counts: np.ndarray  # of each token, int64 [k]
    hashes: np.ndarray  # of each row's id, uint64 [rows]


def verify(directory: Path, progress: Callable[[int], None] | None = None, executor: Executor | None = None) -> Summary:
    """Re-read every byte of a dataset against its manifest.

    Checks sizes, sha256, commit marks, tar structure, dtypes and shapes, row counts, the ranges of tokens and
    labels, that the rows lie where the manifest says, that no view holds an id twice, and that all views hold the
    same ids (of different ids two views would pass by chance, with a probability below 1e-10). Memory: a block of
    rows a worker, and 8 bytes a row of one view, of two where there are several.

    Args:
        progress: called with the bytes of each shard that has passed.
        executor: where shards are checked; None is this process.

    Raises:
        UserError: the first fault found.
    """
    dataset = Dataset.open(directory)
    manifest = dataset.manifest
    counts = np.zeros(manifest.palette["k"], np.int64)
    first: np.ndarray | None = None
    for view in range(manifest.views):
        shards = [record for record in manifest.shards if record.view == view]
        hashes = np.empty(manifest.rows, np.uint64)
        filled = 0
        alone = (replace(manifest, shards=[record]) for record in shards)
        tasks = (_Task(Dataset(dataset.path, each, dataset.palette)) for each in alone)
        for checked in run(_check, tasks, executor):
            counts += checked.counts
            hashes[filled : filled + len(checked.hashes)] = checked.hashes
            filled += len(checked.hashes)
            if progress:
                progress(checked.record.bytes)
        hashes.sort()
        _refuse_duplicates(dataset.path, view, shards, np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
        if first is not None and not np.array_equal(first, hashes):
            raise UserError(f"{directory}: views 0 and {view} hold different images: rebuild the dataset")
        first = hashes if first is None else first
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return Summary(
        rows=sum(record.rows for record in manifest.shards),
        views=manifest.views,
        shards=len(manifest.shards),
        bytes=sum(record.bytes for record in manifest.shards),
        labelled=manifest.classes is not None,
        colours_used=int((counts > 0).sum()),
        entropy=float(-(share * np.log(share)).sum()) + 0.0,  # never -0
    )


def _check(task: _Task) -> _Checked:
    """All of one shard but what concerns the others."""
    dataset, record = task.dataset, task.record
    path = dataset.path / f"{record.name}.tar"
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if digest != record.sha256:
        raise damaged(path, "its sha256 is not the manifest's")
    storage = STORAGES[dataset.manifest.storage]
    counts = np.zeros(dataset.palette.k, np.int64)
    hashes, row = [], 0
    for block in _checked_blocks(path, record, dataset.manifest):
        stored = block[storage.member]
        tokens = storage.unpack(stored, dataset.sequence_length)
        if (largest := int(tokens.max())) >= dataset.palette.k:
            raise damaged(path, f"token {largest} is beyond the palette of {dataset.palette.k}")
        if not np.array_equal(dataset.span(0, row, row + len(tokens)), tokens):
            raise damaged(path, "its rows do not lie where the manifest says")
        if not np.array_equal(storage.pack(tokens), stored):
            raise damaged(path, "the bits that fill up its rows are not zeros")
        counts += np.bincount(tokens.reshape(-1), minlength=len(counts))
        hashes.append(_hashes(block["ids"]))
        row += len(tokens)
    _check_mark(path, record)
    return _Checked(record, counts, np.concatenate(hashes))


def _check_mark(path: Path, record: ShardRecord) -> None:
    mark = read_mark(path.parent, record.name)
    if mark is None or mark[0] != record:
        what = "no readable commit mark" if mark is None else "its figures are not the manifest's"
        remedy = f"delete {path.name} and run igpt-data shards again"
        raise UserError(f"{path.with_suffix('.json')}: {what}: {remedy}")


def _checked_blocks(path: Path, record: ShardRecord, manifest: Manifest) -> Iterator[dict[str, np.ndarray]]:
    storage = STORAGES[manifest.storage]
    width = storage.width(manifest.sequence_length)
    wanted = {storage.member, "ids"} | ({"labels"} if manifest.classes is not None else set())
    left = record.rows
    for block in blocks(path):
        if block.keys() != wanted or left == 0:
            found = ", ".join(sorted(block))
            raise damaged(path, f"a block of {found} where {', '.join(sorted(wanted))} belong, or one too many")
        rows = min(left, manifest.rows_per_block)
        id_type = f"|S{block['ids'].dtype.itemsize}"
        shapes = {storage.member: (storage.dtype, (rows, width)), "labels": ("<i8", (rows,)), "ids": (id_type, (rows,))}
        for kind, array in block.items():
            dtype, shape = shapes[kind]
            if array.shape != shape or array.dtype.str != dtype:
                raise damaged(path, f"{kind} of {array.dtype} {list(array.shape)}, expected {list(shape)}")
        if manifest.classes is not None:
            count = len(manifest.classes)
            if block["labels"].min() < 0 or block["labels"].max() >= count:
                raise damaged(path, f"a label is outside the {count} classes")
        left -= rows
        yield block
    if left:
        raise damaged(path, f"{left} rows are missing")


def _hashes(ids: np.ndarray) -> np.ndarray:
    """bytes [rows] of any width -> uint64 [rows]."""
    digests = [hashlib.blake2b(each, digest_size=8).digest() for each in ids.tolist()]
    return np.frombuffer(b"".join(digests), "<u8")


def _refuse_duplicates(directory: Path, view: int, shards: list[ShardRecord], hashes: np.ndarray) -> None:
    """Raise if, among the rows whose ids have one of these hashes (sorted), there are equal ids."""
    for start in range(0, len(hashes), _LOOKED_UP):
        some = hashes[start : start + _LOOKED_UP]
        seen: dict[bytes, str] = {}
        for record in shards:
            for block in blocks(directory / f"{record.name}.tar", ("ids",)):
                for each in block["ids"][np.isin(_hashes(block["ids"]), some)].tolist():
                    if each in seen:
                        where = " and ".join(dict.fromkeys((seen[each], record.name)))
                        raise UserError(
                            f"{directory}: id {each.decode('utf-8', 'replace')!r} is there twice in view {view} "
                            f"({where}): rebuild the dataset"
                        )
                    seen[each] = record.name
