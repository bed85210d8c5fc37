"""A part of a labelled dataset with equally many images of every class, for training with few labels (section 4.7).

NumPy and the standard library only, as shards.py.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.hashing import random_keys, stable_hash

_SUBSET = zlib.crc32(b"subset with few labels")


def balanced(labels_I: np.ndarray, count: int, seed: int, repeat: int = 0) -> np.ndarray:
    """Rows of a random subset with `count` images of every class, ascending: int64 [classes * count].

    A pure function of its arguments; subsets of other counts and repeats are drawn independently.

    Args:
        labels_I: int64, of all images; each class has at least `count` of them.
    """
    # Each image has a random key; the smallest keys of each class are drawn.
    keys_I = random_keys(stable_hash(_SUBSET, seed, count, repeat), len(labels_I))
    members = (np.flatnonzero(labels_I == label) for label in np.unique(labels_I))
    return np.sort(np.concatenate([each[np.argsort(keys_I[each], kind="stable")[:count]] for each in members]))


def require_labels(dataset: Dataset, count: int, option: str) -> None:
    """Refuse a dataset that lacks `count` images of one of its classes; `option` is what asks for so many."""
    classes = dataset.manifest.classes or []
    found = np.bincount(dataset.labels(), minlength=len(classes))
    if found[least := int(found.argmin())] < count:
        raise UserError(
            f"{dataset.path}: {option}: class {classes[least]} has {found[least]} images: "
            f"ask for at most {found[least]} a class"
        )


class Subset(Dataset):
    """Some images of a dataset, each in all of its views: its shards with fewer rows, some of them with none.

    Args:
        images_I: int64, ascending: which, among the rows of view 0. All views hold their images in the same order.
    """

    def __init__(self, dataset: Dataset, images_I: np.ndarray) -> None:
        super().__init__(dataset.path, dataset.manifest, dataset.palette, dataset._files.times)
        self._whole, self._images_I = dataset, images_I
        self._chosen: list[np.ndarray] = []  # of each shard: its rows that belong to the subset
        before = [0] * dataset.manifest.views
        for record in dataset.manifest.shards:
            first = before[record.view]
            stop = before[record.view] = first + record.rows
            self._chosen.append(images_I[(images_I >= first) & (images_I < stop)] - first)
        shards = [
            record._replace(rows=len(rows)) for record, rows in zip(dataset.manifest.shards, self._chosen, strict=True)
        ]
        self.manifest, self.rows = replace(dataset.manifest, rows=len(images_I), shards=shards), len(images_I)

    def own(self) -> "Subset":
        return Subset(self._whole, self._images_I)

    def read_parts(self, pairs: np.ndarray, sizes: Iterable[int]) -> Iterator[np.ndarray]:
        rows = [self._chosen[shard][row] for shard, row in pairs.tolist()]
        return super().read_parts(np.stack([pairs[:, 0], np.array(rows, np.int64)], 1), sizes)

    def span(self, shard: int, first: int, stop: int) -> np.ndarray:
        return self.read_many([(shard, row) for row in range(first, stop)])

    def _members(self, kind: str, shard: int) -> np.ndarray:
        return super()._members(kind, shard)[self._chosen[shard]]
