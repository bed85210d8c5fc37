"""Run directories with records but without a training: figures that tests can tell apart."""

import json
from pathlib import Path
from typing import Any

from igpt_ds.config.file import load_config, to_toml
from igpt_ds.config.schema import replace

LOW_DATA = {
    "step": 600,
    "layer": 1,
    "split": "val",
    "regularisation": 1.0,
    "labels_per_class": {
        "4": {"accuracies": [0.5, 0.6, 0.55, 0.58, 0.52], "mean": 0.55, "std": 0.04123, "n": 60},
        "25": {"accuracies": [0.8, 0.82, 0.81, 0.8, 0.82], "mean": 0.81, "std": 0.01, "n": 60},
    },
}


def make_run(folder: Path, *overrides: str, start: str | None = None) -> Path:
    """A run directory with a configuration alone; with `start` that of a fine-tuning."""
    facts = ["data.resolution=2", "data.palette_size=8", 'data.sources=["somewhere/pets"]', *overrides]
    if start is not None:
        facts += [f"init_from={json.dumps(start)}", "finetune.classes=3"]
    folder.mkdir(parents=True)
    config = replace(load_config("tiny", facts), "training", steps=600)
    (folder / "config.toml").write_text(to_toml(config))
    return folder


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record))


def probe(step: int, *accuracies: float, **more: Any) -> dict[str, Any]:
    """A probe record of one accuracy a layer."""
    chosen = {"n": 60, "regularisation": 1.0, "learning_rate": None, "converged": True}
    layers = [{"layer": layer, "accuracy": a, **chosen} for layer, a in enumerate(accuracies)]
    best = max(accuracies)
    facts = {
        "step": step,
        "solver": "lbfgs",
        "layers": layers,
        "untrained": [],
        "pixels": 0.4,
        "pixels_regularisation": 1.0,
        "concatenation": [],
        "masks": None,
        "train_images": 533,
        "validation_images": 60,
    }
    return {**facts, "best_layer": accuracies.index(best), "best_accuracy": best, "test": None, **more}


def masks(accuracy: float) -> dict[str, Any]:
    """What a record holds of the modal prediction over 5 masks."""
    return {"count": 5, "accuracy": accuracy, "n": 60, "single_mean": 0.8, "single_std": 0.01, "unmasked": 0.7}


def likelihood(nats: float = 1.25, split: str = "val", step: int = 600) -> dict[str, Any]:
    """What `igpt-ds eval` writes, of images of 2 x 2 pixels; one position was never masked."""
    mean = {"nats_per_token": nats, "bits_per_token": nats / 0.6931471805599453, "standard_error": 0.01, "images": 60}
    return {
        "kind": "likelihood",
        "name": "tiny",
        "step": step,
        "split": split,
        **mean,
        "tokens": 180,
        "images_without_mask": 0,
        "masks": 5,
        "mask_seed": 3,
        "mask_rate": 0.15,
        "resolution": 2,
        "colours": 8,
        "palette_distortion": None,
        "classes": [{"name": "cat", **mean}, {"name": "<b>dog", **mean, "nats_per_token": 1.3}],
        "positions": {"nats_per_token": [1.0, 2.0, None, 0.5], "tokens": [60, 60, 0, 60]},
    }


def write_metrics(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def training_line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 0.003, "grad_norm": 0.5, "tokens_per_s": 1e4, "data_wait": 0.01}
