"""What a run tells of itself: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for.

Rank 0 writes. A line of metrics.jsonl is one JSON object: training lines have "step", "loss" (nats a token) and
"lr", validation lines "step" and "val_loss". After a resume the lines beyond the checkpoint are dropped, so that
no step stands there twice.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from igpt_ds.atomic import publish_text, writing
from igpt_ds.errors import UserError


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
        step: the step that the run goes on from; what is recorded beyond it is dropped.
        wandb_project: a Weights & Biases project, or None.

    Raises:
        UserError: the directory cannot be written, or wandb is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, config: dict[str, Any], wandb_project: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        publish_text(path, "".join(kept))
        with writing(path):
            self._file = path.open("a")
            # Events beyond the checkpoint are hidden from view by `purge_step`.
            self._events = SummaryWriter(str(run / "events"), purge_step=step + 1)
        self._path = path
        self._wandb = _start_wandb(run, config, wandb_project) if wandb_project else None

    def write(self, line: dict[str, Any]) -> None:
        """Record one line; it must have "step"."""
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for key, value in line.items():
                if key != "step" and value is not None:
                    self._events.add_scalar(key, value, line["step"])
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self) -> None:
        """Flush and close every destination."""
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb() -> Any:
    """The wandb package.

    Raises:
        UserError: it is not installed.
    """
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
