"""What there is in RUN/checkpoints: published, unfinished, set aside; and what is wrong with each."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from igpt_ds.checkpoint.names import DAMAGED, DELETED, PUBLISHED, UNFINISHED, own, read_content
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.errors import RunError, UserError
from igpt_ds.text import Table, size_text


@dataclass
class Row:
    """One directory in RUN/checkpoints. What its checkpoint.json does not tell is None."""

    name: str
    step: int
    state: str
    written: float  # seconds since 1970
    bytes: int
    world: int | None
    zero_stage: int | None
    code_version: str | None
    kept: str | None  # "milestone", "newest", or None: the next save deletes it
    fault: str | None  # None: nothing wrong was found
    verified: bool  # every byte was read


def survey(folder: Path, verify: bool) -> list[Row]:
    """Look at every checkpoint in a folder, in the order of their steps.

    Args:
        folder: RUN/checkpoints; need not exist.
        verify: read every byte of what is whole in size and compare its sha256.
    """
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    there = own(folder)
    total = sum(size for _, path, _ in there for size in sizes(path).values()) if verify else 0
    # disable=None: a bar on a terminal only.
    hidden = None if verify else True
    with tqdm(desc="verify", total=total, unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        for step, path, state in there:
            try:
                record = read_content(path)
            except UserError:
                record = {}
            row = _look(path, step, state, record, verify, bar.update)
            # A run that goes on deletes its oldest and publishes what was unfinished while we read.
            if path.exists():
                rows.append(row)
                if state == PUBLISHED and row.fault is None:
                    settings = _part(_part(record, "config"), "checkpoint") or settings
    published = [row for row in rows if row.state == PUBLISHED]
    keep = settings.get("keep")
    for row in published[-keep if isinstance(keep, int) and keep > 0 else -1 :]:
        row.kept = "newest"
    for row in published:
        if row.step in settings.get("milestones", ()):
            row.kept = "milestone"
    return rows


def require_sound(folder: Path, rows: Sequence[Row]) -> None:
    """Raises:
    RunError: a published checkpoint is damaged, or only damaged ones are left.
    """
    if damaged := [row.name for row in rows if row.state == PUBLISHED and row.fault]:
        raise RunError(f"{folder}: damaged: {', '.join(damaged)}: a run that goes on takes the newest valid one")
    if not any(row.state == PUBLISHED for row in rows) and any(row.state == DAMAGED for row in rows):
        raise RunError(f"{folder}: only damaged ones are left: restore one, or start over with --fresh --force")


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    verified = any(row.verified for row in rows)
    cells = []
    for row in rows:
        what = row.fault or ("valid" if verified else "sizes right")
        told = [row.world, row.zero_stage, row.code_version, row.kept]
        cells.append(
            [
                str(row.step),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(row.written)),
                size_text(row.bytes),
                *("-" if value is None else str(value) for value in told),
                what if row.state in (PUBLISHED, UNFINISHED, DELETED) else f"{row.state}: {row.name}: {what}",
            ]
        )
    note = "" if verified or not rows else "not verified: only sizes were looked at (--verify reads every byte)"
    return Table("", ["step", "written", "size", "ranks", "zero", "version", "kept", "state"], cells, note)


def sizes(path: Path) -> dict[str, int]:
    """Bytes of each file of a directory that may be changing."""
    found = {}
    try:
        for file in path.iterdir():
            found[file.name] = file.stat().st_size
    except FileNotFoundError:
        pass
    return found


def _part(tree: dict[str, Any], key: str) -> dict[str, Any]:
    part = tree.get(key)
    return part if isinstance(part, dict) else {}


def _look(
    path: Path, step: int, state: str, record: dict[str, Any], verify: bool, tick: Callable[[int], object]
) -> Row:
    there = sizes(path)
    try:
        written = (path / "checkpoint.json" if record else path).stat().st_mtime
    except OSError:
        written = 0.0
    whole = state not in (UNFINISHED, DELETED)
    fault = _fault(path, verify, tick) if whole else f"{state}: the next save removes it, unless a run is at it"
    return Row(
        path.name,
        step,
        state,
        written,
        sum(there.values()),
        record.get("world"),
        _part(_part(record, "ds_config"), "zero_optimization").get("stage"),
        record.get("code_version"),
        None,
        fault,
        whole and verify,
    )


def _fault(path: Path, verify: bool, tick: Callable[[int], object]) -> str | None:
    """All that is wrong with the files of a checkpoint, in one line without the directory's name; or None."""
    faults = []
    try:
        checkpoint = Checkpoint.open(path)
        names = sorted(checkpoint.files) if verify else []
        for index in range(len(names)):
            try:
                checkpoint.verify(index, len(names), tick)
            except (UserError, OSError) as error:
                faults.append(error)
    except (UserError, OSError) as error:
        faults.append(error)
    return "; ".join(str(error).replace(f"{path}/", "").replace(f"{path}: ", "") for error in faults) or None
