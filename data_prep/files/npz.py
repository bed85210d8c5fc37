"""Arrays in one file, which is there whole or not at all: a zip of .npy members, as `numpy.load` reads them.

Stored and without dates, so that the same arrays give the same bytes. Nothing in such a file is ever unpickled; the
zip's checksums are compared on reading, and before any memory is asked for, what headers say is held against the file.
"""

import math
import zipfile
from pathlib import Path

import numpy as np

from igpt_ds.atomic import publish_file
from igpt_ds.dataset.npy import read_header
from igpt_ds.errors import UserError

# What reading a damaged file raises.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile)


def write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add one array to a zip that is open for writing."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read one array; raises one of DAMAGE where it is missing or damaged."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.file_size > archive.start_dir:
        raise ValueError("packed, or larger than its file")
    with archive.open(info) as member:
        shape, _, dtype = read_header(member)
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError("not as long as its header says")
    with archive.open(info) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array


def publish_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to a file, whole or not at all."""
    with publish_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            write_member(archive, name, array)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names; the others are not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [read_member(archive, name) for name in names]
    except DAMAGE as error:
        raise _damaged(path) from error


def read_all_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays by their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {name: read_member(archive, name) for name in names}
    except DAMAGE as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: missing or damaged: remove it and give the same command again")
