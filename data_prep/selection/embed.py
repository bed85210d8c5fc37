"""Read a collection once: of every image its embedding, perceptual hash and sha256, kept for the later steps.

The unit of work is a piece of the source (see `data_prep.images.pieces`). It publishes chunks of at most CHUNK images,
PIECE-0000.npz and so on, and last PIECE.json, its commit mark; one that has its mark is not read again. A piece is
named by a hash of what it holds, so that a collection that has grown costs only what is new. An image that cannot be
decoded is counted by its reason and has no row.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits

from data_prep.files.npz import publish_arrays, read_arrays
from data_prep.images.pieces import Piece, stamp, stream
from data_prep.images.rejects import Tally
from data_prep.selection.embedders import Embedder
from data_prep.selection.perceptual_hash import perceptual_hash, small_grey
from data_prep.sources import Encoded, Source, UnusableError
from data_prep.workers.pool import count
from data_prep.workers.run import Done
from igpt_ds.atomic import publish_text
from igpt_ds.errors import UserError
from igpt_ds.images.decode import RejectError, decode
from igpt_ds.reading import read_json

CHUNK = 16384  # images whose embeddings are in memory at a time
THUMBNAIL = 64  # side, pixels
_THUMBNAILS = 32  # a chunk, for the contact sheet
PIECE = 8192  # images of a listed source
_BATCH = 256


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
        arrays = read_arrays(self.path, *names)
        for name, array in zip(names, arrays, strict=True):
            fits = array.shape[:1] == (self.rows,)
            if name == "thumbnail_rows":
                fits = array.dtype == np.int64 and (array.size == 0 or 0 <= array.min() <= array.max() < self.rows)
            if not fits and name != "thumbnails":
                raise UserError(f"{self.path}: {name} of other images: remove it and give the command again")
        return arrays


class Embedded(NamedTuple):
    """What a piece came to: its chunks, how many images could not be read, by reason, and a hash of all that could."""

    chunks: list[Chunk]
    unreadable: Counter[str]
    content: str = ""  # of pieces that an older version has read

    @property
    def tally(self) -> Tally:
        """Of its images."""
        return Tally(sum(chunk.rows for chunk in self.chunks) + self.unreadable.total(), self.unreadable)


@dataclass(frozen=True)
class EmbedTask:
    """All that a worker needs for one piece; picklable. Without an embedder images are hashed only."""

    directory: Path
    source: Source
    piece: Piece
    embedder: Embedder | None


def images(source: Source, some: list[Piece], number: int) -> Iterator[Image.Image]:
    """About `number` readable images, the first ones of each piece."""
    for piece in some:
        share = -(-number // len(some))
        for encoded in islice(stream(source, piece), share):
            try:
                if isinstance(encoded.data, bytes):
                    yield decode(encoded.data)
            except RejectError:
                continue


def committed(directory: Path, piece: Piece, read: list[int] | str | None = None) -> Embedded | None:
    """What an earlier run made of a piece, if it finished.

    Args:
        read: what the piece's file is now, where that is known; what was made of another is not given.
    """
    name = piece.digest
    try:
        mark = read_json(directory / f"{name}.json")
        chunks = [
            Chunk(piece.part, directory / f"{name}-{number:04d}.npz", int(rows))
            for number, rows in enumerate(mark["chunks"])
        ]
        same = read is None or mark.get("input") in (None, read)  # older versions have not kept what all were
        if same and all(chunk.path.is_file() for chunk in chunks):
            unreadable = Counter({str(reason): int(n) for reason, n in mark["unreadable"].items()})
            return Embedded(chunks, unreadable, str(mark.get("content", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def embedded(task: EmbedTask) -> Done | None:
    """What a task that is done has read; None if it is not done."""
    found = committed(task.directory, task.piece, stamp(task.source, task.piece))
    return found and Done(found.tally, found.tally.seen)


def embed(task: EmbedTask) -> Done:
    """Do one piece, unless it is done."""
    if done := embedded(task):
        return done
    name, part = task.piece.digest, task.piece.part
    unreadable: Counter[str] = Counter()
    chunks: list[Chunk] = []
    content, read = hashlib.sha256(), stamp(task.source, task.piece)
    encoded = stream(task.source, task.piece)
    # Threads add up in an order of their own; and there is a process a core.
    with threadpool_limits(limits=1):
        while arrays := _chunk(encoded, task.embedder, unreadable):
            path = task.directory / f"{name}-{len(chunks):04d}.npz"
            publish_arrays(path, **arrays)
            content.update(b"\0".join([*arrays["ids"].tolist(), arrays["sha256"].tobytes()]))
            chunks.append(Chunk(part, path, len(arrays["ids"])))
    mark = {
        "part": part,
        "chunks": [chunk.rows for chunk in chunks],
        "unreadable": dict(sorted(unreadable.items())),
        "content": content.hexdigest(),
        "input": read,
    }
    publish_text(task.directory / f"{name}.json", json.dumps(mark) + "\n")
    return Done(Embedded(chunks, unreadable).tally)


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
