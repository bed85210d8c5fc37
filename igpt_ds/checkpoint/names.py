"""Which directories in RUN/checkpoints are the run's own. A person's copies, backups and links beside them stay as they
are: they are not chosen, renamed, pruned or listed.

Needs no torch: the report asks it, too.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from igpt_ds.atomic import writing
from igpt_ds.errors import UserError
from igpt_ds.reading import read_json

FORMAT, VERSION = "igpt-checkpoint", 1
PUBLISHED, UNFINISHED, DELETED = "published", "unfinished", "half deleted"
DAMAGED, ABANDONED = "set aside as damaged", "abandoned by a rollback"
_NAMES = {
    PUBLISHED: re.compile(r"step-([0-9]+)"),
    DAMAGED: re.compile(r"damaged-step-([0-9]+)-[0-9]+"),
    ABANDONED: re.compile(r"abandoned-step-([0-9]+)-[0-9]+"),
    UNFINISHED: re.compile(r"\.step-([0-9]+)\.tmp"),
    DELETED: re.compile(r"\.(?:damaged-|abandoned-)?step-([0-9]+)(?:-[0-9]+)?\.old"),
}


def step_directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is published: eight digits, from step 100 000 000 on as many as it needs."""
    return folder / f"step-{step:08d}"


def own(folder: Path) -> list[tuple[int, Path, str]]:
    """(step, path, state) of all that a run left in a folder, by step; [] without a folder."""
    return [each for each in _named(folder) if each[2] != PUBLISHED or not _of_another_step(each[1], each[0])]


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, damaged ones among them, oldest first."""
    return list(newest_first(folder))[::-1]


def newest_first(folder: Path) -> Iterator[Path]:
    """Published checkpoints, each looked at when it is asked for: with many ranks to read one takes its time."""
    for step, path, state in reversed(_named(folder)):
        if state == PUBLISHED and not _of_another_step(path, step):
            yield path


def _named(folder: Path) -> list[tuple[int, Path, str]]:
    """What has the name of something of a run's own."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        for state, pattern in _NAMES.items():
            match = pattern.fullmatch(path.name)
            if match and not path.is_symlink() and path.is_dir() and match[1] == f"{int(match[1]):08d}":
                found.append((int(match[1]), path, state))
    return sorted(found)


def strangers(folder: Path) -> list[str]:
    """Names of what holds a checkpoint and is not the run's own: a person's copies and links."""
    mine = [path for _, path, _ in own(folder)]
    return sorted({path.parent.name for path in folder.glob("*/checkpoint.json") if path.parent not in mine})


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.rpartition("-")[2])


def _of_another_step(path: Path, step: int) -> bool:
    """Whether it is a whole checkpoint that somebody has given another name: one whose own step is damaged is not."""
    try:
        found = (path / "checkpoint.json").stat()
    except OSError:
        return False
    return _step_in(path, (found.st_ino, found.st_size, found.st_mtime_ns)) not in (step, None)


@functools.lru_cache(maxsize=256)
def _step_in(path: Path, written: tuple[int, int, int]) -> int | None:
    """The step that a checkpoint tells; None of a damaged one. Read once as it was `written`: a save asks for all."""
    try:
        return int(read_content(path)["step"])
    except UserError:
        return None


def read_content(path: Path) -> dict[str, Any]:
    """What checkpoint.json holds beside its own sha256.

    Raises:
        UserError: it is missing, no JSON object, or not as it was written.
    """
    try:
        content = read_json(path / "checkpoint.json")
        recorded = content.pop("sha256", None)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise UserError(f"{path}: format {content['format']} {content['version']} is not known: update igpt-ds")
        if recorded != content_sha256(content) or type(content["step"]) is not int:
            raise ValueError
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else "checkpoint.json is not as it was written"
        raise UserError(f"{path}: not a whole checkpoint ({why}): remove it or take another") from error
    return dict(content)


def content_sha256(content: Mapping[str, Any]) -> str:
    """What checkpoint.json records of itself: hex sha256 of its other entries, written in one fixed way."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def set_aside(path: Path, why: str) -> Path:
    """Rename what is in the way of a run, to a name that nothing has, which is returned."""
    names = (path.with_name(f"{why}-{path.name}-{number}") for number in itertools.count(time.time_ns()))
    with writing(path):
        return path.rename(next(name for name in names if not os.path.lexists(name)))


def set_aside_newer(folder: Path, step: int, why: str = "damaged") -> None:
    """Rename the checkpoints beyond `step`: kept for a person, out of the way of `prune`.

    Args:
        why: "damaged", or "abandoned" by a run that rolled back.
    """
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            set_aside(path, why)


def prune(folder: Path, keep: int, milestones: Collection[int] = ()) -> None:
    """Delete all but the `keep` newest checkpoints and the milestones (steps)."""
    _delete([path for path in list_checkpoints(folder)[:-keep] if step_of(path) not in milestones])


def clear(folder: Path) -> None:
    """Delete all that a run left in a folder, which may be a link."""
    _delete([path for _, path, state in own(folder) if state not in (UNFINISHED, DELETED)])
    clear_unfinished(folder)
    with contextlib.suppress(OSError):
        (folder / "latest").unlink()


def clear_unfinished(folder: Path) -> None:
    """Delete what killed runs were writing or deleting."""
    for _, path, state in own(folder):
        if state in (UNFINISHED, DELETED):
            shutil.rmtree(path, ignore_errors=True)


def _delete(paths: Collection[Path]) -> None:
    # Out of sight first: what is half deleted must not look like a checkpoint.
    for path in paths:
        with writing(path):
            os.rename(path, path.with_name(f".{path.name}.old"))
    for path in paths:
        shutil.rmtree(path.with_name(f".{path.name}.old"), ignore_errors=True)
