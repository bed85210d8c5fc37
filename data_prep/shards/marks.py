"""A shard's commit mark: what it says of the images that the shard was made of, and whether it still holds."""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.images.rejects import Rejected, Tally
from data_prep.sources import Encoded
from igpt_ds.atomic import publish_text, sha256_file, writing
from igpt_ds.dataset.manifest import ShardRecord
from igpt_ds.dataset.shards import read_mark
from igpt_ds.reading import read_json


@dataclass(frozen=True)
class Mark:
    """What a commit mark says.

    Attributes:
        record: the shard; None for a slice without a usable image.
        seen: images of the slice up to the end of this shard, the rejected ones included.
        rejected: those within this shard's images.
        last: is it the slice's last shard?
        passed: hash of the images seen, see `Passed`; None in marks of older versions.
    """

    record: ShardRecord | None
    seen: int
    rejected: list[Rejected]
    last: bool
    passed: str | None


def read(directory: Path, name: str, plan: str, thorough: bool) -> Mark | None:
    """A shard's mark, if the plan of that fingerprint has made it and the shard is there.

    It is there if its file has the recorded size and, where it is looked at thoroughly, hash.
    """
    path = directory / f"{name}.tar"
    try:
        record: ShardRecord | None = None
        if found := read_mark(directory, name):
            record, note = found
            float(note["squared_error"])
            if path.stat().st_size != record.bytes or (thorough and sha256_file(path) != record.sha256):
                return None
        else:
            mark: dict[str, Any] = read_json(directory / f"{name}.json")
            if mark["rows"] != 0:
                return None
            note = mark["note"]
        if note["plan"] != plan:
            return None
        rejected = [Rejected(*each) for each in note["rejected"]]
        return Mark(record, int(note["seen"]), rejected, bool(note["last"]), note.get("passed"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def tally_of(marks: list[Mark]) -> Tally:
    """Of the images up to the last of these shards."""
    tally = Tally(marks[-1].seen if marks else 0)
    for mark in marks:
        for rejected in mark.rejected:
            tally.reject(rejected)
    return tally


class Passed:
    """A hash of the images that a task has seen, in their order: ids, labels, sizes and checksums."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, encoded: Encoded) -> None:
        """The next one."""
        item, data = encoded.item, encoded.data
        what = f"{len(data)}\0{zlib.crc32(data)}" if isinstance(data, bytes) else str(data)
        self._hash.update(f"{item.id}\0{item.label}\0{what}\0".encode("utf-8", "surrogateescape"))

    @property
    def hex(self) -> str:
        """Of those so far."""
        return self._hash.hexdigest()


def adopt(directory: Path, split: str, old: str, new: str, shards: int) -> None:
    """Let the marks of a plan, by its fingerprint, be those of another one, which has so many of its shards or more."""
    with writing(directory):
        for path in [*directory.glob(f"{split}-*.json"), *directory.glob(f"{split}-*.tar")]:  # the marks first
            number = path.stem.removeprefix(f"{split}-")
            if number.isdecimal() and int(number) >= shards:
                path.unlink()
            elif number.isdecimal() and path.suffix == ".json":
                text = path.read_text(encoding="utf-8", errors="replace")
                publish_text(path, text.replace(old, new))
