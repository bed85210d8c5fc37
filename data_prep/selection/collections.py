"""Collections of images that are read once, for a selection: what they are, and the reading of them as a step."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.images.pieces import Piece, pieces_of, stamp
from data_prep.selection.embed import PIECE, Chunk, Embedded, EmbedTask, committed, embed, embedded
from data_prep.selection.embedders import Embedder
from data_prep.sources import Pool, Source
from data_prep.workers.run import Meter, Place, Step, nothing
from igpt_ds.errors import UserError

_VERSION = 1  # to be raised when a step makes other things of the same images: what older versions made is left alone


@dataclass(frozen=True)
class Collection:
    """Images of one pool of a source; `where`, its paths and options, tells it from others."""

    source: Source
    pool: Pool
    where: str

    def pieces(self) -> list[Piece]:
        """Its pieces, in a fixed order."""
        found = pieces_of(self.source, self.pool, PIECE)
        if not found:
            raise UserError(f"{self.where}: holds no {self.pool} images: give another source or path")
        return found


class Reading(NamedTuple):
    """A collection to be read.

    Attributes:
        embedder: None where the images are hashed only.
        identity: of all that the embedder's vectors depend on besides the images.
    """

    collection: Collection
    pieces: list[Piece]
    embedder: Embedder | None
    identity: str | None

    @property
    def name(self) -> str:
        """Of the directory of what is read."""
        return f"embedded-{fingerprint(self.collection.where, self.collection.pool, self.identity)}"


class Read(NamedTuple):
    """A collection that was read."""

    collection: Collection
    name: str
    pieces: list[Piece]
    found: list[Embedded]

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the images."""
        return [chunk for each in self.found for chunk in each.chunks]

    @property
    def images(self) -> int:
        """That could be read."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def unreadable(self) -> Counter[str]:
        """Images that could not, by reason."""
        total: Counter[str] = Counter()
        for each in self.found:
            total.update(each.unreadable)
        return total

    @property
    def identity(self) -> list[str]:
        """What tells it from any other that was read."""
        return [self.name, *(piece.digest + its.content for piece, its in zip(self.pieces, self.found, strict=True))]

    def record(self) -> dict[str, Any]:
        """For people: which images these were, wherever they lay."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            digest.update(chunk.read("sha256")[0].tobytes())
        return {
            "source": self.collection.source.name,
            "images": self.images,
            "unreadable": self.unreadable.total(),
            "sha256": digest.hexdigest(),
        }


def read_all(readings: list[Reading], work: Path, place: Place, meter: Meter) -> list[Read] | None:
    """Read what is not read yet, below the directory `work`; None where jobs of a cluster have still to end."""
    tasks = [
        EmbedTask(work / each.name, each.collection.source, piece, each.embedder)
        for each in readings
        for piece in each.pieces
    ]
    listed = [len(task.piece.items) for task in tasks if task.piece.items is not None]
    images = sum(listed) if len(listed) == len(tasks) else None
    if not place.run(
        Step("parts are not read", tasks, embed, embedded, nothing, images=images, readings=images), meter
    ):
        return None
    return [_read(each, work / each.name) for each in readings]


def _read(reading: Reading, directory: Path) -> Read:
    found = []
    for piece in reading.pieces:
        done = committed(directory, piece, stamp(reading.collection.source, piece))
        if done is None:
            part = piece.part or piece.digest
            raise UserError(f"{part}: has changed, or its files in {directory} are gone: give the same command again")
        found.append(done)
    read = Read(reading.collection, reading.name, reading.pieces, found)
    if not read.images:
        raise UserError(f"{reading.collection.where}: not one of its images can be read: look at its files")
    return read


def fingerprint(*what: object) -> str:
    """A short name for anything that JSON can hold, made by this version of the steps."""
    return hashlib.sha256(json.dumps([_VERSION, *what], sort_keys=True).encode()).hexdigest()[:16]
