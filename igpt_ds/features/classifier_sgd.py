"""Softmax regression by stochastic gradient descent, as the paper classifies ImageNet (section 3.4).

Momentum 0.9, rates 30, 10, 3, ... tried in this order, cosine schedule, no regularisation; on the features as they
are, since rates as high as these suit their scale. The features stay in the memory map: a batch at a time is read, in
an order that shuffles blocks of rows and then the rows of some blocks, so that the disk reads long stretches. For that
the rows themselves should be in random order, as `igpt-data shards` leaves them.

Suffixes: I images, B images of a batch, D features, C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from igpt_ds.features.classifier import Classifier, Rows
from igpt_ds.hashing import random_keys, stable_hash

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
BATCH = 128  # the paper names none for this; the one that it pre-trains with
_BLOCK, _BLOCKS = 1024, 64  # rows read at once, and blocks whose rows are shuffled together


def fit(
    rows: Rows, classes: int, rate: float, iterations: int, seed: int, title: str, batch: int = BATCH
) -> Classifier | None:
    """A classifier trained at one rate; None if it diverged.

    The weights begin at 0, the rate falls from `rate` to 0 along half a cosine.

    Args:
        classes: labels are below it.
        title: of the progress bar.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.zeros(rows.width, classes, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weights, bias], lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    stream = batches(rows, batch, seed)
    for _ in tqdm(range(iterations), desc=title, unit=" batches", leave=False, disable=None):
        features_BD, labels_B = next(stream)
        scores_BC = torch.from_numpy(features_BD).to(device) @ weights + bias
        loss = F.cross_entropy(scores_BC, torch.from_numpy(labels_B).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not (torch.isfinite(weights).all() and torch.isfinite(bias).all()):
        return None
    return Classifier(
        np.zeros(rows.width),
        np.ones(rows.width),
        weights.detach().cpu().double().numpy(),
        bias.detach().cpu().double().numpy(),
        np.arange(classes),
        converged=True,
    )


def batches(rows: Rows, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end, (float32 [B, D], int64 [B]); every image once an epoch, each epoch in another order."""
    blocks = rows.blocks(_BLOCK)
    left = np.empty((0, rows.width), np.float32), np.empty(0, np.int64)
    epoch = 0
    while True:
        order = np.argsort(random_keys(stable_hash(seed, epoch), len(blocks)), kind="stable")
        for begin in range(0, len(order), _BLOCKS):
            chosen = [blocks[i] for i in order[begin : begin + _BLOCKS]]
            read_ID = np.concatenate([rows.read(*block) for block in chosen])
            labels_I = np.concatenate([rows.labels(*block) for block in chosen])
            mixed = np.argsort(random_keys(stable_hash(seed, epoch, begin, 1), len(read_ID)), kind="stable")
            # What is left of the rows before comes first, so that no batch is cut short.
            read_ID, labels_I = np.concatenate([left[0], read_ID[mixed]]), np.concatenate([left[1], labels_I[mixed]])
            whole = len(read_ID) // size * size
            for first in range(0, whole, size):
                yield read_ID[first : first + size], labels_I[first : first + size]
            left = read_ID[whole:], labels_I[whole:]
        epoch += 1
