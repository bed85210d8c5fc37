"""What a run tells of itself: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.

Rank 0 writes. A line of metrics.jsonl is one JSON object: training lines have "step", "loss" (nats a token) and
"lr", validation lines "step" and "val_loss", decisions "step", "event" and "reason". After a resume and after a
rollback the lines beyond the checkpoint are dropped, so that no step stands there twice; decisions stay. A number that
is not finite is null.

A damaged line is passed over with a warning, and stays where it is; but what a killed run left of its last line goes.

A run of weeks has millions of lines, so who resumes it parses none of them but decisions and what lies at the end, and
rewrites what lies beyond the checkpoint alone.

A full disk does not end a run: lines wait in memory until there is room again.
"""

import errno
import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from igpt_ds.atomic import publish_file, writing
from igpt_ds.errors import UserError
from igpt_ds.lock import Lock
from igpt_ds.reading import open_regular, parse_json, read_regular
from igpt_ds.run.directory import LOGGER

if TYPE_CHECKING:
    import numpy as np


_NAMED = 10  # damaged lines, each with a warning of its own
_PIECE, _LOOK = 1 << 20, 1 << 18  # bytes that are read at once, from the beginning and from the end
_LINE = b'{"step": '  # what `Metrics` begins every line with


def read_metrics(path: Path, warn: Callable[[str], None] = LOGGER.warning) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for damaged ones, which are named through `warn`; [] without a file.

    Of all lines "step" is a whole number; what a line that tells no decision has besides are numbers or None.

    Raises:
        UserError: there is something else than a file.
    """
    return list(_told(path, warn, lambda piece, _: io.BytesIO(piece)))


def read_rollbacks(path: Path, warn: Callable[[str], None] = LOGGER.warning) -> list[dict[str, Any]]:
    """The rollbacks in a metrics.jsonl, wherever they stand; for the run's owner, who is about to go on with it.

    Lines are parsed where they tell a decision or do not look like a line of ours: damaged ones are named as by
    `read_metrics`, but not those whose damage shows in their numbers alone. Raises as `read_metrics`.
    """
    _finish_cut(path)
    return [line for line in _told(path, warn, _suspects) if line.get("event") == "rollback"]


def read_validations(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that tell a validation; the others are not parsed. Raises as `read_metrics`."""

    def chosen(piece: bytes, lines: int) -> Iterable[bytes]:
        return (raw if b'"val_loss"' in raw else b"" for raw in io.BytesIO(piece))

    return [line for line in _told(path, lambda text: None, chosen) if "val_loss" in line]


def _suspects(piece: bytes, lines: int) -> Iterable[bytes]:
    """Those of whole lines that must be parsed, beside blank ones, so that they keep their numbers."""
    if (b"}\n" + piece).count(b"}\n" + _LINE) != lines or not piece.endswith(b"}\n") or b"\0" in piece:
        return io.BytesIO(piece)
    if b'"event"' not in piece:
        return ()
    return (raw if b'"event"' in raw else b"" for raw in io.BytesIO(piece))


def _told(
    path: Path, warn: Callable[[str], None], chosen: Callable[[bytes, int], Iterable[bytes]]
) -> Iterator[dict[str, Any]]:
    """What the lines say that are `chosen` of some lines and their number; damaged ones are named through `warn`."""
    before = damaged = 0
    with _opened(path) as file:
        while piece := file.read(_PIECE):
            piece += file.readline(_PIECE)
            lines = piece.count(b"\n")
            for number, raw in enumerate(chosen(piece, lines), before + 1):
                try:
                    if line := _parsed(raw):
                        yield line
                except ValueError as error:
                    if raw.endswith(b"\n"):  # what a killed run left of its last line has none
                        damaged += 1
                        if damaged <= _NAMED:
                            warn(f"{path}: line {number} is passed over: damaged ({error}); mend or delete it")
            before += lines
    if damaged > _NAMED:
        warn(f"{path}: {damaged - _NAMED} more damaged lines are passed over")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) if os.path.lexists(path) else io.BytesIO() as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): mend it or move it away") from error


def _parsed(raw: bytes) -> dict[str, Any] | None:
    if not raw.strip():
        return None
    line = parse_json(raw)
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        raise ValueError('no object with a whole "step"')
    if "event" not in line:
        odd = [key for key, value in line.items() if type(value) not in (int, float, type(None))]
        if odd:
            raise ValueError(f"{odd[0]!r:.40} is no number")
    elif line["event"] == "rollback":
        span = line.get("left_out")
        if not isinstance(span, list) or [type(each) for each in span] != [int, int] or not 0 <= span[0] <= span[1]:
            raise ValueError("a rollback that does not tell which batches it leaves out")
    return line


