"""token_arrays: images that are tokens already, as the authors of the paper released theirs.

    TOKENS/imagenet_trX.npy   imagenet_vaX.npy   imagenet_teX.npy      whole numbers [images, side²], raster order
           imagenet_trY.npy   imagenet_vaY.npy   imagenet_teY.npy      labels [images], or one-hot [images, classes]

The paths are such arrays, or a folder of those of one data set. `trX` is the pool "train" and `teX` "test", or `vaX`
with `--option test=validation`; arrays of other names go by the words of docs/data.md, or by `--option pool=`. The
labels of `NAMEX.npy` lie beside it in `NAMEY.npy`, or where `--option labels=FILE` says (`none` leaves them away);
`--option classes=FILE` names the classes, which have numbers otherwise.

The palette must be the one that the tokens were made with. An image is handed on as pixels whose nearest colours are
its tokens, so that the shards hold these very numbers. The files are read in place.

Source: https://github.com/openai/image-gpt, README, "Downloading Datasets".
"""

import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.files.remote import reading
from data_prep.sources import Item, Pool
from data_prep.sources._class_names import read_classes
from data_prep.sources._ppm import ppm
from data_prep.sources._splits import check_pool, files_of
from igpt_ds.dataset.npy import read_header
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular
from igpt_ds.text import listed

CLASS_FILES = ("classes", "labels")
_SPLITS = {"tr": "train", "va": "validation", "te": "test"}
_RELEASED = re.compile(r"_(tr|va|te)X\.npy$")
_MOST_CLASSES, _MOST_SIDE = 1 << 16, 1024
_BLOCK = 1 << 24  # bytes of labels read at once: one-hot ones of ImageNet are gigabytes
_AWAY = 16  # levels of a channel within which a colour's token is looked for


@dataclass(frozen=True)
class Array:
    """A whole .npy file of numbers that is read in place."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def open(cls, path: Path, kinds: str, what: str) -> "Array":
        """Read the header and hold it against the file.

        Args:
            kinds: of numbers that are allowed, by NumPy's letters.
        """
        with reading(path):
            try:
                with open_regular(path) as file:
                    shape, turned, dtype = read_header(file)
                    offset, size = file.tell(), os.fstat(file.fileno()).st_size
            except ValueError as error:
                raise UserError(f"{path}: no .npy file of {what}: {error}: mend the path, or fetch it again") from None
        rows = min(shape, default=0) > 0 and len(shape) in (1, 2)
        if not rows or turned or dtype.kind not in kinds:
            raise UserError(f"{path}: {dtype} {list(shape)}, not {what}: mend the path")
        if size != offset + dtype.itemsize * math.prod(shape):
            raise UserError(f"{path}: {size:,} bytes are not the {list(shape)} of its header: fetch it again")
        return cls(path, shape, dtype, offset)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Some rows: [count, ...]; an OSError if they are not there."""
        width = math.prod(self.shape[1:])
        with open_regular(self.path) as file:
            file.seek(self.offset + first * width * self.dtype.itemsize)
            data = file.read(count * width * self.dtype.itemsize)
        if len(data) < count * width * self.dtype.itemsize:
            raise OSError(f"{self.path.name} ends before the image does")
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


