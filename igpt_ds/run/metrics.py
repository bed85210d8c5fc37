"""What a run tells of itself: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.

Rank 0 writes. A line of metrics.jsonl is one JSON object: training lines have "step", "loss" (nats a token) and
"lr", validation lines "step" and "val_loss", decisions "step", "event" and "reason". After a resume and after a
rollback the lines beyond the checkpoint are dropped, so that no step stands there twice; decisions stay. A number that
is not finite is null.

A damaged line is passed over with a warning, and stays where it is; but what a killed run left of its last line goes.

A full disk does not end a run: lines wait in memory until there is room again.
"""

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.atomic import publish_file, writing
from igpt_ds.errors import UserError
from igpt_ds.lock import Lock
from igpt_ds.reading import parse_json, read_regular
from igpt_ds.run.directory import LOGGER

if TYPE_CHECKING:
    import numpy as np


_NAMED = 10  # damaged lines, each with a warning of its own


def read_metrics(path: Path, warn: Callable[[str], None] = LOGGER.warning) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for damaged ones, which are named through `warn`; [] without a file.

    Of all lines "step" is a whole number; what a line that tells no decision has besides are numbers or None.

    Raises:
        UserError: there is something else than a file.
    """
    lines, damaged = [], 0
    for number, (_, line) in enumerate(_lines(path), 1):
        if isinstance(line, dict):
            lines.append(line)
        elif line is not None:
            damaged += 1
            if damaged <= _NAMED:
                warn(f"{path}: line {number} is passed over: damaged ({line}); mend or delete it")
    if damaged > _NAMED:
        warn(f"{path}: {damaged - _NAMED} more damaged lines are passed over")
    return lines


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | ValueError | None]]:
    """Each line as it stands there, and what it says: None if nothing, a ValueError if it cannot be told.

    A last line that has no end and cannot be read is left out.
    """
    try:
        data = read_regular(path) if os.path.lexists(path) else b""
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): mend it or move it away") from error
    for raw in io.BytesIO(data):
        try:
            yield raw, _parsed(raw)
        except ValueError as error:
            if raw.endswith(b"\n"):
                yield raw, error


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
        kept = b""
        for raw, line in _lines(self._path):
            if not isinstance(line, dict) or line["step"] <= step or "event" in line:
                kept += raw if raw.endswith(b"\n") else raw + b"\n"
        if not self._path.exists() or kept != read_regular(self._path):
            with publish_file(self._path) as file:
                file.write(kept)
        with writing(self._path):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            # Events beyond the checkpoint are hidden from view by `purge_step`.
            self._events = SummaryWriter(str(self._run / "events"), purge_step=step + 1)

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
