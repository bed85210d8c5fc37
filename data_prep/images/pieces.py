"""A piece of a source is what one task reads. Here sources are cut into pieces, and these are streamed and decoded."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.images.rejects import Rejected
from data_prep.sources import Encoded, FiledSource, Item, PlacedSource, Pool, Source, StreamedSource, UnusableError
from igpt_ds.images.transforms import RejectError, Transform


class Piece(NamedTuple):
    """All of an input file, of a streamed source; some images, of one that lists them.

    Attributes:
        part: the input file; "" where images are listed.
        items: the images; None where a file is read.
    """

    part: str
    items: list[Item] | None

    @property
    def names(self) -> list[str]:
        """What it holds: its file, or its images' ids."""
        return [self.part] if self.items is None else [item.id for item in self.items]

    @property
    def digest(self) -> str:
        """A name of its own: a hash of what it holds."""
        return hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def pieces_of(source: Source, pool: Pool, images: int) -> list[Piece]:
    """The pieces of a pool, in a fixed order.

    Args:
        images: of a piece, at most, of a source that lists them.
    """
    if isinstance(source, StreamedSource):
        return [Piece(part, None) for part in source.parts(pool)]
    return cut(source.items(pool), images)


def cut(items: list[Item], images: int) -> list[Piece]:
    """Listed images in pieces of so many."""
    return [Piece("", items[first : first + images]) for first in range(0, len(items), images)]


def stamp(source: Source, piece: Piece) -> list[int] | str | None:
    """What changes where a piece's images do; None where that cannot be seen without reading them.

    Returns:
        Size and time (nanoseconds) of an input file; where images are listed, a hash of ids, labels and files.
    """
    if piece.items is not None:
        return _stamp_of_listed(source, piece.items) if isinstance(source, FiledSource) else None
    if not isinstance(source, PlacedSource):
        return None
    try:
        found = os.stat(source.place(piece.part))  # noqa: PTH116 (of a URL there is none)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _stamp_of_listed(source: FiledSource, items: list[Item]) -> str:
    digest = hashlib.sha256()
    states: dict[Path, str] = {}  # many images may lie in one file
    for item in items:
        digest.update(f"{item.id}\0{item.label}\0".encode("utf-8", "surrogateescape"))
        for path in source.files(item.id):
            if path not in states:
                states[path] = _state(path)
            digest.update(states[path].encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    """Also when a file was put in its place: what is copied or unpacked may bear the time of another."""
    try:
        found = path.stat()
    except OSError as error:
        return f"{error.errno}\0"
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"


def stream(source: Source, piece: Piece) -> Iterator[Encoded]:
    """The images of a piece, in their order; one that cannot be read carries its error."""
    if isinstance(source, StreamedSource):
        yield from source.stream(piece.part)
        return
    for item in piece.items or []:
        try:
            yield Encoded(item, source.read(item.id))
        except OSError as error:
            yield Encoded(item, error)


def pixels(encoded: Encoded, transform: Transform, views: Sequence[int] = (0,)) -> list[np.ndarray] | Rejected:
    """Decode one image and transform it, for each view: uint8 [height, width, 3], or why not."""
    item, data = encoded.item, encoded.data
    if isinstance(data, UnusableError):
        return Rejected(item.id, data.reason, data.detail)
    if isinstance(data, OSError):
        return Rejected(item.id, "unreadable", data.strerror or str(data))
    try:
        return transform.views(data, item.id, views)
    except RejectError as reject:
        return Rejected(item.id, reject.reason, reject.detail)


def unit_hash(purpose: str, image_id: str) -> float:
    """A number in [0, 1) from a hash of the id; `purpose` keeps different uses independent."""
    key = f"{purpose}\0{image_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / (1 << 48)
