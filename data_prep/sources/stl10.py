"""stl10: STL-10 in its binary layout, unpacked.

    stl10_binary/
        train_X.bin, train_y.bin       5 000 images of 96 x 96 and their labels 1 to 10
        test_X.bin, test_y.bin         8 000
        unlabeled_X.bin                100 000, left out unless `--option part=unlabeled` asks for them
        class_names.txt

The path is that folder or the one around it; the archive stl10_binary.tar.gz cannot be read at will and is to be
unpacked first. The pool "train" has the training images and "test" the test images; with `part=unlabeled`, "train"
has the unlabelled images and nothing else, and no image has a label. The files are read in place.

Source: Coates, Lee, Ng 2011; https://cs.stanford.edu/~acoates/stl10/: each channel column by column.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files.remote import read_text, reading
from data_prep.sources import Item, Pool
from data_prep.sources._ppm import ppm
from igpt_ds.errors import UserError

SIDE = 96
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Stl10:
    """STL-10 images; see `data_prep.sources.ListedSource`. An image's id is its file and its number there."""

    folder: Path
    classes: list[str] | None
    name: str = "stl10"

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool in their published order."""
        if self.classes is None:
            count = _images(self.folder / "unlabeled_X.bin") if pool == "train" else 0
            return [Item(f"unlabeled/{i:06d}", None) for i in range(count)]
        count = _images(self.folder / f"{pool}_X.bin")
        path = self.folder / f"{pool}_y.bin"
        with reading(path):
            labels = np.fromfile(path, np.uint8)
        if len(labels) != count:
            raise UserError(f"{path}: {len(labels)} labels for {count} images: fetch stl10_binary again")
        if count and not 1 <= labels.min() <= labels.max() <= len(self.classes):
            raise UserError(f"{path}: labels outside 1 to {len(self.classes)}: fetch stl10_binary again")
        return [Item(f"{pool}/{i:06d}", int(label) - 1) for i, label in enumerate(labels)]

    def read(self, item_id: str) -> bytes:
        """The image as a PPM file."""
        file, _, number = item_id.partition("/")
        with (self.folder / f"{file}_X.bin").open("rb") as images:
            images.seek(int(number) * PIXELS)
            data = images.read(PIXELS)
        if len(data) < PIXELS:
            raise OSError(f"{file}_X.bin ends before the image does")
        return ppm(np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(2, 1, 0))

    def files(self, item_id: str) -> list[Path]:
        """The one of its pool."""
        return [self.folder / f"{item_id.partition('/')[0]}_X.bin"]


def open_source(paths: list[str], *, part: str | None = None) -> Stl10:
    """Find the files.

    Args:
        part: "labelled" (as without it) or "unlabeled".
    """
    if part not in {None, "labelled", "unlabeled"}:
        raise UserError(f"--option part={part}: no such part: choose labelled or unlabeled")
    if len(paths) != 1:
        raise UserError(f"stl10: {len(paths)} paths: give one, the folder stl10_binary")
    given = Path(paths[0])
    if not given.is_dir():
        what = "an archive: unpack it, and give" if given.is_file() else "no such folder: give"
        raise UserError(f"{given}: {what} the folder stl10_binary")
    folder = given / "stl10_binary" if (given / "stl10_binary").is_dir() else given
    wanted = ["unlabeled_X.bin"]
    if part != "unlabeled":
        wanted = ["class_names.txt", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"]
    for name in wanted:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing: give the folder stl10_binary, unpacked")
    if part == "unlabeled":
        return Stl10(folder, None)
    return Stl10(folder, read_text(str(folder / "class_names.txt"), "class names").split())


def _images(path: Path) -> int:
    with reading(path):
        size = path.stat().st_size
    if size == 0 or size % PIXELS:
        raise UserError(f"{path}: {size} bytes are no whole number of images: fetch stl10_binary again")
    return size // PIXELS
