"""A shard's tar as the blocks that it is made of, read member by member.

Training finds rows by their offsets (shards.py) and never comes here; this is for what is read rarely, ids and
labels, and for `igpt-data verify`, which holds the offsets against the tar.

NumPy and the standard library only, as shards.py.
"""

import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from igpt_ds.dataset.npy import from_npy
from igpt_ds.dataset.storage import STORAGES
from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular

KINDS = (*(storage.member for storage in STORAGES.values()), "ids", "labels")  # the members that a block may have


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged shard ({what}): delete it and run igpt-data shards again")


def blocks(path: Path, kinds: Collection[str] = KINDS) -> Iterator[dict[str, np.ndarray]]:
    """A shard's blocks, read as a plain tar: arrays as stored, by kind, of those `kinds` that are there."""
    stem = path.name.removesuffix(".tar")
    current: dict[str, np.ndarray] | None = None
    seen: set[str] = set()
    count = -1
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = os.fstat(file.fileno()).st_size
            for member in tar:
                key, kind, *rest = member.name.split(".")
                if key == f"{stem}-{count + 1:06d}":
                    if current is not None:
                        yield current
                    current, seen, count = {}, set(), count + 1
                # A sparse or linked member may claim more than the file holds.
                plain = member.type == tarfile.REGTYPE and rest == ["npy"] and kind in KINDS and member.size <= size
                if current is None or not plain or key != f"{stem}-{count:06d}" or kind in seen:
                    raise damaged(path, f"unexpected member {member.name!r}")
                seen.add(kind)
                if kind in kinds and (content := tar.extractfile(member)):
                    current[kind] = from_npy(content.read())
    except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        raise damaged(path, "not a readable tar of arrays") from error
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if current is not None:
        yield current
