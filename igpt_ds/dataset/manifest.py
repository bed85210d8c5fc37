"""The manifest of a dataset directory and the record of each shard; what they describe is told in shards.py.

Both are JSON, read strictly: every field there, of the right kind, and none besides. Every rank reads the manifest
when it starts, so that what is asked of each of a hundred thousand shards is asked of all of them at once. NumPy and
the standard library only, as shards.py.
"""

import functools
import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from igpt_ds.atomic import publish_text
from igpt_ds.dataset.storage import STORAGES
from igpt_ds.errors import UserError
from igpt_ds.reading import read_json

FORMAT = "igpt-ds-tokens"
SPLITS = ("train", "val", "test")
VERSION = 1
MOST_SIDE, MOST_ROWS = 1 << 15, 1 << 31  # of an image, of a block: what 64 bits hold as bytes
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no dot (webdataset splits keys there) and no way out of the directory


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without the search for circles of objects, which takes a third of the time where so many are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ShardRecord(NamedTuple):
    """One shard: its name, rows, size and hash, its view, and where its token rows lie (bytes)."""

    name: str
    rows: int
    bytes: int
    sha256: str
    view: int
    token_offset: int
    block_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a dataset directory holds. `rows` counts images: the rows of one view."""

    rows: int
    sequence_length: int
    resolution: int
    rows_per_block: int
    storage: str
    palette: dict[str, Any]  # k, sha256, and distortion: mean squared distance of a pixel to its colour in [-1, 1]
    source: str
    split: str
    views: int
    transform: dict[str, Any]
    seed: int
    classes: list[str] | None  # None: the rows have no labels
    versions: dict[str, str]
    rejected: int
    shards: list[ShardRecord]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Rows, bytes, view, token_offset and block_bytes of each shard: int64 [shards, 5]."""
        columns = itemgetter(*map(ShardRecord._fields.index, ("rows", "bytes", "view", "token_offset", "block_bytes")))
        return np.array(list(map(columns, self.shards)), np.int64).reshape(-1, 5)

    @classmethod
    @_without_collector()
    def load(cls, directory: Path) -> "Manifest":
        """Read and check DIRECTORY/manifest.json."""
        path = Path(directory) / "manifest.json"
        try:
            data = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            if below := splits_in(Path(directory)):
                names = ", ".join(path.name for path in below)
                raise UserError(f"{directory}: holds the splits {names}: name one of them, e.g. {below[0]}") from None
            raise UserError(
                f"{directory}: no manifest.json, half-built or not a dataset: run igpt-data shards again"
            ) from None
        except (OSError, ValueError) as error:
            raise _malformed(path, f"not readable JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise _malformed(path, f"not an {FORMAT} manifest")
        if (version := data.pop("version", None)) != VERSION:
            raise _malformed(path, f"format version {version}, but this program reads version {VERSION}")
        try:
            shards = _records(data.pop("shards"))
            manifest = typed(cls, {**data, "shards": shards})
            fault = manifest._contradiction()
        except (KeyError, TypeError, OverflowError) as error:
            raise _malformed(path, str(error)) from None
        if fault:
            raise _malformed(path, fault)
        return manifest

    def save(self, directory: Path) -> None:
        """Publish DIRECTORY/manifest.json: the last act of building a dataset."""
        shards = [shard._asdict() for shard in self.shards]
        data = {"format": FORMAT, "version": VERSION, **asdict(replace(self, shards=[])), "shards": shards}
        publish_text(Path(directory) / "manifest.json", json.dumps(data, indent=1) + "\n")

    def _contradiction(self) -> str | None:
        form, palette = STORAGES.get(self.storage), self.palette
        if form is None:
            return f"unknown storage {self.storage!r}"
        row_bytes = np.dtype(form.dtype).itemsize * form.width(self.sequence_length)
        rules = {
            f"{self.sequence_length} tokens do not fit a resolution of {self.resolution}": (
                1 <= self.resolution <= MOST_SIDE and self.sequence_length == self.resolution**2
            ),
            f"blocks of {self.rows_per_block} rows": 1 <= self.rows_per_block <= MOST_ROWS,
            "the palette's k or sha256 is missing": (
                type(palette.get("k")) is int and isinstance(palette.get("sha256"), str)
            ),
            "the name of a class is no text": all(isinstance(name, str) for name in self.classes or ()),
            f"it holds {self.rows} rows in {self.views} views of {len(self.shards)} shards": (
                1 <= self.views <= len(self.shards) and self.rows >= 1 and self.rejected >= 0
            ),
            "a shard is listed twice": len({shard.name for shard in self.shards}) == len(self.shards),
        }
        if fault := next((text for text, holds in rules.items() if not holds), None):
            return fault
        if not 1 <= palette["k"] <= form.colours:
            return f"{self.storage} cannot hold tokens of {palette['k']} colours"
        rows, size, view, offset, block = self.table.T
        strange = (view < 0) | (view >= self.views)
        if strange.any():
            shard = self.shards[int(strange.argmax())]
            return f"shard {shard.name!r} belongs to view {shard.view} of {self.views}"
        least, most = np.minimum(np.minimum(rows, offset), block), np.maximum(offset, block)
        strange = (least < 1) | (most > size) | (rows > size // row_bytes)
        strange |= [SHARD_NAME.fullmatch(shard.name) is None for shard in self.shards]
        if strange.any():
            return f"the record of shard {self.shards[int(strange.argmax())].name!r:.80} makes no sense"
        of_view = np.zeros(self.views, np.int64)
        np.add.at(of_view, view, rows)
        if (of_view != self.rows).any():
            return f"its shards hold {of_view[:8].tolist()} rows by view, but it says {self.rows} a view"
        return None


def splits_in(folder: Path) -> list[Path]:
    """The complete splits below a folder."""
    return [folder / name for name in SPLITS if (folder / name / "manifest.json").is_file()]


def _malformed(path: Path, what: str) -> UserError:
    return UserError(f"{path}: malformed ({what}): run igpt-data shards again")


def _records(data: Any) -> list[ShardRecord]:
    """`typed` of each, asked of all at once."""
    kinds = _kinds(ShardRecord)
    if type(data) is list and data and set(map(type, data)) == {dict} and set(map(len, data)) == {len(kinds)}:
        values = list(map(itemgetter(*kinds), data))
        columns = zip(*values, strict=True)
        if all(set(map(type, column)) <= allowed for column, allowed in zip(columns, kinds.values(), strict=True)):
            return list(map(ShardRecord._make, values))
    return [typed(ShardRecord, record) for record in data]  # which says what is wrong


def typed(cls: type, data: Any) -> Any:
    """Build a dataclass or a named tuple from JSON, with every field there, of the right kind, and none besides."""
    kinds = _kinds(cls)
    if not isinstance(data, dict) or kinds.keys() != data.keys():
        raise TypeError(f"the keys should be {', '.join(kinds)}")
    for name, allowed in kinds.items():
        if type(data[name]) not in allowed:
            raise TypeError(f"{name} is {data[name]!r:.80}")
    return cls(**data)


@functools.cache
def _kinds(cls: type) -> dict[str, set[type]]:
    """What types the fields of a class may have."""
    found = {}
    for name, kind in get_type_hints(cls).items():
        allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        found[name] = {get_origin(each) or each for each in allowed}
    return found
