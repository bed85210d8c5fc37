"""Read a whole dataset directory again and hold it against its manifest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_ds.atomic import sha256_file
from igpt_ds.errors import UserError
from igpt_ds.manifest import Manifest, ShardRecord
from igpt_ds.shards import Dataset, blocks, damaged


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


def verify(directory: Path, progress: Callable[[int], None] | None = None) -> Summary:
    """Re-read every byte of a dataset against its manifest.

    Checks sizes, sha256, tar structure, dtypes and shapes, row counts, the ranges of tokens and labels, that
    the rows lie where the manifest says, that no view holds an id twice, and that all views hold the same
    ids. Memory: one shard, and the ids of the whole dataset.

    Args:
        progress: called with the bytes of each shard that has passed.

    Raises:
        UserError: the first fault found.
    """
    dataset = Dataset.open(directory)
    manifest = dataset.manifest
    counts = np.zeros(dataset.palette.k, np.int64)
    ids: list[list[np.ndarray]] = [[] for _ in range(manifest.views)]
    for index, record in enumerate(manifest.shards):
        path = dataset.path / f"{record.name}.tar"
        if sha256_file(path) != record.sha256:
            raise damaged(path, "its sha256 is not the manifest's")
        found = list(_checked_blocks(path, record, manifest))
        tokens = np.concatenate([block["tokens"] for block in found])
        if not np.array_equal(dataset.tokens(index), tokens):
            raise damaged(path, "its rows do not lie where the manifest says")
        counts += np.bincount(tokens.reshape(-1), minlength=len(counts))
        ids[record.view] += [block["ids"] for block in found]
        if progress:
            progress(record.bytes)
    first: np.ndarray | None = None
    for view, parts in enumerate(ids):
        names = np.sort(np.concatenate(parts))
        if len(twice := names[1:][names[1:] == names[:-1]]):
            name = twice[0].decode("utf-8", "replace")
            raise UserError(f"{directory}: id {name!r} is there twice in view {view}: rebuild the dataset")
        if first is not None and not np.array_equal(first, names):
            raise UserError(f"{directory}: views 0 and {view} hold different images: rebuild the dataset")
        first = names
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return Summary(
        rows=sum(record.rows for record in manifest.shards),
        views=manifest.views,
        shards=len(manifest.shards),
        bytes=sum(record.bytes for record in manifest.shards),
        labelled=manifest.classes is not None,
        colours_used=int((counts > 0).sum()),
        entropy=float(-(share * np.log(share)).sum()),
    )


def _checked_blocks(path: Path, record: ShardRecord, manifest: Manifest) -> Iterator[dict[str, np.ndarray]]:
    left = record.rows
    for block in blocks(path):
        rows = min(left, manifest.rows_per_block)
        shapes = {"tokens": ("<u2", (rows, manifest.sequence_length)), "labels": ("<i8", (rows,))}
        shapes["ids"] = (f"|S{block['ids'].dtype.itemsize}" if "ids" in block else "", (rows,))
        for kind, array in block.items():
            dtype, shape = shapes[kind]
            if array.shape != shape or array.dtype.str != dtype:
                raise damaged(path, f"{kind} of {array.dtype} {list(array.shape)}, expected {list(shape)}")
        if not {"tokens", "ids"} <= block.keys() or rows == 0:
            raise damaged(path, "a block without tokens or ids, or one too many")
        if (largest := int(block["tokens"].max())) >= manifest.palette["k"]:
            raise damaged(path, f"token {largest} is beyond the palette of {manifest.palette['k']}")
        if ("labels" in block) != (manifest.classes is not None):
            raise damaged(path, "labels without classes, or classes without labels")
        if "labels" in block:
            count = len(manifest.classes or ())
            if block["labels"].min() < 0 or block["labels"].max() >= count:
                raise damaged(path, f"a label is outside the {count} classes")
        left -= rows
        yield block
    if left:
        raise damaged(path, f"{left} rows are missing")
