"""The labelled splits that a classifier is trained and scored on, and their features under several masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.config.schema import Config
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.features.cache import Features, cached
from igpt_ds.features.classifier import Classifier, Rows
from igpt_ds.features.extract import Network
from igpt_ds.features.masks import VOTES, mask_seed, vote
from igpt_ds.loading.splits import open_split, resolve_data
from igpt_ds.run.directory import LOGGER
from igpt_ds.weights.base import Weights, at_resolution, check_palette, config_of
from igpt_ds.weights.formats import open_weights


@dataclass(frozen=True)
class Splits:
    """The data: train/, val/ and, where it is asked for, test/."""

    train: Dataset
    validation: Dataset
    test: Dataset | None = None

    @property
    def train_crop(self) -> str | None:
        """How the training images were cut: "random", "centre" or "none"; None: it is not known."""
        found = self.train.manifest.transform.get("crop")
        return found if isinstance(found, str) else None

    def check(self, checkpoint: Weights, images: int | None = None) -> None:
        for dataset in filter(None, (self.train, self.validation, self.test)):
            check_palette(checkpoint, dataset.palette.sha256, dataset.path, LOGGER.warning)
            if dataset.manifest.classes is None:
                raise UserError(f"{dataset.path}: images without labels: build the data from class folders")
            if dataset.manifest.classes != self.train.manifest.classes:
                raise UserError(
                    f"{dataset.path}: its classes are not those of {self.train.path}: build the splits in one go"
                )
            if not dataset.rows:
                raise UserError(f"{dataset.path}: no images: build it with a larger share, see igpt-data shards --help")
            dataset.labels()  # refused before anything is computed
        if self.train_crop == "random":
            LOGGER.warning(
                f"{self.train.path}: cropped at random: its first view is classified; the paper's features are of "
                "centre crops: build another DATA with igpt-data shards --no-augment (docs/evaluation.md)"
            )
        if len(np.unique(self.train.labels()[:images])) < 2:
            raise UserError(f"{self.train.path}: images of one class only: a classifier needs two or more")


def chance(train: Dataset, scored: Dataset) -> float:
    """The accuracy of naming the training split's commonest class, whatever the image; of equals the first."""
    return float((scored.labels() == np.bincount(train.labels()).argmax()).mean())


@dataclass(frozen=True)
class Scored:
    """Features of a split that is classified.

    Attributes:
        features: under mask 0 of a BERT model.
        masked: under each mask, the first among them; empty for an auto-regressive model.
        unmasked: a BERT model's with nothing hidden.
    """

    features: Features
    masked: list[Features] = field(default_factory=list)
    unmasked: Features | None = None


def take(network: Network, dataset: Dataset, folder: Path, images: int | None, number: int | None = 0) -> Features:
    """The features of a split; a collective, see `cached`.

    Args:
        number: of a BERT model's mask; None hides nothing.
    """
    config, split = network.config, dataset.manifest.split
    hidden = None if config.causal or number is None else mask_seed(config.seed, split, number)
    mask = "" if config.causal else ", no mask" if number is None else f", mask {number + 1}"
    name = "trained" if network.checkpoint else "untrained"
    return cached(network, dataset, folder, f"features of {name}, {split}{mask}", images, hidden)


def take_scored(network: Network, dataset: Dataset, folder: Path, images: int | None, masks: int) -> Scored:
    """The features of a split under so many masks, and under none; 0 for an auto-regressive model. A collective."""
    masked = [take(network, dataset, folder, images, number) for number in range(masks)]
    if not masked:
        return Scored(take(network, dataset, folder, images))
    return Scored(masked[0], masked, take(network, dataset, folder, images, None))


def rows(features: Features, layers: Sequence[int]) -> Rows:
    """Images with the features of some layers side by side."""
    return Rows([tuple(features.of(layer) for layer in layers)], features.labels)


def ensemble(found: Classifier, scored: Scored, layers: tuple[int, ...], config: Config) -> dict[str, Any] | None:
    """Accuracy under each mask, of the modal prediction over all, and with nothing hidden; None without masks."""
    if not scored.masked or scored.unmasked is None:
        return None
    labels = scored.features.labels
    predictions_MI = np.stack([found.predict(rows(features, layers)) for features in scored.masked])
    modal_I = vote(torch.from_numpy(predictions_MI), torch.arange(len(labels)), config).numpy()
    single = (predictions_MI == labels).mean(axis=1)
    return {
        "count": len(single),
        "layers": list(layers),
        "accuracy": float((modal_I == labels).mean()),
        "n": len(labels),
        "single": single.tolist(),
        "single_mean": float(single.mean()),
        "single_std": float(single.std(ddof=1)) if len(single) > 1 else None,
        "unmasked": found.accuracy(rows(scored.unmasked, layers)),
    }


def open_run(
    path: Path, step: int | None, data: str | None, test: bool, images: int | None = None
) -> tuple[Weights, Config, Splits]:
    """What an evaluation of weights on labelled data needs, checked.

    Args:
        path: of a run directory, or of weights of any format.
        step: of a run's checkpoint; None for the newest whole one.
        data: folder of the splits; None for the run's first source.
        test: whether DATA/test is to be there.
        images: of each split, from its beginning, that are used; None for all.
    """
    checkpoint = open_weights(path, step)
    config = config_of(checkpoint)
    if not data and not config.data.sources:
        raise UserError(f"{path}: its checkpoint names no data: give --data")
    folder = data or config.data.sources[0]
    opened = [open_split(folder, split) for split in ("train", "val", *(["test"] if test else []))]
    splits = Splits(*opened)
    splits.check(checkpoint, images)
    checkpoint = at_resolution(checkpoint, splits.train.manifest.resolution, LOGGER.warning)
    return checkpoint, resolve_data(config_of(checkpoint), opened), splits


def masks_of(config: Config, asked: int | None) -> int:
    """How many masks each image gets: of a BERT model as many as asked for, or the paper's 5; else 0."""
    if not config.causal:
        return asked or VOTES
    if asked is not None:
        raise UserError(f"--masks {asked}: {config.name} is no BERT model, nothing is hidden from it: leave it out")
    return 0
