"""A shard's tar as the blocks that it is made of, read member by member, and arrays as .npy bytes.

Training finds rows by their offsets (shards.py) and never comes here; this is for what is read rarely, ids and
labels, and for `igpt-data verify`, which holds the offsets against the tar.

NumPy and the standard library only, as shards.py.
"""

import io
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from igpt_ds.dataset.storage import STORAGES
from igpt_ds.errors import UserError

KINDS = (*(storage.member for storage in STORAGES.values()), "ids", "labels")  # the members that a block may have


def to_npy(array: np.ndarray) -> bytes:
    """An array as an .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file as `to_npy` writes it, read-only; no more memory than `data`, whatever it claims.

    Raises:
        ValueError: it is none, of another version, of Python objects, or not as long as its header says.
    """
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an .npy file of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}, Fortran order {fortran}")
    # frombuffer refuses Python objects and broken elements, reshape any other wrong length.
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged shard ({what}): delete it and run igpt-data shards again")


def blocks(path: Path, kinds: Collection[str] = KINDS) -> Iterator[dict[str, np.ndarray]]:
    """A shard's blocks, read as a plain tar: arrays as stored, by kind, of those `kinds` that are there."""
    stem = path.name.removesuffix(".tar")
    current: dict[str, np.ndarray] | None = None
    seen: set[str] = set()
    count = -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, kind, *rest = member.name.split(".")
                if key == f"{stem}-{count + 1:06d}":
                    if current is not None:
                        yield current
                    current, seen, count = {}, set(), count + 1
                # A sparse or linked member may claim more than the file holds.
                plain = member.type == tarfile.REGTYPE and rest == ["npy"] and kind in KINDS
                if current is None or not plain or key != f"{stem}-{count:06d}" or kind in seen:
                    raise damaged(path, f"unexpected member {member.name!r}")
                seen.add(kind)
                if kind in kinds and (file := tar.extractfile(member)):
                    current[kind] = from_npy(file.read())
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise damaged(path, "not a readable tar of arrays") from error
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if current is not None:
        yield current
