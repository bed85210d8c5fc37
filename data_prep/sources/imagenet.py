"""imagenet: ILSVRC 2012 as published, the tars as they were downloaded or unpacked.

    ILSVRC/train/n01440764/n01440764_10026.JPEG    or ILSVRC/ILSVRC2012_img_train.tar, with a tar a class in it
    ILSVRC/val/ILSVRC2012_val_00000001.JPEG        or ILSVRC/ILSVRC2012_img_val.tar, both with the devkit
    ILSVRC/val/n01751748/ILSVRC2012_val_....JPEG   or in class folders, which need no devkit
    ILSVRC/ILSVRC2012_devkit_t12.tar.gz            or the folder ILSVRC2012_devkit_t12

The path is the folder around them, or the paths are single ones of them. The pool "train" has the 1 281 167 training
images, "test" the 50 000 official validation images. Labels are positions among the sorted synsets, and the synsets
(n01440764, ...) are the classes' names. Ids are the same in every layout: n01440764/n01440764_10026.JPEG and
ILSVRC2012_val_00000001.JPEG; so `--holdout 0.04` always holds out the same images.

For validation images that are not in class folders, `--option truth=FILE` gives another source of their classes than
the devkit: a text file with one line an image, in the order of the images' names or with the name before the class;
Kaggle's LOC_val_solution.csv is such a file. Synsets need nothing more; numbers need `--option order=ilsvrc` (the
devkit's ids, with meta.mat beside the file) or `--option order=synset` (positions among the sorted synsets): see
`data_prep.sources._ilsvrc`.

The tars are read where they are; the training tar is indexed once: see `data_prep.files.tar_index`. The known oddities
(CMYK JPEGs, a PNG named .JPEG, EXIF) are the decoder's work, which goes by a file's content, not by its suffix.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.files.folders import is_file, is_folder, is_left_out, visible
from data_prep.files.remote import opened, reading
from data_prep.files.tar_index import Entry, images_of, tar_index
from data_prep.sources import Item, Pool
from data_prep.sources._ilsvrc import WNID, devkit_synsets, validation_synsets
from data_prep.sources.image_folder import SUFFIXES
from igpt_ds.errors import UserError
from igpt_ds.images import MAX_BYTES

CLASS_FILES = ("truth",)
_ROLES = {
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC2012_img_train.tar"),
    "val": ("val", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar"),
    "devkit": ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz"),
}


@dataclass(frozen=True)
class ImageNet:
    """ILSVRC 2012; see `data_prep.sources.ListedSource`. Each of the paths may be missing."""

    train: Path | None
    val: Path | None
    truth: Path | None
    order: str | None
    classes: list[str]
    name: str = "imagenet"

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool, sorted by id."""
        labels = {synset: label for label, synset in enumerate(self.classes)}
        if pool == "train":
            ids = [] if self.train is None else _train_ids(self.train)
            return [Item(i, labels[i.partition("/")[0]]) for i in ids]
        if self.val is None:
            return []
        folders = _validation_folders(self.val) if self.val.is_dir() else {}
        ids = sorted(folders) if self.val.is_dir() else _decoded(tar_index(self.val, _validation_images).ids)
        if any(folders.values()):
            synsets = [folders[i] for i in ids]
        elif self.truth is None:
            raise UserError(
                f"{self.val}: no classes: put ILSVRC2012_devkit_t12.tar.gz beside it, or --option truth=FILE"
            )
        else:
            synsets = validation_synsets(self.truth, self.order, ids, self.classes)
        if unknown := sorted(set(synsets) - set(labels)):
            raise UserError(
                f"{self.val}: images of {unknown[0]}, none of the {len(labels)} classes: mend the list of classes"
            )
        return [Item(i, labels[synset]) for i, synset in zip(ids, synsets, strict=True)]

    def read(self, item_id: str) -> bytes:
        """The file's bytes."""
        (path,) = self.files(item_id)
        if path in (self.train, self.val):
            return tar_index(path, _train_entries if "/" in item_id else _validation_images).read(item_id)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)

    def files(self, item_id: str) -> list[Path]:
        """Its own, or the tar."""
        in_training = "/" in item_id
        root = self.train if in_training else self.val
        if root is None:
            raise FileNotFoundError("no such pool")
        if not root.is_dir():
            return [root]
        return [(root if in_training else root / _folders_for_reading(root).get(item_id, "")) / item_id]


