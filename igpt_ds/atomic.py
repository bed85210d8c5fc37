"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the directory."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from igpt_ds.errors import UserError

# What the user can mend (space, rights, a wrong path); any other OSError is a fault and keeps its traceback.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another disk",
    errno.EDQUOT: "the disk quota is used up: free space or choose another disk",
    errno.EACCES: "permission denied: choose a directory that you may write",
    errno.EPERM: "not permitted: choose a directory that you may write",
    errno.EFBIG: "larger than files may be here (ulimit -f): raise the limit or choose another disk",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "the path is a directory: choose another path",
    errno.EEXIST: "the path exists already: choose another path",
    errno.ENOTEMPTY: "the directory exists already and is not empty: choose another path",
    errno.ENOENT: "a part of the path does not exist: create it or mend the path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
    errno.ELOOP: "a symbolic link is in the way: remove it or choose another path",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's complaint about writing `path` into a `UserError` with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise UserError(f"{path}: cannot write: {remedy}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable (a rename alone may be lost with the power)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(path: Path) -> Path:
    """A name beside `path` under which it is written first: nobody can guess it, and no two writers share it.

    What a killed writer left is found as `leftovers`.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def leftovers(path: Path) -> list[Path]:
    """What killed writers of `path` left beside it, files and directories."""
    name = re.compile(re.escape(f".{path.name}") + r"(\.[0-9a-f]{16})?\.tmp")
    return [each for each in path.parent.glob(".*.tmp") if name.fullmatch(each.name)]


def no_link(path: str, flags: int) -> int:
    """An `opener` for a name that others know: what a symbolic link there leads to is not written."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def refuse_special(path: Path) -> None:
    """Refuse what is there and no regular file, nor a link to one: a device or a pipe would be replaced by a file.

    Links into /proc, such as /dev/stdout, are the system's, whatever they lead to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "", path)
    of_system = path.is_symlink() and path.readlink().is_relative_to("/proc")
    if of_system or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is a device or a pipe, no file: choose another path")


@contextmanager
def publish_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success it gets its final name, on failure it vanishes."""
    path = Path(path)
    # Two writers of the same file have two names; the last rename wins, whole.
    temporary = unfinished(path)
    with writing(path):
        refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:  # x: never a file that is there, nor what a link leads to
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with publish_file(path) as file:
        file.write(text.encode())


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a directory whose files are already synced its final name."""
    with writing(final):
        fsync_directory(temporary)
        os.rename(temporary, final)
        fsync_directory(final.parent)


def sha256_file(path: Path, tick: Callable[[int], object] = lambda read: None) -> str:
    """Hex sha256 of a file's bytes, whose number `tick` is told as they are read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            tick(len(chunk))
    return digest.hexdigest()
