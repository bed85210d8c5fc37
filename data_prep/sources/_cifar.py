"""What CIFAR-10 and CIFAR-100 share: two layouts of rows of 3072 bytes, as a folder or as the archive downloaded.

An image's id is its pool and its number there, the same in both layouts, which hold the images in the same order.
A worker keeps a pool's pixels in memory: 154 MB for the training images.

Source: Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html, "Dataset layout".
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.files.remote import opened, reading
from data_prep.files.tar import Member, gunzipped, members, read_member
from data_prep.files.unpickle import bytes_array, unpickle
from data_prep.sources import Item, Pool
from data_prep.sources._ppm import ppm
from igpt_ds.errors import UserError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
_MOST_NAMES, _LONGEST_NAME = 256, 256  # of classes
_LARGEST = 1 << 28  # bytes of one file; CIFAR-100's training file is the largest with 155 MB


@dataclass(frozen=True)
class Layout:
    """One published form.

    Attributes:
        names: the usual names of its folder and archive, for messages.
        files: of each pool.
        classes: the file with the classes' names, and the key of the list where it is a pickle.
        label: the labels' key where the files are pickles, else the label's byte of the `header` ones before a row.
    """

    names: str
    files: dict[Pool, tuple[str, ...]]
    classes: tuple[str, bytes | None]
    label: bytes | int
    header: int = 0


@dataclass(frozen=True)
class Cifar:
    """CIFAR images; see `data_prep.sources.ListedSource`."""

    path: Path
    name: str
    layout: Layout
    classes: list[str]

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool in their published order."""
        _, labels = self._load(pool)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"{self.path}: labels outside the {len(self.classes)} classes: fetch it again")
        return [Item(f"{pool}/{i:05d}", int(label)) for i, label in enumerate(labels)]

    def read(self, item_id: str) -> bytes:
        """The image as a PPM file."""
        pool, _, number = item_id.partition("/")
        pixels, _ = self._load("test" if pool == "test" else "train")
        return ppm(pixels[int(number)].reshape(3, SIDE, SIDE).transpose(1, 2, 0))

    def files(self, item_id: str) -> list[Path]:
        """The archive, or all of its pool's."""
        files = self.layout.files["test" if item_id.startswith("test/") else "train"]
        return [self.path / file for file in files] if self.path.is_dir() else [self.path]

    def _load(self, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
        layout = self.layout
        return _load(self.path, layout.files[pool], layout.label, layout.header)


def open_cifar(paths: Sequence[str], name: str, layouts: Sequence[Layout]) -> Cifar:
    """Find which layout lies at the path and read the classes' names."""
    known = " or ".join(layout.names for layout in layouts)
    if len(paths) != 1:
        raise UserError(f"{name}: {len(paths)} paths: give one, the folder or the archive of {known}")
    for path in _places(Path(paths[0]), layouts):
        found = set(_files(path))
        for layout in layouts:
            needed = {file for files in layout.files.values() for file in files} | {layout.classes[0]}
            if missing := sorted(needed - found):
                if len(missing) < len(needed):
                    raise UserError(f"{path}: {missing[0]} is missing: fetch {layout.names} again")
                continue
            return Cifar(path, name, layout, _class_names(path, *layout.classes))
    raise UserError(f"{paths[0]}: not {name}: give the folder or the archive of {known}")


def _places(path: Path, layouts: Sequence[Layout]) -> list[Path]:
    """The path itself and, where it is the folder around them, the usual names in it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: mend the path")
    if not path.is_dir():
        return [path]
    inside = [path / name for layout in layouts for name in layout.names.split(", ")]
    return [path, *(place for place in inside if place.exists())]


def _class_names(path: Path, file: str, key: bytes | None) -> list[str]:
    data = _read(path, file)
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    names = lines if key is None else unpickle(data, f"{path} {file}").get(key)
    if (
        not isinstance(names, list)
        or len(names) > _MOST_NAMES
        or not all(isinstance(name, bytes | str) and len(name) <= _LONGEST_NAME for name in names)
    ):
        raise UserError(f"{path} {file}: no list of class names: fetch it again")
    text = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]
    return [name.strip() for name in text if name.strip()]


@lru_cache(maxsize=2)
def _load(path: Path, files: tuple[str, ...], label: bytes | int, header: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [n, 3072] in the order channel, row, column, and labels, int64 [n]."""
    pixels, labels = [], []
    for file in files:
        where = f"{path} {file}"
        data = _read(path, file)
        if isinstance(label, bytes):
            content = unpickle(data, where)
            rows = bytes_array(content.get(b"data"), where)
            values = content.get(label)
            if not isinstance(values, list):
                raise UserError(f"{where}: its labels are no list of numbers: fetch it again")
            if rows.ndim != 2 or rows.shape[1] != PIXELS or len(values) != len(rows):
                raise UserError(f"{where}: not as many labels as images of 32 x 32: fetch it again")
            if not all(type(value) is int and 0 <= value < 256 for value in values):
                raise UserError(f"{where}: labels that are no class numbers: fetch it again")
            numbers = np.array(values, np.int64)
        else:
            if not data or len(data) % (header + PIXELS):
                raise UserError(f"{where}: {len(data)} bytes are no whole number of images: fetch it again")
            table = np.frombuffer(data, np.uint8).reshape(-1, header + PIXELS)
            rows, numbers = table[:, header:], table[:, label].astype(np.int64)
        pixels.append(rows)
        labels.append(numbers)
    return np.concatenate(pixels), np.concatenate(labels)


@lru_cache(maxsize=2)
def _archive(path: Path) -> tuple[BinaryIO, dict[str, Member]]:
    plain = gunzipped(path, 1 << 30) if re.search(r"\.(tar\.gz|tgz)$", path.name) else opened(str(path))
    found = {m.name.rpartition("/")[2]: m for m in members(plain, str(path)) if m.other is None}
    return plain, found


def _files(path: Path) -> list[str]:
    if not path.is_dir():
        return list(_archive(path)[1])
    with reading(path):
        return [entry.name for entry in path.iterdir() if entry.is_file()]


def _read(path: Path, file: str) -> bytes:
    with reading(path / file):
        if path.is_dir():
            with (path / file).open("rb") as handle:
                data = handle.read(_LARGEST + 1)
        else:
            plain, found = _archive(path)
            data = read_member(plain, found[file].offset, found[file].size, _LARGEST + 1)
    if len(data) > _LARGEST:
        raise UserError(f"{path} {file}: larger than any file of CIFAR: mend the path")
    return data
