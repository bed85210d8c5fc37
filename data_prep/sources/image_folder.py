"""image_folder: a folder a class with images at any depth below it, or one folder of unlabelled images.

    IMAGES/cat/1.png                IMAGES/1.png
    IMAGES/cat/holiday/2.jpg        IMAGES/2.jpg
    IMAGES/dog/3.webp
    labelled: cat 0, dog 1          unlabelled

The classes are the sorted names of the folders. Files are images by their suffix; other files and whatever
starts with a dot are passed over. A folder does not say whether its images are for training or for testing: both
pools are all of them, so that a folder of test images is built with --split test.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import MAX_BYTES
from data_prep.sources import Item, Pool
from igpt_ds.errors import UserError

_JPEG, _PNM = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = (*_JPEG, *_PNM, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolder:
    """Images below `root`; see `data_prep.sources.ListedSource`."""

    root: Path
    classes: list[str] | None
    name: str = "image_folder"

    def items(self, pool: Pool) -> list[Item]:
        """All images, whatever the pool, sorted by id within a class."""
        if self.classes is None:
            items = [Item(i, None) for i in sorted(_images(self.root, ""))]
        else:
            labelled = enumerate(self.classes)
            items = [Item(i, n) for n, c in labelled for i in sorted(_images(self.root / c, f"{c}/"))]
        if not items:
            raise UserError(f"{self.root}: no images: give a folder of images or of class folders")
        return items

    def read(self, item_id: str) -> bytes:
        """The file's bytes."""
        with (self.root / item_id).open("rb") as file:
            return file.read(MAX_BYTES + 1)


def open_source(paths: list[str]) -> ImageFolder:
    """Look at the top of the folder: are there classes?"""
    if len(paths) != 1:
        raise UserError(f"{' '.join(paths[1:])}: image_folder reads one folder: give one")
    path = paths[0]
    root = Path(path)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{path}: {what}: give a folder of images or of class folders")
    entries = _entries(root)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_image(entry))
    if classes and loose:
        raise UserError(
            f"{path}: images such as {loose[0]} beside folders such as {classes[0]}: "
            "move all images into class folders, or all out of them"
        )
    return ImageFolder(root, classes or None)


def _images(folder: Path, prefix: str) -> Iterator[str]:
    for entry in _entries(folder):
        # Links to folders are followed at the top (class folders) only: below, they could run in circles.
        if entry.is_dir(follow_symlinks=False):
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif _is_image(entry):
            yield prefix + entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot list ({error.strerror}): mend its permissions") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    # A regular file, too: reading a pipe or a device would hang.
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()
