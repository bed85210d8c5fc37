"""An index of images in tars, kept in the user's cache, so that millions of them can be read at will.

ImageNet's training tar holds 1 000 tars of 1 300 images: to find one image is to read a header for each before it.
The index is made once, sorted by id, and mapped into memory by every worker, which share its 60 MB. Its name is a hash
of the tar's path, size and time of change: another tar has another index. A cache that cannot be written costs
each worker the time to make the index (1.3 million small reads), not the job.
"""

import bisect
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.files.remote import opened
from data_prep.files.tar import members, read_member
from igpt_ds.atomic import publish_file
from igpt_ds.dataset.npy import read_header
from igpt_ds.errors import UserError

Entry = tuple[str, int, int]  # id, offset, size


class TarIndex:
    """Where the images of one tar lie.

    Attributes:
        ids: bytes [n], sorted.
    """

    def __init__(self, path: Path, table: np.ndarray) -> None:
        self.path, self.ids = path, table["id"]
        self._table = table
        self._file = _random_access(path)

    def read(self, item_id: str) -> bytes:
        """An image's bytes, the first MAX_BYTES + 1 at most.

        Raises:
            OSError: there is no such image, or the tar ends before it.
        """
        key = np.bytes_(item_id.encode("utf-8", "surrogateescape"))
        at = bisect.bisect_left(self.ids, key)
        if at == len(self.ids) or self.ids[at] != key:
            raise FileNotFoundError(f"no such image in {self.path.name}")
        return read_member(self._file, int(self._table["offset"][at]), int(self._table["size"][at]))


@lru_cache(maxsize=4)
def tar_index(path: Path, find: Callable[[BinaryIO, str], Iterator[Entry]]) -> TarIndex:
    """The index of a tar, from the cache where it is there.

    Args:
        find: lists the images of the open tar; a function at the top of a module, whose name tells indexes apart.
    """
    with opened(str(path)) as file:
        status = os.fstat(file.fileno())
    identity = f"{find.__module__}.{find.__qualname__}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    cached = _cache() / f"tar-1-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}.npy"
    table = _load(cached)
    if table is None:
        with _random_access(path) as file:
            entries = [(i.encode("utf-8", "surrogateescape"), at, size) for i, at, size in find(file, str(path))]
        width = max((len(entry[0]) for entry in entries), default=1)
        table = np.array(entries, dtype=[("id", f"S{width}"), ("offset", "<i8"), ("size", "<i8")])
        table = table[np.argsort(table["id"], kind="stable")]
        if len(twice := table["id"][1:][table["id"][1:] == table["id"][:-1]]):
            raise UserError(f"{path}: holds {twice[0].decode('utf-8', 'replace')} twice: fetch it again")
        try:
            with publish_file(cached) as out:
                np.lib.format.write_array(out, table, version=(1, 0), allow_pickle=False)
        except (UserError, OSError):
            pass
    return TarIndex(path, table)


def images_of(file: BinaryIO, where: str, prefix: str, start: int = 0, end: int | None = None) -> Iterator[Entry]:
    """The regular files of a tar, their ids beginning with `prefix`."""
    for member in members(file, where, start, end):
        name = member.name.removeprefix("./")
        if member.other:
            raise UserError(f"{where}: {name} is {member.other}: not the archive as it was published: fetch it again")
        yield prefix + name, member.offset, member.size


def _random_access(path: Path) -> BinaryIO:
    file = opened(str(path))
    # Without it the kernel reads ahead of every header, and so the whole of the tar.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _load(path: Path) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            read_header(file)  # which np.load fails to read in more ways
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype.names == ("id", "offset", "size") and table.ndim == 1 else None


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "igpt-ds"