@dataclass(frozen=True)
class TokenArrays:
    """Images of tokens; see `data_prep.sources.TokenSource`. An image's id is its file and its row there.

    Attributes:
        arrays, labels: by the name that tells the pool.
        colours: of the palette, float32 [k, 3] in C order.
        pool, test: as the options say.
    """

    arrays: dict[str, Array]
    labels: dict[str, Array]
    classes: list[str] | None
    colours: bytes
    pool: str | None = None
    test: str | None = None
    name: str = "token_arrays"

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return math.isqrt(next(iter(self.arrays.values())).shape[1])

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool in their order."""
        places = {name: str(array.path) for name, array in self.arrays.items()}
        found = []
        for name in files_of(pool, places, self.pool, self.test):
            count = self.arrays[name].shape[0]
            labels = _labels(self.labels[name]).tolist() if self.classes else [None] * count
            found += [Item(f"{name}/{row:07d}", label) for row, label in enumerate(labels)]
        return found

    def read(self, item_id: str) -> bytes:
        """The image as a PPM file, of colours whose tokens are its own."""
        name, _, row = item_id.rpartition("/")
        tokens, exact = self.arrays[name].rows(int(row), 1)[0], _exact(self.colours)
        if tokens.min() < 0 or tokens.max() >= len(exact):
            raise UserError(
                f"{self.arrays[name].path}: image {int(row)} has tokens from {tokens.min()} to {tokens.max()}, but the "
                f"palette has {len(exact)} colours: give the palette that they were made with"
            )
        return ppm(exact[tokens].reshape(self.side, self.side, 3))

    def files(self, item_id: str) -> list[Path]:
        """Its array, and that of its labels."""
        name = item_id.rpartition("/")[0]
        return [each[name].path for each in (self.arrays, self.labels) if name in each]


def open_source(
    paths: list[str],
    palette: Palette | None,
    *,
    pool: str | None = None,
    test: str | None = None,
    labels: str | None = None,
    classes: str | None = None,
) -> TokenArrays:
    """Find the arrays, and the labels beside them.

    Args:
        palette: that the tokens were made with; None where there is none.
        pool: "train" or "test": that all of the arrays are in.
        test: "test" or "validation": the split that is the pool "test".
        labels: file of the labels of the only array; "none": no labels.
        classes: file with the classes' names, one a line.
    """
    check_pool(pool)
    if palette is None:
        raise UserError("token_arrays: holds tokens, no colours: give their palette to igpt-data shards --palette")
    _exact(palette.colours.tobytes())  # refused before anything is built
    found = [path for given in paths for path in _arrays_in(Path(given))]
    arrays = {_name(path): Array.open(path, "iu", "tokens [images, pixels]") for path in found}
    sides = {array.shape[1] if len(array.shape) == 2 else 0 for array in arrays.values()}
    if len(arrays) < len(found):
        raise UserError(f"token_arrays: two files are called {found[-1].name}: give them different names")
    if len(sides) > 1 or any(math.isqrt(pixels) ** 2 != pixels or not 0 < pixels <= _MOST_SIDE**2 for pixels in sides):
        raise UserError(f"{found[0]}: images of {listed(sorted(sides))} tokens, no squares of one size: mend the path")
    beside = {} if labels == "none" else _labels_of(arrays, labels)
    named = _classes(beside, classes)
    return TokenArrays(arrays, beside, named, palette.colours.tobytes(), pool, test)


def _arrays_in(given: Path) -> list[Path]:
    """A file itself, or the released arrays of a folder, which must be of one data set."""
    if not given.is_dir():
        return [given]
    with reading(given):
        found = sorted(path for path in given.iterdir() if _RELEASED.search(path.name))
    sets = {_RELEASED.sub("", path.name) for path in found}
    if len(sets) != 1:
        told = f"arrays of {', '.join(sorted(sets))}" if sets else "no arrays *_trX.npy, *_vaX.npy or *_teX.npy"
        raise UserError(f"{given}: {told}: give the files of one data set")
    return found


def _name(path: Path) -> str:
    """What the array is called, with a word for its split, see `_splits.files_of`."""
    match = _RELEASED.search(path.name)
    return f"{_SPLITS[match[1]]}/{path.stem}" if match else path.stem


def _labels_of(arrays: dict[str, Array], given: str | None) -> dict[str, Array]:
    """The file of each array's labels; empty where none has any."""
    if given and len(arrays) > 1:
        raise UserError(f"--option labels={given}: of {len(arrays)} arrays: give one, or lay NAMEY.npy beside each")
    paths = {name: Path(given) if given else _beside(array.path) for name, array in arrays.items()}
    there = {name: path for name, path in paths.items() if given or path.exists()}
    if there and len(there) < len(arrays):
        missing = next(path for name, path in paths.items() if name not in there)
        raise UserError(f"{missing}: missing, but other arrays have labels: fetch it, or --option labels=none")
    found = {name: Array.open(path, "iufb", "labels") for name, path in there.items()}
    for name, array in found.items():
        if array.shape[0] != (images := arrays[name].shape[0]):
            raise UserError(f"{array.path}: {array.shape[0]:,} labels for {images:,} images: mend the path")
    return found


def _beside(path: Path) -> Path:
    """NAMEY.npy of NAMEX.npy; of other names there is none."""
    return path.with_name(f"{path.stem[:-1]}Y.npy") if path.stem.endswith("X") else path / "none"


def _classes(labels: dict[str, Array], given: str | None) -> list[str] | None:
    """The classes' names, as many as the labels need."""
    if not labels:
        if given:
            raise UserError(f"--option classes={given}: the arrays have no labels: leave it out")
        return None
    widths = {array.shape[1] for array in labels.values() if len(array.shape) == 2}
    needed = max([*widths, *(int(_labels(array).max()) + 1 for array in labels.values())])
    names = read_classes(given) if given else [str(number) for number in range(needed)]
    if len(names) < needed:
        raise UserError(f"{given}: {len(names)} names for {needed} classes: write one a line")
    return names


@lru_cache(maxsize=4)
def _labels(array: Array) -> np.ndarray:
    """int64 [images]; of one-hot rows the place of the 1."""
    wrong = UserError(f"{array.path}: labels that are no class numbers, nor one-hot: mend the path")
    if len(array.shape) == 2 and array.shape[1] > _MOST_CLASSES:
        raise wrong
    rows = max(1, _BLOCK // (array.dtype.itemsize * math.prod(array.shape[1:])))
    found = []
    for first in range(0, array.shape[0], rows):
        block = array.rows(first, min(rows, array.shape[0] - first))
        if block.ndim == 2:
            numbers = block.argmax(axis=1)
            # One 1, and nothing else.
            right = bool((block[np.arange(len(block)), numbers] == 1).all()) and np.count_nonzero(block) == len(block)
        else:
            right = block.dtype.kind in "iu" and 0 <= int(block.min()) <= int(block.max()) < _MOST_CLASSES
            numbers = block
        if not right:
            raise wrong
        found.append(numbers.astype(np.int64))
    return np.concatenate(found)


@lru_cache(maxsize=2)
def _exact(colours: bytes) -> np.ndarray:
    """Of each entry a colour, uint8 [k, 3], whose nearest entry it is: the entry's own to 8 bits, or one near to it."""
    palette = Palette(np.frombuffer(colours, np.float32).reshape(-1, 3))
    exact = palette.decode(np.arange(palette.k))
    steps = np.arange(-_AWAY, _AWAY + 1)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    away = cube[np.argsort((cube**2).sum(axis=1), kind="stable")]  # the nearest first
    for entry in np.flatnonzero(palette.encode(exact) != np.arange(palette.k)).tolist():
        inside = ((exact[entry] + away >= 0) & (exact[entry] + away < 256)).all(axis=1)
        near = (exact[entry] + away[inside]).astype(np.uint8)
        its = np.flatnonzero(palette.encode(near) == entry)
        if not len(its):
            raise UserError(
                f"token_arrays: no 8-bit colour is nearest to the palette's colour {entry}: it may be there twice, and "
                "its tokens would be lost: give the palette that the tokens were made with"
            )
        exact[entry] = near[its[0]]
    return exact