def open_source(paths: list[str], *, truth: str | None = None, order: str | None = None) -> ImageNet:
    """Find the parts of ImageNet and the classes.

    Args:
        truth: a file of the validation images' classes, or a devkit.
        order: "ilsvrc" or "synset", of a `truth` file of numbers.
    """
    if order not in {None, "ilsvrc", "synset"}:
        raise UserError(f"--option order={order}: no such order: choose ilsvrc or synset")
    found = _found([Path(path) for path in paths])
    train, val, devkit = found.get("train"), found.get("val"), found.get("devkit")
    chosen = Path(truth) if truth else devkit
    if train:
        classes = _synsets(train) if train.is_dir() else _tar_synsets(train)
    elif devkit:
        classes = devkit_synsets(devkit)
    else:
        classes = sorted({folder for folder in _validation_folders(val).values() if folder}) if val else []
    if not classes:
        raise UserError(
            f"{paths[0]}: which classes there are is not known: give the training images or the devkit, too"
        )
    return ImageNet(train, val, chosen, order, classes)


def folders_of_classes(paths: Sequence[str]) -> list[str]:
    """Those among the parts of ImageNet at the paths: whatever lies in them is taken for a class or an image."""
    found = _found([Path(path) for path in paths])
    return [str(found[role]) for role in ("train", "val") if role in found and found[role].is_dir()]


def _found(paths: list[Path]) -> dict[str, Path]:
    """The parts of ImageNet among the paths, and else in the folders that they are."""
    found: dict[str, Path] = {}
    roles = {name: role for role, names in _ROLES.items() for name in names}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder: mend the path")
    # By its own name, or else, as for "." and links of other names, by that of the place.
    named = {path: role for path in paths if (role := roles.get(path.name) or roles.get(path.resolve().name))}
    around = [path / name for path in paths if path not in named and path.is_dir() for name in roles]
    for places in (named, {place: roles[place.name] for place in around}):
        before = dict(found)
        for place, role in places.items():
            if role in before or not place.exists():
                continue
            if role in found and role != "devkit":
                raise UserError(f"{found[role]}: {place.name} is there, too: give the path of the one to read")
            found.setdefault(role, place)
    if not {"train", "val"} & set(found):
        where = paths[0] if paths else "imagenet"
        raise UserError(
            f"{where}: no ImageNet: give the folder of train/ or ILSVRC2012_img_train.tar, val/ or ..._val.tar"
        )
    return found


def _synsets(folder: Path) -> list[str]:
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        if not WNID.fullmatch(name) or not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no class folder such as n01440764: move it away")
    return names


def _train_ids(train: Path) -> list[str]:
    if not train.is_dir():
        return _decoded(tar_index(train, _train_entries).ids)
    ids = [f"{synset}/{name}" for synset in _synsets(train) for name in _images(train / synset)]
    if not ids:
        raise UserError(f"{train}: no images: mend the path")
    return ids


def _images(folder: Path) -> list[str]:
    return [each.name for each in visible(folder) if each.name.lower().endswith(SUFFIXES) and is_file(each)]


def _validation_folders(val: Path) -> dict[str, str]:
    """The folder of each validation image, "" where they lie flat."""
    if not val.is_dir():
        return {}
    flat = _images(val)
    folders = [each.name for each in visible(val) if is_folder(each)]
    if flat and folders:
        raise UserError(f"{val}: images such as {flat[0]} beside folders such as {folders[0]}: move one of both away")
    found = dict.fromkeys(flat, "")
    for synset in _synsets(val) if folders else ():
        for name in _images(val / synset):
            if name in found:
                raise UserError(f"{val}: {name} is in {found[name]} and in {synset}: remove one")
            found[name] = synset
    if not found:
        raise UserError(f"{val}: no images: mend the path")
    return found


_folders_for_reading = lru_cache(maxsize=1)(_validation_folders)


def _tar_synsets(train: Path) -> list[str]:
    with opened(str(train)) as file:
        return sorted(synset for synset, _, _ in _inner_tars(file, str(train)))


def _inner_tars(file: BinaryIO, where: str) -> Iterator[Entry]:
    for name, offset, size in images_of(file, where, ""):
        synset = name.removesuffix(".tar")
        if not WNID.fullmatch(synset) or synset == name:
            raise UserError(
                f"{where}: holds {name}, no class's tar such as n01440764.tar: not the training images' tar"
            )
        yield synset, offset, size


def _train_entries(file: BinaryIO, where: str) -> Iterator[Entry]:
    for synset, offset, size in _inner_tars(file, where):
        yield from images_of(file, f"{where} {synset}.tar", f"{synset}/", offset, offset + size)


def _validation_images(file: BinaryIO, where: str) -> Iterator[Entry]:
    """Called by their names alone, as in the tar that was published, even where it was packed with a folder."""
    for name, offset, size in images_of(file, where, ""):
        if not is_left_out(base := name.rpartition("/")[2]):
            yield base, offset, size


def _decoded(ids: np.ndarray) -> list[str]:
    found: list[bytes] = ids.tolist()
    return [i.decode("utf-8", "surrogateescape") for i in found]
