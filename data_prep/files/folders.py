"""Folders walked: links to folders are followed, each folder is read once, what systems leave behind is left out.

Only links cost a look at what they lead to: folders may have millions of files, on a network.
"""

import os
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path

from igpt_ds.errors import UserError

_OF_SYSTEMS = {"__macosx", "lost+found", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin"}
_OF_SYSTEMS |= {"system volume information"}  # in small letters, as some file systems give all names

Identity = tuple[int, int] | str


def is_left_out(name: str) -> bool:
    """Is a file or folder of this name none of the user's: hidden, or made by a system for itself?"""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not left out, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((each for each in entries if not is_left_out(each.name)), key=lambda each: each.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot list ({error.strerror}): mend its permissions") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Is it a folder, or a link to one?"""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))  # noqa: PTH112


def leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Is it a link to nothing, or in a circle?"""
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110


def refuse_lost(entry: os.DirEntry[str]) -> None:
    """Refuse a link to nothing that may be a folder's, for it has no suffix: its files would be missing."""
    if "." not in entry.name and leads_nowhere(entry):
        raise UserError(f"{entry.path}: a link that leads nowhere: mend or remove it")


def is_file(entry: os.DirEntry[str]) -> bool:
    """Is it a regular file, or a link that leads nowhere? The latter counts as a file that cannot be read.

    Pipes and devices are no files: reading one would hang.
    """
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    return leads_nowhere(entry) or os.path.isfile(entry.path)  # noqa: PTH113


def files_below(
    top: str, suffixes: tuple[str, ...], others: Collection[Identity] = ()
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What has one of these suffixes, in any case, and is no folder: the path below `top`, and the entry.

    A folder that lies below `top` has its own name, whatever links lead to it; one elsewhere has that of the first
    link. A link to a folder around `top` is not followed.

    Args:
        others: folders that are not to be entered, wherever links lead.

    Raises:
        UserError: a folder cannot be listed, or a link that may be one's, for it has no suffix, leads nowhere.
    """
    seen = {identity(folder) for folder in Path(top).resolve().parents}
    linked = deque([""])
    while linked:
        folders = [linked.popleft()]
        while folders:
            prefix = folders.pop()
            folder = os.path.join(top, prefix)  # noqa: PTH118 (keeps the path as it was given)
            this = identity(folder)
            if this in seen or (prefix and this in others):
                continue
            seen.add(this)
            for entry in visible(folder):
                if is_folder(entry):
                    (linked if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
                elif entry.name.lower().endswith(suffixes):
                    yield prefix + entry.name, entry
                else:
                    refuse_lost(entry)


def identity(folder: str | Path) -> Identity:
    """What tells a folder from all others, whatever it is called."""
    status = os.stat(folder)  # noqa: PTH116
    # Some file systems have no numbers of their own.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
