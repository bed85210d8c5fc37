"""The selection file: which images of a pool are to be built, made by `igpt-data select`, read by `igpt-data shards`.

One .npz (a zip, stored, without dates: the same selection gives the same bytes). Its members:

    selection.json.npy   uint8 [bytes]: the JSON below
    ids/<n>.npy          S<width> [rows]: the ids that are kept of the n-th part, in the order of the stream

    {"format": "igpt-ds selection", "version": 1, "source": "img2dataset", "inputs": 1000, "kept": 900,
     "dropped": {"unreadable": 3, ...}, "parts": {"00000.tar": {"member": 0, "kept": 90}, ...}, "settings": {...}}

inputs = kept + the sum of dropped, always. A source that lists its images has one part, called "". Part names and
ids are bytes that need not be UTF-8: they are `name.encode("utf-8", "surrogateescape")`. The ids of a part are
read when they are asked for, so that a selection of 10^8 images costs its reader one part at a time.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files.npz import DAMAGE, read_member, write_member
from igpt_ds.atomic import publish_file, sha256_file
from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular, parse_json

FORMAT, VERSION = "igpt-ds selection", 1
_JSON = "selection.json"
_REMEDY = "make it anew with igpt-data select"


@dataclass(frozen=True)
class Selection:
    """An opened selection file. Small and picklable: it travels to the workers, who read the ids they need.

    Attributes:
        path: the file.
        source: name of the source that it was made from.
        sha256: hex sha256 of the file: the selection's identity.
        inputs, images: number of images that there were, and that are kept.
        dropped: number of images by the reason that dropped them.
        settings: what the selection was made with.
        members: by part name, (number of its member, kept images).
    """

    path: Path
    source: str
    sha256: str
    inputs: int
    images: int
    dropped: dict[str, int]
    settings: dict[str, Any]
    members: dict[str, tuple[int, int]]

    @property
    def parts(self) -> list[str]:
        """Names of the source's parts, also of those of which nothing is kept."""
        return list(self.members)

    @classmethod
    def open(cls, path: Path) -> "Selection":
        """Read all but the ids."""
        path = Path(path)
        try:
            record = parse_json(_member(path, _JSON).tobytes())
            if record["format"] != FORMAT:
                raise ValueError("format")
            if record["version"] != VERSION:
                raise UserError(f"{path}: selection of version {record['version']}, not {VERSION}: {_REMEDY}")
            members = {name: (int(part["member"]), int(part["kept"])) for name, part in record["parts"].items()}
            selection = cls(
                path=path,
                source=str(record["source"]),
                sha256=sha256_file(path),
                inputs=int(record["inputs"]),
                images=int(record["kept"]),
                dropped={str(reason): int(count) for reason, count in record["dropped"].items()},
                settings=dict(record["settings"]),
                members=members,
            )
        except FileNotFoundError:
            raise UserError(f"{path}: no such selection: make one with igpt-data select") from None
        except (*DAMAGE, AttributeError) as error:
            raise UserError(f"{path}: not a readable selection: {_REMEDY}") from error
        if _sum_is_wrong(selection.inputs, selection.images, selection.dropped, members):
            raise UserError(f"{path}: its counts do not add up: {_REMEDY}")
        return selection

    def kept(self, part: str) -> frozenset[bytes]:
        """The ids of one part that are kept, `id.encode("utf-8", "surrogateescape")`; only that member is read."""
        if part not in self.members:
            raise UserError(
                f"{self.path}: was made without {part or 'this source'}: select again from all that is to be built"
            )
        member, rows = self.members[part]
        try:
            ids = _member(self.path, f"ids/{member}")
        except DAMAGE as error:
            raise UserError(f"{self.path}: ids of part {part or member} cannot be read: {_REMEDY}") from error
        if ids.dtype.kind != "S" or ids.shape != (rows,):
            raise UserError(f"{self.path}: ids of part {part or member} are damaged: {_REMEDY}")
        return frozenset(ids.tolist())


def write_selection(
    path: Path,
    source: str,
    parts: Iterator[tuple[str, np.ndarray]],
    *,
    inputs: int,
    dropped: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Selection:
    """Publish a selection, whole or not at all.

    Args:
        parts: (name, kept ids S<width> [rows]) of every part, one after the other.
        inputs: number of images of all parts.
        dropped: number of images by the reason that dropped them.
        settings: what the selection was made with, for JSON.

    Raises:
        ValueError: inputs are not kept and dropped together: nothing is published.
    """
    members: dict[str, tuple[int, int]] = {}
    with publish_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, ids in parts:
            write_member(archive, f"ids/{len(members)}", ids)
            members[name] = (len(members), len(ids))
        kept = sum(rows for _, rows in members.values())
        if _sum_is_wrong(inputs, kept, dropped, members):
            raise ValueError(f"{inputs} inputs, but {kept} kept and {dict(dropped)} dropped")
        record = {
            "format": FORMAT,
            "version": VERSION,
            "source": source,
            "inputs": inputs,
            "kept": kept,
            "dropped": dict(dropped),
            "settings": dict(settings),
            "parts": {name: {"member": member, "kept": rows} for name, (member, rows) in members.items()},
        }
        write_member(archive, _JSON, np.frombuffer(json.dumps(record).encode(), np.uint8))
    return Selection.open(path)


def _sum_is_wrong(inputs: int, kept: int, dropped: Mapping[str, int], members: Mapping[str, tuple[int, int]]) -> bool:
    counts = [inputs, kept, *dropped.values()]
    parts = sum(rows for _, rows in members.values())
    return min(counts) < 0 or inputs != kept + sum(dropped.values()) or kept != parts


def _member(path: Path, name: str) -> np.ndarray:
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        return read_member(archive, name)
