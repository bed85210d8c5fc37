"""Which files a source reads, by the paths that the user gave: folders, files and patterns, local or remote.

Patterns are `{00000..00999}`, `{a,b}` and `*`. A file is called by its path below the folder, or below the pattern's
last whole folder: `/data/web` and `/data/web/{0..9}.tar` both have a `3.tar`. So a name stays the same when the
files are moved or become more.

`pipe:COMMAND`, whose output is the file, runs whatever it says in a shell, and so only where that was allowed.
"""

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.files.folders import files_below, is_left_out
from data_prep.files.remote import PROTOCOLS, existing, filesystem, is_there, scheme, unreadable
from igpt_ds.errors import UserError

_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MAX_EXPANDED = 1_000_000


@dataclass(frozen=True)
class FileSet:
    """Files ending in `suffix`, by the paths that the user gave. Small and picklable, however many they are."""

    paths: tuple[str, ...]
    suffix: str
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be read, before anything is listed."""
        if not self.paths:
            raise UserError(f"paths: none given: give a folder, a {self.suffix} file or a pattern of them")
        for path in self.paths:
            if path.startswith("pipe:"):
                if not self.allow_pipe:
                    raise UserError(f"{path}: runs a command: if you trust it, allow it with --option allow_pipe=true")
            elif (protocol := scheme(path)) and protocol not in PROTOCOLS:
                raise UserError(f"{path}: {protocol} is not read: give a local path or {', '.join(PROTOCOLS)}")
            elif protocol in {"http", "https"} and re.search(r"[*?\[]", path):
                raise UserError(
                    f"{path}: http cannot list files, and queries are not kept: write numbers as {{00..99}}"
                )

    def names(self) -> list[str]:
        """The names of the files, sorted."""
        return list(self.places())

    def places(self) -> dict[str, str]:
        """Where each file is, by its name, sorted; those of brace patterns unseen: see `files.existing`."""
        found: dict[str, str] = {}
        names: dict[str, str] = {}  # by where links lead
        real_folder = cache(os.path.realpath)
        for path in self.paths:
            for name, url in self._files(path):
                real = _real(url, real_folder)
                if (other := names.setdefault(real, name)) != name:
                    raise UserError(f"{name}: the same file as {other}: give it once")
                if _real(found.setdefault(name, url), real_folder) != real:
                    raise UserError(f"{name}: is both {found[name]} and {url}: give the folder that holds both")
        if not found:
            raise UserError(f"{self.paths[0]}: no {self.suffix} files: mend the path")
        return dict(sorted(found.items()))

    def url(self, name: str) -> str:
        """Where the file of that name is."""
        pipes = [path for path in self.paths if path.startswith("pipe:")]
        for command in (command for path in pipes for command in _expand(path)):
            if _pipe_name(command, self.suffix) == name:
                return command
        places = dict.fromkeys(_join(_base(path, self.suffix), name) for path in self.paths if path not in pipes)
        if len(places) == 1:
            return next(iter(places))
        return next((place for place in places if existing([place])), next(iter(places)))

    def _files(self, path: str) -> list[tuple[str, str]]:
        if path.startswith("pipe:"):
            return [(_pipe_name(command, self.suffix), command) for command in _expand(path)]
        base = _base(path, self.suffix)
        urls: list[str] = []
        whole = _literal(path)
        for each in [path] if base == path or whole == len(path) else _expand(path[whole:]):
            urls += self._below(each if each is path else path[:whole] + each)
        return [(url[len(base) :].lstrip("/"), url) for url in urls]

    def _below(self, path: str) -> list[str]:
        """The files that one path without braces stands for."""
        if scheme(path):
            if path.endswith(self.suffix) and not _MAGIC.search(path):
                return [path]
            return _remote_files(path, self.suffix)
        if _MAGIC.search(path, whole := _literal(path)):
            matches = sorted(glob.glob(glob.escape(path[:whole]) + path[whole:]))  # noqa: PTH207 (absolute ones, too)
            return [url for match in matches if _wanted(match, self.suffix) for url in self._below(match)]
        if not Path(path).is_dir():
            if not path.lower().endswith(self.suffix):
                what = "no such folder" if not is_there(path) else f"not a {self.suffix} file"
                raise UserError(f"{path}: {what}: give a folder, a {self.suffix} file or a pattern of them")
            return [path]
        below = files_below(path, (self.suffix,))
        return [os.path.join(path, name) for name, _ in below]  # noqa: PTH118 (keeps the path as it was given)


def _literal(path: str) -> int:
    """How much of a local path is no pattern: all of it where it is there as it is written, else whole folders."""
    if scheme(path) or not _MAGIC.search(path):
        return 0
    if is_there(path):
        return len(path)
    slashes = [match.end() for match in re.finditer("/+", path)]
    return next((end for end in reversed(slashes) if is_there(path[:end])), 0)


def _wanted(path: str, suffix: str) -> bool:
    name = os.path.basename(path.rstrip("/"))  # noqa: PTH119
    return not is_left_out(name) and (name.lower().endswith(suffix) or Path(path).is_dir())


def _base(path: str, suffix: str) -> str:
    """The folder that names are relative to."""
    magic = _MAGIC.search(path, _literal(path))
    if magic:
        return path[: magic.start()].rpartition("/")[0] or ("/" if path.startswith("/") else "")
    if scheme(path):
        return path.rpartition("/")[0] if path.endswith(suffix) else path.rstrip("/")
    return path if Path(path).is_dir() else os.path.dirname(path)  # noqa: PTH120


def _real(url: str, real_folder: Callable[[str], str]) -> str:
    """A local file's path without links to folders; a link to a file is a file of its own."""
    if scheme(url) or url.startswith("pipe:"):
        return url
    folder, name = os.path.split(url)
    return f"{real_folder(folder)}/{name}"


def _join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}" if base else name


def _expand(pattern: str) -> list[str]:
    """`{00..02}` and `{a,b}` written out, the numbers as wide as the first is written."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        if int(last) - int(first) >= _MAX_EXPANDED:
            raise UserError(f"{pattern}: more than {_MAX_EXPANDED:,} files: mend the numbers")
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = words.split(",")
    rest = _expand(pattern[match.end() :])
    if len(choices) * len(rest) > _MAX_EXPANDED:
        raise UserError(f"{pattern}: more than {_MAX_EXPANDED:,} files: mend the numbers")
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in rest]


def _remote_files(path: str, suffix: str) -> list[str]:
    protocol = scheme(path) or ""
    if protocol in {"http", "https"}:
        raise UserError(f"{path}: http cannot list a folder: write the files as {{00000..00999}}{suffix}")
    remote, inside = filesystem(path)
    try:
        found = remote.glob(inside) if _MAGIC.search(inside) else remote.find(inside)
    except Exception as error:
        raise unreadable(path, error) from error
    # fsspec drops the protocol, and some of its file systems begin paths with a slash.
    return sorted(f"{protocol}://{name.lstrip('/')}" for name in found if name.endswith(suffix))


def _pipe_name(command: str, suffix: str) -> str:
    """A pipe is called after the file that its command names."""
    names = [word.rpartition("/")[2] for word in command.split() if word.endswith(suffix)]
    if not names:
        raise UserError(f"{command}: names no {suffix} file: let the command's words say which file it yields")
    return names[-1]
