"""What a run tells of itself: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.

Rank 0 writes. A line of metrics.jsonl is one JSON object: training lines have "step", "loss" (nats a token) and
"lr", validation lines "step" and "val_loss", decisions "step", "event" and "reason". After a resume and after a
rollback the lines beyond the checkpoint are dropped, so that no step stands there twice; decisions stay.

A full disk does not end a run: lines wait in memory until there is room again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.atomic import publish_text, writing
from igpt_ds.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a killed run left half-written; [] without a file."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Metrics:
    """Writes to all destinations.

    Args:
        run: the run directory.
        step: the step that the run goes on from; see `rewind`.
        wandb_project: a Weights & Biases project, or None.
    """

    def __init__(self, run: Path, step: int, config: dict[str, Any], wandb_project: str | None = None):
        self._run, self._path = run, run / "metrics.jsonl"
        self._waiting: list[str] = []
        self._descriptor: int | None = None
        self._events: Any = None
        self.rewind(step)
        self._wandb = _start_wandb(run, config, wandb_project) if wandb_project else None

    def rewind(self, step: int) -> None:
        """Drop what is recorded beyond `step`, but for decisions, which are needed to decide alike again."""
        from torch.utils.tensorboard import SummaryWriter

        self._shut()
        kept = [line for line in read_metrics(self._path) if line["step"] <= step or "event" in line]
        publish_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(self._path):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            # Events beyond the checkpoint are hidden from view by `purge_step`.
            self._events = SummaryWriter(str(self._run / "events"), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Record one line; it must have "step"."""
        self._waiting.append(json.dumps(line) + "\n")
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
