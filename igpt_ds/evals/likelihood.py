"""Likelihood of held-out images: the objective's loss in nats and bits a token, whole, by class and by position.

A token is a palette colour, not an RGB value: these figures say nothing about bits per RGB dimension, because the
palette's own loss (its distortion) is not in them. They compare models that share one palette and resolution, and
so the distortion is reported beside them where the data's manifest records it.

The network runs in float32 and sums are taken in float64. With several ranks each holds the whole network and
reads its share of the images.

Suffixes: I images of the dataset, B of a batch, T positions, K colours.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.loading.loader import evaluation_batches
from igpt_ds.loading.splits import resolve_data
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import load_objective, token_nats
from igpt_ds.run.directory import LOGGER
from igpt_ds.weights.base import Weights, check_palette

MASKS = 5  # of a BERT model, as many as the paper's ensembles take (section 4.6)
_TOKENS = 1 << 16  # in one forward pass: 64 images of 32², 16 of 64²


@dataclass(frozen=True)
class Likelihood:
    """Losses of a dataset's images.

    Attributes:
        images_I: float64, nats a token of each image, mean over its masks; NaN where all its masks are empty.
        positions_T: float64, mean nats of each position over the images (and masks that hide it); NaN where none does.
        counts_T: int64, how many tokens each entry of `positions_T` rests on.
    """

    images_I: np.ndarray
    positions_T: np.ndarray
    counts_T: np.ndarray

    @property
    def nats(self) -> float:
        """The loss: mean over images of the mean over their tokens, as in training."""
        return float(np.nanmean(self.images_I))


def check(checkpoint: Weights, config: Config, dataset: Dataset) -> None:
    """Raises:
    UserError: the data has another palette, resolution or palette size than the checkpoint's.
    """
    resolve_data(config, [dataset])
    check_palette(checkpoint, dataset.palette.sha256, dataset.path, LOGGER.warning)


@torch.no_grad()
def likelihood(
    model: ImageGPT, config: Config, dataset: Dataset, ranks: Ranks, masks: int = 1, mask_seed: int = 0
) -> Likelihood:
    """Score every image once, or a BERT model's `masks` times.

    Mask m of an image is the one that it would have in pass m over the dataset under the seed `mask_seed`: mask 0
    of the run's own seed is that of the run's validation. An image whose mask is empty has no loss under it and
    that mask is left out of its mean, where training counts 0.

    Args:
        where: this process among the ranks, which must have met (see features.meeting); all of them get the result.
        masks, mask_seed: of BERT only.

    Raises:
        UserError: the data is damaged.
    """
    objective, seeded = load_objective(config), dataclasses.replace(config, seed=mask_seed)
    device = model.head.weight.device
    images, n = dataset.rows, dataset.sequence_length
    batch = max(1, min(_TOKENS // n, -(-images // ranks.world)))
    sums_I, scored_I, sums_T, counts_T = np.zeros(images), np.zeros(images), np.zeros(n), np.zeros(n)
    total = masks * -(-images // (batch * ranks.world))
    hidden = None if ranks.rank == 0 else True  # one bar for all ranks
    with tqdm(total=total, desc="likelihood", unit=" batches", leave=False, disable=hidden) as progress:
        for number in range(masks):
            for rows in evaluation_batches(dataset, batch, ranks.rank, ranks.world):
                real_B = rows["weight"] > 0
                tokens_BT, positions_B = rows["tokens"][real_B].to(device, torch.int64), rows["positions"][real_B]
                if len(tokens_BT):
                    mask_BT = objective.mask(tokens_BT, positions_B + number * images, seeded)
                    nats_BT, shown_BT = _token_losses(model, tokens_BT, mask_BT)
                    counts_B = shown_BT.sum(1)
                    index_B = positions_B.numpy()
                    sums_I[index_B] += (nats_BT.sum(1) / counts_B.clamp(min=1)).cpu().numpy()
                    scored_I[index_B] += (counts_B > 0).cpu().numpy()
                    sums_T += nats_BT.sum(0).cpu().numpy()
                    counts_T += shown_BT.sum(0).cpu().numpy()
                progress.update()
    ranks.add_up(sums_I, scored_I, sums_T, counts_T)
    with np.errstate(invalid="ignore"):
        return Likelihood(sums_I / scored_I, sums_T / counts_T, counts_T.astype(np.int64))


def _token_losses(model: ImageGPT, tokens_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """-log p of every scored token, 0 for the others, float64 [B, T]; and which are scored, bool [B, T]."""
    logits_BTK = model(tokens_BT, mask_BT).logits_BTK
    assert logits_BTK is not None
    nats_BT = token_nats(logits_BTK, tokens_BT).double()
    scored_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    return nats_BT * scored_BT, scored_BT


def record(
    found: Likelihood,
    checkpoint: Weights,
    config: Config,
    dataset: Dataset,
    masks: int | None,
    mask_seed: int | None,
) -> dict[str, Any]:
    """The result as JSON: nats, their standard error over images, and the same by class and by position."""
    labels = dataset.labels() if dataset.manifest.classes is not None else None
    distortion = dataset.manifest.palette.get("distortion")
    return {
        "kind": "likelihood",
        "name": config.name,
        "objective": config.objective.name,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "data": str(dataset.path),
        "split": dataset.manifest.split,
        **_mean(found.images_I),
        "tokens": int(found.counts_T.sum()),
        "images_without_mask": int(np.isnan(found.images_I).sum()),
        "masks": masks,
        "mask_seed": mask_seed,
        "mask_rate": None if masks is None else config.objective.mask_rate,
        "resolution": dataset.manifest.resolution,
        "colours": dataset.palette.k,
        "palette_sha256": dataset.palette.sha256,
        # Mean squared distance of a pixel to its colour, in [-1, 1] units: `igpt-data palette` prints it so.
        "palette_distortion": distortion if isinstance(distortion, int | float) else None,
        "classes": None
        if labels is None
        else [
            {"name": name, **_mean(found.images_I[labels == label])}
            for label, name in enumerate(dataset.manifest.classes or ())
        ],
        "positions": {
            "nats_per_token": [None if math.isnan(value) else value for value in found.positions_T.tolist()],
            "tokens": found.counts_T.tolist(),
        },
    }


def _mean(images_I: np.ndarray) -> dict[str, Any]:
    """Mean nats and bits, standard error of the nats' mean (None of fewer than 2), and the number of images."""
    known = images_I[~np.isnan(images_I)]
    nats = float(known.mean()) if len(known) else None
    return {
        "nats_per_token": nats,
        "bits_per_token": None if nats is None else nats / math.log(2),
        "standard_error": float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None,
        "images": len(known),
    }
