"""The data that a configuration names, opened, and the configuration that has met its data."""

import os
from pathlib import Path

from igpt_ds.config.schema import Config, replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError


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
