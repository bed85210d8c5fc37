"""Which directories in RUN/checkpoints are the run's own. A person's copies, backups and links beside them stay as they
are: they are not chosen, renamed, pruned or listed.

Needs no torch: the report asks it, too.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from igpt_ds.atomic import writing
from igpt_ds.errors import UserError
from igpt_ds.reading import read_regular

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
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        for state, pattern in _NAMES.items():
            match = pattern.fullmatch(path.name)
            if not match or path.is_symlink() or not path.is_dir():
                continue
            step = int(match[1])
            if match[1] == f"{step:08d}" and (state != PUBLISHED or not _of_another_step(path, step)):
                found.append((step, path, state))
    return sorted(found)


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, damaged ones among them, oldest first."""
    return [path for _, path, state in own(folder) if state == PUBLISHED]


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
        return bool(read_content(path)["step"] != step)
    except UserError:
        return False


def read_content(path: Path) -> dict[str, Any]:
    """What checkpoint.json holds beside its own sha256.

    Raises:
        UserError: it is missing, no JSON object, or not as it was written.
    """
    try:
        content = json.loads(read_regular(path / "checkpoint.json"))
        recorded = content.pop("sha256", None)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise UserError(f"{path}: format {content['format']} {content['version']} is not known: update igpt-ds")
        if recorded != content_sha256(content) or type(content["step"]) is not int:
            raise ValueError
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
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
