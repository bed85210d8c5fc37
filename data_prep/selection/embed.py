"""Read a collection once: of every image its embedding, perceptual hash and sha256, kept for the later steps.

The unit of work is an input file of a streamed source, or a slice of the images of a listed one. A unit publishes
chunks of at most CHUNK images, UNIT-0000.npz and so on, and last UNIT.json, its commit mark; one that has its mark
is not read again. A unit is named by a hash of what it holds, so that a collection that has grown costs only what
is new. An image that cannot be decoded is counted by its reason and has no row.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits

from data_prep.files.npz import publish_arrays, read_arrays
from data_prep.images.decode import RejectError, decode
from data_prep.images.rejects import read_listed
from data_prep.selection.embedders import Embedder
from data_prep.selection.perceptual_hash import perceptual_hash, small_grey
from data_prep.shards.plan import is_streamed
from data_prep.sources import Encoded, Item, ListedSource, Pool, Source, StreamedSource, UnusableError
from data_prep.workers.pool import count
from igpt_ds.atomic import publish_text
from igpt_ds.errors import UserError

CHUNK = 16384  # images whose embeddings are in memory at a time
THUMBNAIL = 64  # side, pixels
_THUMBNAILS = 32  # a chunk, for the contact sheet
_SLICE = 8192  # images of a listed source that are a unit
_BATCH = 256


class Unit(NamedTuple):
    """A piece of a collection: all of the file `part`, or these items of a listed source, whose part is ""."""

    part: str
    items: list[Item] | None
    name: str


class Chunk(NamedTuple):
    """Some images of a part, in their order, with the arrays that `read` gives."""

    part: str
    path: Path
    rows: int

    def read(self, *names: str) -> list[np.ndarray]:
        """Arrays of the chunk's n readable images, only those asked for.

        ids: S<width> [n]; sha256: uint8 [n, 32]; hash: uint64 [n], perceptual. Where an embedder was given, also
        vectors: float16 [n, dimension], of length 1; thumbnails: uint8 [t, 64, 64, 3], of the rows thumbnail_rows:
        int64 [t], sorted.
        """
        return read_arrays(self.path, *names)


class Embedded(NamedTuple):
    """What a unit came to: its chunks, and how many images could not be read, by reason."""

    chunks: list[Chunk]
    unreadable: Counter[str]


@dataclass(frozen=True)
class EmbedTask:
    """All that a worker needs for one unit; picklable. Without an embedder images are hashed only."""

    directory: Path
    source: Source
    unit: Unit
    embedder: Embedder | None


def units(source: Source, pool: Pool) -> list[Unit]:
    """The pieces of a pool, in a fixed order.

    Raises:
        UserError: the source refuses what it finds.
    """
    if is_streamed(source):
        return [Unit(part, None, _name(part)) for part in cast(StreamedSource, source).parts(pool)]
    items = cast(ListedSource, source).items(pool)
    slices = [items[first : first + _SLICE] for first in range(0, len(items), _SLICE)]
    return [Unit("", each, _name(*(item.id for item in each))) for each in slices]


def _name(*what: str) -> str:
    return hashlib.sha256("\0".join(what).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def stream(source: Source, unit: Unit) -> Iterator[Encoded]:
    """The images of a unit, in their order."""
    if unit.items is None:
        return cast(StreamedSource, source).stream(unit.part)
    return read_listed(cast(ListedSource, source), unit.items)


def images(source: Source, some: list[Unit], number: int) -> Iterator[Image.Image]:
    """About `number` readable images, the first ones of each unit."""
    for unit in some:
        share = -(-number // len(some))
        for encoded in islice(stream(source, unit), share):
            try:
                if isinstance(encoded.data, bytes):
                    yield decode(encoded.data)
            except RejectError:
                continue


def committed(directory: Path, unit: Unit) -> Embedded | None:
    """What an earlier run made of a unit, if it finished."""
    try:
        mark = json.loads((directory / f"{unit.name}.json").read_text())
        chunks = [
            Chunk(unit.part, directory / f"{unit.name}-{number:04d}.npz", int(rows))
            for number, rows in enumerate(mark["chunks"])
        ]
        if all(chunk.path.is_file() for chunk in chunks):
            return Embedded(chunks, Counter({str(reason): int(n) for reason, n in mark["unreadable"].items()}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def embed(task: EmbedTask) -> Embedded:
    """Do one unit, unless it is done.

    Raises:
        UserError: an input file cannot be read to its end, the embedder fails, or the disk is full.
    """
    if done := committed(task.directory, task.unit):
        return done
    unreadable: Counter[str] = Counter()
    chunks: list[Chunk] = []
    encoded = stream(task.source, task.unit)
    # Threads add up in an order of their own; and there is a process a core.
    with threadpool_limits(limits=1):
        while arrays := _chunk(encoded, task.embedder, unreadable):
            path = task.directory / f"{task.unit.name}-{len(chunks):04d}.npz"
            publish_arrays(path, **arrays)
            chunks.append(Chunk(task.unit.part, path, len(arrays["ids"])))
    mark = {
        "part": task.unit.part,
        "chunks": [chunk.rows for chunk in chunks],
        "unreadable": dict(sorted(unreadable.items())),
    }
    publish_text(task.directory / f"{task.unit.name}.json", json.dumps(mark) + "\n")
    return Embedded(chunks, unreadable)


def _chunk(
    encoded: Iterator[Encoded], embedder: Embedder | None, unreadable: Counter[str]
) -> dict[str, np.ndarray] | None:
    """The arrays of the next CHUNK readable images; None where there are no more."""
    ids: list[bytes] = []
    digests: list[bytes] = []
    greys: list[np.ndarray] = []
    prepared: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    thumbnails: list[tuple[int, int, np.ndarray]] = []

    def flush() -> None:
        if greys:
            hashes.append(perceptual_hash(np.stack(greys)))
            greys.clear()
        if prepared and embedder:
            vectors.append(_directions(embedder, np.stack(prepared)))
            prepared.clear()

    while len(ids) < CHUNK and (each := next(encoded, None)):
        image = _image(each)
        count(1, int(isinstance(image, str)))
        if isinstance(image, str):
            unreadable[image] += 1
            continue
        row, digest = len(ids), hashlib.sha256(each.data if isinstance(each.data, bytes) else b"").digest()
        ids.append(_id(each.item.id))
        digests.append(digest)
        greys.append(small_grey(image))
        if embedder:
            prepared.append(embedder.prepare(image))
            # Those of the lowest digests: a fair sample, and of each chunk the same one.
            rank = -int.from_bytes(digest[:7], "big")
            if len(thumbnails) < _THUMBNAILS or rank > thumbnails[0][0]:
                _keep(thumbnails, (rank, row, np.asarray(ImageOps.fit(image, (THUMBNAIL, THUMBNAIL)))))
        if len(greys) == _BATCH:
            flush()
    if not ids:
        return None
    flush()
    arrays = {
        "ids": np.array(ids),
        "sha256": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        "hash": np.concatenate(hashes),
    }
    if embedder:
        shown = sorted((row, thumbnail) for _, row, thumbnail in thumbnails)
        arrays["vectors"] = np.concatenate(vectors)
        arrays["thumbnail_rows"] = np.array([row for row, _ in shown], np.int64)
        arrays["thumbnails"] = np.stack([thumbnail for _, thumbnail in shown])
    return arrays


def _keep(heap: list[Any], entry: Any) -> None:
    (heapq.heappush if len(heap) < _THUMBNAILS else heapq.heappushpop)(heap, entry)


def _image(encoded: Encoded) -> Image.Image | str:
    """The decoded image, or the reason why there is none."""
    if isinstance(encoded.data, UnusableError):
        return encoded.data.reason
    if isinstance(encoded.data, OSError):
        return "unreadable"
    try:
        return decode(encoded.data)
    except RejectError as reject:
        return reject.reason


def _id(name: str) -> bytes:
    found = name.encode("utf-8", "surrogateescape")
    if found.endswith(b"\0"):
        raise UserError(f"{name!r}: an image's id ends in a null byte, which no selection can hold: rename it")
    return found


def _directions(embedder: Embedder, batch: np.ndarray) -> np.ndarray:
    """float16 [n, dimension], of length 1."""
    vectors = embedder.embed(batch).astype(np.float32)
    lengths = np.sqrt((vectors**2).sum(1, keepdims=True))
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError(f"--embedder {embedder.name}: gives vectors without a direction: use other weights")
    return (vectors / lengths).astype(np.float16)
