"""What a run has recorded, read for figures, tables and the report. Loads neither a model nor torch.

    RUN/config.toml         the configuration
        metrics.jsonl       see igpt_ds/run/metrics.py
        NAME*.json          of each evaluation, see `igpt_ds.evals`: probe*.json, low_data*.json, eval*.json
        result.json         how a fine-tuning ended
        ../sweep.json       the search for the learning rate that the run is a part of

Whatever is not there is empty here; what is there and is not what it should be is refused.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds import evals
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.evals import SHARE, Record
from igpt_ds.reading import read_json
from igpt_ds.run.metrics import read_metrics


@dataclass(frozen=True)
class RunRecords:
    """One run.

    Attributes:
        label: what the run is called in figures: its directory's name, with its parent's where two have the same.
        metrics: lines of metrics.jsonl: numbers, nan for what cannot be drawn, and the words of decisions.
        evaluations: of each evaluation, by its module's name, the records by file name.
    """

    path: Path
    label: str
    config: Config
    metrics: list[Record]
    evaluations: dict[str, dict[str, Record]]
    result: Record | None
    sweep: Record | None

    @property
    def objective(self) -> str:
        """The objective as the paper calls it."""
        return "auto-regressive" if self.config.causal else "BERT"

    @property
    def probes(self) -> list[Record]:
        """Probes of different steps, by step; of several records of a step the one in probe.json."""
        by_step: dict[int, Record] = {}
        for _, record in sorted(self.evaluations.get("probe", {}).items(), key=lambda each: each[0] != "probe"):
            if record.get("norm", "first") == "first":  # what others take (--norm none) is not the paper's
                by_step.setdefault(record["step"], record)
        return [by_step[step] for step in sorted(by_step)]

    @property
    def probe(self) -> Record | None:
        """The probe of the last step that was probed."""
        return self.probes[-1] if self.probes else None

    @property
    def low_data(self) -> Record | None:
        """The low-data evaluation of the newest checkpoint."""
        return self.evaluations.get("low_data", {}).get("low_data")

    @property
    def validation(self) -> dict[int, tuple[float, int]]:
        """Validation loss (nats a token) and images by step: the training's own, else `igpt-ds eval`'s."""
        found = {
            record["step"]: (record["nats_per_token"], record["images"])
            for record in self.evaluations.get("likelihood", {}).values()
            if record["split"] == "val"
        }
        lines = (line for line in self.metrics if "val_loss" in line)
        return found | {line["step"]: (line["val_loss"], line.get("val_images", 0)) for line in lines}

    @property
    def data(self) -> str:
        """Name of the folder of the first source."""
        return Path(self.config.data.sources[0]).name if self.config.data.sources else ""


def read_runs(paths: Sequence[Path]) -> list[RunRecords]:
    """Read several runs, each once, in the order given."""
    distinct = list(dict.fromkeys(path.resolve() for path in paths))
    names = [path.name for path in distinct]
    labels = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in distinct]
    return [read_run(path, label) for path, label in zip(distinct, labels, strict=True)]


def read_run(path: Path, label: str = "") -> RunRecords:
    """Read all that a run has recorded."""
    if not os.path.isfile(path / "config.toml"):  # noqa: PTH113 (False as well of a name that is too long)
        raise UserError(
            f"{path}: no run directory (no config.toml): name that of a training (of a search: one of its lr-*)"
        )
    config = load_config(path / "config.toml")
    unresolved = config.finetune is not None and config.finetune.classes is None
    if unresolved or None in (config.data.resolution, config.data.palette_size):
        raise UserError(f"{path / 'config.toml'}: lacks what a run takes of its data: resolution, palette or classes")
    return RunRecords(
        path=path,
        label=label or path.resolve().name,
        config=config,
        metrics=[_numbers(line) for line in read_metrics(path / "metrics.jsonl")],
        evaluations={name: _read_all(path, evals.load(name)) for name in evals.names()},
        result=_if_there(path / "result.json", _RESULT, "igpt-ds finetune"),
        sweep=_if_there(path.resolve().parent / "sweep.json", _SWEEP, "igpt-ds sweep"),
    )


_MOST = 1e30  # an axis of far greater numbers cannot be divided
_RESULT = {
    "accuracy": SHARE,
    "n": int,
    "split?": str,
    "validation?": {"accuracy": SHARE, "n": int},
    "masks?": {"accuracy": SHARE},
}
_TRIAL = {"rate": float, "status?": str, "step?": int, "val_loss?": float, "val_accuracy?": SHARE, "n?": int}
_SWEEP = {"rates": [_TRIAL], "winner?": float, "edge?": str}


def _numbers(line: Record) -> Record:
    kept = {key: value for key, value in line.items() if key in ("event", "reason") or _drawable(value)}
    return {key: math.nan for key, value in line.items() if type(value) in (int, float, type(None))} | kept


def _drawable(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST


def _read_all(path: Path, evaluation: evals.Evaluation) -> dict[str, Record]:
    found = {}
    for file in sorted(path.glob(f"{evals.stem(evaluation)}*.json")):
        record = found[file.stem] = _read(file, evaluation.HOLDS, f"igpt-ds {evaluation.NAME}")
        if fault := getattr(evaluation, "fault", lambda record: "")(record):
            raise UserError(f"{file}: no record of igpt-ds {evaluation.NAME} ({fault}): write it anew")
    return found


def _if_there(path: Path, holds: Record, command: str) -> Record | None:
    return _read(path, holds, command) if os.path.lexists(path) else None


def _read(path: Path, holds: Record, command: str) -> Record:
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: write it anew with {command}") from error
    if fault := _misfit(record, holds, ""):
        raise UserError(f"{path}: no record of {command} ({fault}): write it anew")
    found: Record = record
    return found


def _misfit(value: Any, kind: Any, name: str) -> str:
    """What of a record is not of its kind, see `igpt_ds.evals`; "": nothing."""
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is missing or no object"
        parts = []
        for key, inner in dict.fromkeys(value, kind["*"]).items() if "*" in kind else kind.items():
            plain = key if "*" in kind else key.removesuffix("?")
            if plain == key or value.get(plain) is not None:
                parts.append((value.get(plain), inner, f"{name}.{plain:.40}".lstrip(".")))
    elif isinstance(kind, list):
        if not isinstance(value, list):
            return f"{name} is missing or no list"
        gaps = None in kind
        parts = [(item, kind[0], f"{name}[{i}]") for i, item in enumerate(value) if item is not None or not gaps]
    elif isinstance(kind, tuple):
        right = type(value) in (int, float) and kind[0] <= value <= kind[1]
        return "" if right else f"{name} is missing or no number from {kind[0]} to {kind[1]}"
    else:
        # JSON writes 1.0 as 1 in other hands; true is no number.
        right = _drawable(value) if kind is float else type(value) is kind and not (kind is int and value < 0)
        return "" if right else f"{name} is missing or no {kind.__name__}"
    return next(filter(None, (_misfit(*part) for part in parts)), "")


def best_layer(probe: Record) -> Record:
    """The layer with the best validation accuracy."""
    return max(probe["layers"], key=lambda result: result["accuracy"])
