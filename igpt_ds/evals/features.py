"""Pooled features of every layer, f^l = mean over positions of n^l (paper section 2.4), from a checkpoint."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds.checkpoint import Checkpoint
from igpt_ds.config import Config
from igpt_ds.loader import evaluation_batches
from igpt_ds.model import ImageGPT, initialise
from igpt_ds.objectives import load_objective
from igpt_ds.shards import Dataset


@dataclass(frozen=True)
class Features:
    """Features and labels of a dataset.

    Attributes:
        layers: float32 [L + 1, images, D]; entry L is the final norm's.
        labels: int64 [images].
    """

    layers: np.ndarray
    labels: np.ndarray


def load_model(config: Config, checkpoint: Checkpoint | None) -> ImageGPT:
    """The network of a checkpoint in evaluation mode, or an untrained one, on the GPU where there is one: float32."""
    model = ImageGPT(config)
    if checkpoint is None:
        initialise(model, config.seed)
    else:
        model.load_state_dict(checkpoint.weights())
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def extract(
    model: ImageGPT, config: Config, dataset: Dataset, title: str, images: int | None = None, batch: int = 64
) -> Features:
    """Features of all layers in one pass over the dataset's images, or its first `images`.

    A BERT model sees masked input here too, as it did in training (paper section 4.6).

    Raises:
        UserError: the dataset has no labels.
    """
    layers = range(config.model.layers + 1)
    total = min(dataset.rows, images or dataset.rows)
    labels = dataset.labels()[:total]
    result = np.empty((len(layers), total, config.model.width), np.float32)
    objective = load_objective(config)
    device = model.head.weight.device
    done = 0
    with tqdm(total=total, desc=title, unit=" images", leave=False, disable=None) as progress:
        for rows in evaluation_batches(dataset, batch, rank=0, world=1):
            if done == total:
                break
            tokens_BT = rows["tokens"].to(device)
            mask_BT = objective.mask(tokens_BT, rows["positions"], config)
            features = model(tokens_BT, mask_BT, features=layers, logits=False).features
            count = min(int(rows["weight"].sum()), total - done)
            for layer in layers:
                result[layer, done : done + count] = features[layer][:count].cpu().numpy()
            done += count
            progress.update(count)
    return Features(result, labels)


def pixels(dataset: Dataset, images: int | None = None) -> np.ndarray:
    """The colours of the (first) images as features, the baseline to beat: float32 [images, 3 n] in [-1, 1]."""
    tokens = dataset.images(images)
    return dataset.palette.colours[tokens].reshape(len(tokens), -1)
