"""Collections of images that are read once, for a selection: what they are, and the reading of them as a step."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.selection.embed import Chunk, Embedded, EmbedTask, Unit, committed, embed, units
from data_prep.selection.embedders import Embedder
from data_prep.shards.progress import Meter
from data_prep.sources import Pool, Source
from data_prep.workers.run import Place, Step
from igpt_ds.errors import UserError

_VERSION = 1  # to be raised when a step makes other things of the same images: what older versions made is left alone


@dataclass(frozen=True)
class Collection:
    """Images of one pool of a source; `where`, its paths and options, tells it from others."""

    source: Source
    pool: Pool
    where: str

    def units(self) -> list[Unit]:
        """Its pieces, in a fixed order.

        Raises:
            UserError: there are none, or the source refuses what it finds.
        """
        found = units(self.source, self.pool)
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
    units: list[Unit]
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
    units: list[Unit]
    embedded: list[Embedded]

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the images."""
        return [chunk for each in self.embedded for chunk in each.chunks]

    @property
    def images(self) -> int:
        """That could be read."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def unreadable(self) -> Counter[str]:
        """Images that could not, by reason."""
        total: Counter[str] = Counter()
        for each in self.embedded:
            total.update(each.unreadable)
        return total

    @property
    def identity(self) -> list[str]:
        """What tells it from any other that was read."""
        return [self.name, *(unit.name for unit in self.units)]

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
    """Read what is not read yet, below the directory `work`; None where jobs of a cluster have still to end.

    Raises:
        UserError: an input file or the embedder fails, or a collection has no image that can be read.
    """
    tasks = [
        EmbedTask(work / each.name, each.collection.source, u, each.embedder) for each in readings for u in each.units
    ]
    listed = [len(task.unit.items) for task in tasks if task.unit.items is not None]
    images = sum(listed) if len(listed) == len(tasks) else None
    step = Step("input files", embed, tasks, lambda task: committed(task.directory, task.unit) is not None, images)
    if not place.run(step, meter):
        return None
    return [_read(each, work / each.name) for each in readings]


def _read(reading: Reading, directory: Path) -> Read:
    embedded = []
    for unit in reading.units:
        done = committed(directory, unit)
        if done is None:
            raise UserError(f"{directory}: files of {unit.part or unit.name} are gone: give the same command again")
        embedded.append(done)
    read = Read(reading.collection, reading.name, reading.units, embedded)
    if not read.images:
        raise UserError(f"{reading.collection.where}: not one of its images can be read: look at its files")
    return read


def fingerprint(*what: object) -> str:
    """A short name for anything that JSON can hold, made by this version of the steps."""
    return hashlib.sha256(json.dumps([_VERSION, *what], sort_keys=True).encode()).hexdigest()[:16]