def _beyond(file: BinaryIO, step: int) -> tuple[int, bytes]:
    """Where in a metrics.jsonl the first line begins that lies beyond `step`, and what of all that follows stays.

    Lines stand in the order of their steps, decisions and damaged ones apart: it is read from its end, up to a piece
    without a line to be dropped.
    """
    first = end = file.seek(0, os.SEEK_END)
    stays: list[tuple[int, bytes]] = []
    before = beyond = False  # of the lines of a piece
    while end > 0 and (beyond or not before):
        begin = place = _line_begin(file, max(0, end - _LOOK))
        before = beyond = False
        file.seek(begin)
        for raw in io.BytesIO(file.read(end - begin)):
            whole = raw.endswith(b"\n")
            try:
                line = _parsed(raw)
                drop = line is not None and "event" not in line and line["step"] > step
                before |= line is not None and "event" not in line and not drop
            except ValueError:
                drop = not whole
            beyond |= drop
            if drop or not whole:
                first = min(first, place)
            if not drop:
                stays.append((place, raw if whole else raw + b"\n"))
            place += len(raw)
        end = begin
    return first, b"".join(raw for place, raw in sorted(stays) if place >= first)


def _line_begin(file: BinaryIO, place: int) -> int:
    """Where the line begins that holds the byte at `place`."""
    while place > 0:
        begin = max(0, place - _LOOK)
        file.seek(begin)
        if end := file.read(place - begin).rfind(b"\n") + 1:
            return begin + end
        place = begin
    return 0


def _cut(path: Path, first: int, kept: bytes) -> None:
    """Put `kept` in place of all that a file has from byte `first` on: killed in between, `_finish_cut` goes on."""
    plan = path.with_suffix(".cut")
    if kept:
        with publish_file(plan) as file:
            file.write(b"%d\n" % first + kept)
    with open(path, "rb+") as file:
        file.truncate(first)
        file.seek(first)
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    plan.unlink(missing_ok=True)


def _finish_cut(path: Path) -> None:
    """Go on with what a killed run was cutting."""
    plan = path.with_suffix(".cut")
    if not os.path.lexists(plan):
        return
    with writing(plan):
        try:
            first, _, kept = read_regular(plan).partition(b"\n")
            if not 0 <= int(first) <= path.stat().st_size:
                raise ValueError("of another file")
        except ValueError as error:
            raise UserError(f"{plan}: damaged ({error}): delete it, and look at the end of {path.name}") from error
        _cut(path, int(first), kept)


class Metrics:
    """Writes to all destinations.

    Args:
        run: the run directory.
        step: the step that the run goes on from; see `rewind`.
        wandb_project: a Weights & Biases project, or None.
        lock: that of the run; who has lost it writes nothing.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        config: dict[str, Any],
        wandb_project: str | None = None,
        lock: Lock | None = None,
    ):
        self._run, self._path, self._lock = run, run / "metrics.jsonl", lock
        self._waiting: list[str] = []
        self._descriptor: int | None = None
        self._events: Any = None
        self.rewind(step)
        self._wandb = _start_wandb(run, config, wandb_project) if wandb_project else None

    def rewind(self, step: int) -> None:
        """Drop what is recorded beyond `step`, but for decisions, which are needed to decide alike again."""
        from torch.utils.tensorboard import SummaryWriter

        self._shut()
        if self._lock is not None:
            self._lock.require()
        _finish_cut(self._path)
        with _opened(self._path) as file:
            size, (first, kept) = file.seek(0, os.SEEK_END), _beyond(file, step)
        with writing(self._path):
            if first < size:
                _cut(self._path, first, kept)
            threading.excepthook = _without_full_disks
            # Events beyond the checkpoint are hidden from view by `purge_step`.
            self._events = SummaryWriter(str(self._run / "events"), purge_step=step + 1)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o666)

    def write(self, line: dict[str, Any]) -> None:
        """Record one line; it must have "step"."""
        lost = {key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        finite = {key: None if key in lost else value for key, value in line.items()}
        self._waiting.append(json.dumps(finite, allow_nan=False) + "\n")
        with writing(self._path), _full_disk_allowed():
            self._append()
            for key, value in line.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._events.add_scalar(key, value, line["step"])
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def show(self, name: str, pixels_HWC: "np.ndarray", step: int) -> None:
        """Give TensorBoard (and Weights & Biases) a picture: uint8 [height, width, 3]."""
        with writing(self._path), _full_disk_allowed():
            self._events.add_image(name, pixels_HWC, step, dataformats="HWC")
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({name: require_wandb().Image(pixels_HWC)}, step=step)

    def _append(self) -> None:
        assert self._descriptor is not None
        if self._lock is not None:
            self._lock.require()
        before = os.fstat(self._descriptor).st_size
        data = "".join(self._waiting).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, before)  # no half line
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Flush and close every destination."""
        if self._waiting:
            with writing(self._path):
                self._append()
        self._shut()
        if self._wandb is not None:
            self._wandb.finish()

    def _shut(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._events is not None:
            with _full_disk_allowed():
                self._events.close()


@contextmanager
def _full_disk_allowed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _without_full_disks(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises a full disk again where the next event is written, which allows it."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in (errno.ENOSPC, errno.EDQUOT)):
        threading.__excepthook__(args)


def require_wandb() -> Any:
    """The wandb package."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb: wandb is not installed: pip install wandb") from error
    return wandb


def _start_wandb(run: Path, config: dict[str, Any], project: str) -> Any:
    # The run's directory names it, so that a resumed run goes on with the same curve.
    path = run.resolve()
    identifier = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    start = require_wandb().init
    return start(project=project, name=path.name, id=identifier, resume="allow", dir=str(run), config=config)
