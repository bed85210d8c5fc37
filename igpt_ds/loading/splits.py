"""The data that a configuration names, opened, and the configuration that has met its data."""

import os
from collections.abc import Sequence
from pathlib import Path

from igpt_ds.config.schema import Config, replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.dataset.subset import Subset, balanced, require_labels
from igpt_ds.errors import UserError
from igpt_ds.loading.order import MOST_SLOTS


def open_split(folder: str | Path, split: str, or_else: str = "") -> Dataset:
    """Open FOLDER/SPLIT.

    Args:
        or_else: what a user can do who has no such split, but to build it.
    """
    path = Path(folder) / split
    if not os.path.isdir(folder):  # noqa: PTH112 - false for a name that is too long, too
        raise UserError(f"{folder}: no such directory: build it with igpt-data shards, or mend --data")
    if not path.is_dir():
        raise UserError(f"{folder}: has no {split}/ dataset: build it with igpt-data shards{or_else}")
    return Dataset.open(path)


def few_labels(dataset: Dataset, count: int, seed: int) -> Dataset:
    """`count` images of each class of a labelled dataset: those of the first subset that low-data draws."""
    require_labels(dataset, count, f"finetune.labels={count}")
    return Subset(dataset, balanced(dataset.labels(), count, seed))


def open_held_out(folder: str | Path) -> Dataset | None:
    """FOLDER/val, to be trained on; None where nothing was held out (web images, say)."""
    return open_split(folder, "val") if (Path(folder) / "val").exists() else None


def folded_weights(
    weights: Sequence[int] | None, train: Sequence[Dataset], held_out: Sequence[Dataset | None]
) -> tuple[int, ...] | None:
    """Weights of the training sets and, behind them, of the held-out ones, which share their source's by rows.

    A source has the same part of the mixture as before: its weight is multiplied by one number for all, so that it can
    be shared, and the two parts add up to it. Without weights all go by rows, and there are none (None).
    """
    if not any(held_out):
        raise UserError(f"{train[0].path.parent}: data.fold_validation=true: no source has a val/: leave it out")
    if weights is None:
        return None
    times = max(1, MOST_SLOTS // sum(weights))
    parts = []
    for weight, dataset, other in zip(weights, train, held_out, strict=True):
        total, rows = weight * times, other.rows if other else 0
        folded = max(1, round(total * rows / (dataset.rows + rows))) if rows else 0
        if folded == total:
            raise UserError(f"data.weights: {weight} cannot be shared with {dataset.path.parent}/val: use smaller ones")
        parts.append((total - folded, folded))
    return (*(part for part, _ in parts), *(part for _, part in parts if part))


def resolve_data(config: Config, datasets: list[Dataset]) -> Config:
    """Fill in resolution and palette size from the manifests; what the configuration states must agree."""
    for dataset in datasets:
        facts = {"resolution": dataset.manifest.resolution, "palette_size": dataset.palette.k}
        for key, value in facts.items():
            stated = getattr(config.data, key)
            if stated is None:
                config = replace(config, "data", **{key: value})
            elif stated != value:
                raise UserError(
                    f"{dataset.path}: {key} is {value}, but {config.name} takes {stated}: "
                    f"choose another preset, or build the data anew"
                )
        if dataset.palette.sha256 != datasets[0].palette.sha256:
            raise UserError(
                f"{dataset.path}: another palette than {datasets[0].path}'s: build both with the same palette.npy"
            )
    return config
