"""What a run has recorded, read for figures, tables and the report. Loads neither a model nor torch.

    RUN/config.toml         the configuration
        metrics.jsonl       see igpt_ds/run/metrics.py
        NAME*.json          of each evaluation, see `igpt_ds.evals`: probe*.json, low_data*.json, eval*.json
        result.json         how a fine-tuning ended
        ../sweep.json       the search for the learning rate that the run is a part of

Whatever is not there is empty here; what is there and is not what it should be is refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds import evals
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.evals import Record
from igpt_ds.run.metrics import read_metrics


@dataclass(frozen=True)
class RunRecords:
    """One run.

    Attributes:
        label: what the run is called in figures: its directory's name, with its parent's where two have the same.
        metrics: lines of metrics.jsonl.
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
    if not (path / "config.toml").is_file():
        raise UserError(
            f"{path}: no run directory (no config.toml): name that of a training (of a search: one of its lr-*)"
        )
    return RunRecords(
        path=path,
        label=label or path.resolve().name,
        config=load_config(path / "config.toml"),
        metrics=read_metrics(path / "metrics.jsonl"),
        evaluations={name: _read_all(path, evals.load(name)) for name in evals.names()},
        result=_if_there(path / "result.json", {"accuracy": float, "n": int}, "igpt-ds finetune"),
        sweep=_if_there(path.resolve().parent / "sweep.json", {"rates": list}, "igpt-ds sweep"),
    )


def _read_all(path: Path, evaluation: evals.Evaluation) -> dict[str, Record]:
    found = {}
    for file in sorted(path.glob(f"{evals.stem(evaluation)}*.json")):
        record = found[file.stem] = _read(file, evaluation.HOLDS, f"igpt-ds {evaluation.NAME}")
        if fault := getattr(evaluation, "fault", lambda record: "")(record):
            raise UserError(f"{file}: no record of igpt-ds {evaluation.NAME} ({fault}): write it anew")
    return found


def _if_there(path: Path, keys: dict[str, type], command: str) -> Record | None:
    return _read(path, keys, command) if path.exists() else None


def _read(path: Path, keys: dict[str, type], command: str) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: write it anew with {command}") from error
    for key, kind in keys.items():
        value = record.get(key) if isinstance(record, dict) else None
        # JSON writes 1.0 as 1 in other hands; true is no number.
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise UserError(f"{path}: no record of {command} ({key} is missing or no {kind.__name__}): write it anew")
    if not isinstance(record, dict):
        raise UserError(f"{path}: no record of {command}: write it anew")
    return record


def best_layer(probe: Record) -> Record:
    """The layer with the best validation accuracy."""
    return max(probe["layers"], key=lambda result: result["accuracy"])
