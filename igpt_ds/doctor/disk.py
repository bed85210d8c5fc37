"""The file system of the run directory: speed, room for checkpoints, inodes, its clock."""

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds.doctor.report import Check
from igpt_ds.text import counted, size_text, time_text

MEASURED_BYTES = 256 * 2**20
MEASURED_SECONDS = 2.0
_BLOCK = 16 * 2**20
_SLOW, _VERY_SLOW = 600.0, 3600.0  # seconds for one checkpoint
_SLOW_RATE = 50e6  # bytes a second, where no checkpoint is known


def nearest(path: Path) -> Path:
    """The directory itself, or where it would be made."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def read_disk(run_path: Path, most: int = MEASURED_BYTES, seconds: float = MEASURED_SECONDS) -> dict[str, Any]:
    """Free bytes and inodes, then write, sync and read a temporary file that is removed in any case.

    Args:
        most: bytes to write at most.
        seconds: for writing and for reading each, at most (a block more may be under way).
    """
    folder = nearest(run_path)
    status = os.statvfs(folder)
    fact: dict[str, Any] = {
        "folder": str(folder),
        "free": status.f_bavail * status.f_frsize,
        "inodes": status.f_favail if status.f_files else None,  # some file systems do not count them
    }
    block = os.urandom(_BLOCK)
    # Without a name it vanishes with its descriptor, even if this process is killed.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        fact["clock"] = _clock_difference(file.fileno())
        began, written = time.perf_counter(), 0
        while written < most and time.perf_counter() - began < seconds:
            written += file.write(block[: most - written])
            os.fsync(file.fileno())  # each, or a slow disk would keep the whole size waiting for the last
        fact["write"] = written / (time.perf_counter() - began)
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began, got = time.perf_counter(), 0
        while got < written and time.perf_counter() - began < seconds:
            got += len(file.read(_BLOCK))
        fact["read"] = got / (time.perf_counter() - began)
    return fact


def _clock_difference(descriptor: int) -> float:
    """Seconds that the file system's clock is ahead of ours, 0 within the time that asking it takes."""
    before = time.time()
    os.write(descriptor, b"0")
    os.fsync(descriptor)
    stamp, after = os.fstat(descriptor).st_mtime, time.time()
    return stamp - after if stamp > after else min(0.0, stamp - before)


def judge_disk_speed(facts: Sequence[tuple[str, dict[str, Any]]], checkpoint: float | None) -> Check:
    """How long a checkpoint takes when all nodes write at once.

    Args:
        facts: (label, `read_disk`) of one rank a node, measured at the same time.
        checkpoint: its bytes; None: no configuration is known.
    """
    write, read = sum(fact["write"] for _, fact in facts), sum(fact["read"] for _, fact in facts)
    label, slowest = min(facts, key=lambda item: item[1]["write"])
    value = f"{size_text(write)}/s written and synced, {size_text(read)}/s read"
    if len(facts) > 1:
        value += f" by {len(facts)} nodes at once (least on {label}: {size_text(slowest['write'])}/s)"
    remedy = "choose a faster file system for the run directory"
    if checkpoint is None:
        slow = write < _SLOW_RATE
        return Check("disk_speed", "WARN" if slow else "OK", value, remedy if slow else "")
    seconds = checkpoint / max(write, 1e-9)
    value += f"; a checkpoint takes {time_text(seconds)}"
    if seconds > _SLOW:
        return Check("disk_speed", "FAIL" if seconds > _VERY_SLOW else "WARN", value, remedy)
    return Check("disk_speed", "OK", value)


def judge_disk_space(fact: dict[str, Any], checkpoint: float | None, present: float, wanted: int) -> Check:
    """Room for the checkpoints that are kept, the one being written and one set aside.

    Args:
        fact: `read_disk`.
        checkpoint: bytes of one; None: no configuration is known.
        present: bytes of those that the run has already.
        wanted: number of checkpoints to have room for.
    """
    value = f"{size_text(fact['free'])} free"
    if checkpoint is None:
        return Check("disk_space", "OK", f"{value} in {fact['folder']}")
    room = int((fact["free"] + present) // checkpoint)
    value += f" in {fact['folder']}, room for {counted(room, 'checkpoint')} of {size_text(checkpoint)}"
    if present:
        value += f" with those there ({size_text(present)})"
    remedy = f"free space: {wanted} are wanted, {size_text(max(0.0, wanted * checkpoint - present))} free in all"
    if room < 2:
        return Check("disk_space", "FAIL", value, remedy)
    if room < wanted:
        return Check("disk_space", "WARN", value, f"{remedy}; or lower checkpoint.keep")
    return Check("disk_space", "OK", value)


def judge_inodes(fact: dict[str, Any], ranks: int, wanted: int) -> Check:
    """A checkpoint is a file a rank, a log is another."""
    if fact["inodes"] is None:
        return Check("inodes", "OK", "not limited by the file system")
    need = (ranks + 1) * wanted + ranks
    value = f"{fact['inodes']:,} free, about {need:,} needed"
    remedy = "delete small files on this file system, or choose another"
    if fact["inodes"] < need:
        return Check("inodes", "FAIL", value, remedy)
    if fact["inodes"] < 10 * need:
        return Check("inodes", "WARN", value, remedy)
    return Check("inodes", "OK", value)


def judge_disk_clock(fact: dict[str, Any]) -> Check:
    """The file system's time of a file that was just written against this node's clock."""
    return judge_clock("clock_disk", fact["clock"], "the file system's clock")


def judge_clock(name: str, ahead: float, whose: str) -> Check:
    """A difference of clocks in seconds: logs of nodes cannot be laid side by side, and ages of files are wrong."""
    size = abs(ahead)
    if size <= 1:
        return Check(name, "OK", f"less than 1 s apart ({time_text(size)})")
    value = f"{whose} is {time_text(size)} {'ahead' if ahead > 0 else 'behind'}"
    return Check(name, "FAIL" if size > 60 else "WARN", value, "synchronise the clocks (NTP or chrony)")
