"""Softmax regressions by stochastic gradient descent, many in one pass, as the paper classifies ImageNet (section 3.4).

A bank of linear heads is trained on the same batches, one for each group of features (a layer, or several layers side
by side) and each rate. Momentum 0.9, a cosine from the rate to 0, no regularisation, weights that begin at 0; on the
features as they are, since rates as high as these suit their scale.

The features stay in the memory map: a pool of rows is read ahead, in an order that shuffles blocks of rows and then the
rows of some blocks, so that the disk reads long stretches. For that the rows themselves should be in random order, as
`igpt-data shards` leaves them.

The ranks of a launch divide the heads among them, and not the batch: a head needs nothing of the others, while ranks
that share a batch would add up the gradients of all heads at every step (0.9 GB for 49 layers of iGPT-L, 3 rates and
1 000 classes). A head is the same on any number of ranks, up to rounding.

Suffixes: G groups, I images of a pool, B of a batch, D features of a group, R rates, C classes; H = R C. Images come
last among scores: the softmax of few classes takes a tenth of the time on a CPU, where it goes along many images.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.features.classifier import Classifier, Rows
from igpt_ds.hashing import random_keys, stable_hash
from igpt_ds.loading.ahead import ahead
from igpt_ds.memory import free_bytes
from igpt_ds.text import size_text

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
BATCH = 128  # the paper names none for this; the one that it pre-trains with
MOMENTUM = 0.9
_CPU = torch.device("cpu")
_BLOCK, _BLOCKS = 128, 64  # rows read at once, and blocks whose rows are shuffled together


@dataclass(frozen=True)
class Bank:
    """The heads of one rank.

    Attributes:
        groups, rates: which of all that there are.
        weights_GHD, bias_GH1: float32; not finite where a head diverged.
    """

    groups: range
    rates: range
    classes: int
    weights_GHD: Tensor
    bias_GH1: Tensor
    ranks: Ranks

    def accuracies(self, groups: Sequence[Rows], rates: int) -> np.ndarray:
        """The share of images whose label each head finds, nan of those that diverged: float64 [all G, all R].

        A collective: every rank gets those of all heads.

        Args:
            groups: all of them, of the same images.
            rates: how many there are in all.
        """
        found_GR = np.zeros((len(groups), rates))
        mine = [groups[group] for group in self.groups]
        if mine and self.rates:
            device = self.weights_GHD.device
            right_GR = torch.zeros(len(mine), len(self.rates), dtype=torch.float64, device=device)
            finite_GR = torch.ones_like(right_GR, dtype=torch.bool)
            for block in mine[0].blocks(_BLOCK):
                x_GBD = torch.from_numpy(np.stack([rows.read(*block) for rows in mine])).to(device).float()
                labels_B = torch.tensor(mine[0].labels(*block), device=device)
                scores_GRCB = _scores(self.bias_GH1, self.weights_GHD, x_GBD, self.classes)
                right_GR += (scores_GRCB.argmax(dim=2) == labels_B).sum(dim=2)
                finite_GR &= torch.isfinite(scores_GRCB).flatten(2).all(dim=2)  # argmax would take nan for a class
            right_GR[~finite_GR] = math.nan
            found_GR[np.ix_(self.groups, self.rates)] = right_GR.cpu().numpy() / len(mine[0])
        self.ranks.add_up(found_GR)
        return found_GR

    def classifier(self, group: int, rate: int) -> Classifier:
        """One of all heads, on every rank; a collective."""
        width = self.weights_GHD.shape[2]
        weights_DC, bias_C = np.zeros((width, self.classes)), np.zeros(self.classes)
        if group in self.groups and rate in self.rates:
            at = self.groups.index(group), self.rates.index(rate)
            weights_DC[:] = self.weights_GHD.unflatten(1, (-1, self.classes))[at].T.cpu().numpy()
            bias_C[:] = self.bias_GH1.unflatten(1, (-1, self.classes))[at][:, 0].cpu().numpy()
        self.ranks.add_up(weights_DC, bias_C)
        return Classifier(np.zeros(width), np.ones(width), weights_DC, bias_C, np.arange(self.classes), converged=True)


@torch.no_grad()
def fit(
    groups: Sequence[Rows],
    classes: int,
    rates: Sequence[float],
    iterations: int,
    seed: int,
    title: str,
    batch: int = BATCH,
    ranks: Ranks | None = None,
) -> Bank:
    """A head for each group and rate; this rank's share of them.

    Args:
        groups: of one width, with the same images in the same order.
        classes: labels are below it.
        title: of the progress bar.

    Raises:
        UserError: they do not fit in memory.
    """
    ranks = ranks or Ranks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_groups, of_rates = share(len(groups), len(rates), ranks.rank, ranks.world)
    mine, own_rates = [groups[group] for group in of_groups], [rates[rate] for rate in of_rates]
    _require_memory(mine, len(own_rates) * classes, batch, device, ranks.neighbours)
    weights_GHD = torch.zeros(len(mine), len(own_rates) * classes, groups[0].width, device=device)
    bias_GH1 = torch.zeros(*weights_GHD.shape[:2], 1, device=device)
    bank = Bank(of_groups, of_rates, classes, weights_GHD, bias_GH1, ranks)
    if not mine or not own_rates:
        return bank
    moved_GHD, moved_GH1 = torch.zeros_like(weights_GHD), torch.zeros_like(bias_GH1)
    rates_H1 = torch.tensor(own_rates, device=device).repeat_interleave(classes)[:, None]
    minus_one = torch.tensor(-1.0, device=device)
    stream = batches(mine, batch, seed, device)
    hidden = True if ranks.rank else None
    for step in tqdm(range(iterations), desc=title, unit=" batches", leave=False, disable=hidden):
        x_GBD, labels_B = next(stream)
        # The slope of the mean cross entropy by the scores, times B: probabilities less 1 at the label.
        slope_GRCB = _scores(bias_GH1, weights_GHD, x_GBD, classes).softmax(dim=2)
        label_GR1B = labels_B.expand(*slope_GRCB.shape[:2], 1, batch)
        slope_GRCB.scatter_add_(2, label_GR1B, minus_one.expand(label_GR1B.shape))
        slope_GHB = slope_GRCB.flatten(1, 2)
        moved_GHD.baddbmm_(slope_GHB, x_GBD, beta=MOMENTUM, alpha=1 / batch)
        moved_GH1.mul_(MOMENTUM).add_(slope_GHB.sum(dim=2, keepdim=True), alpha=1 / batch)
        cosine = (1 + math.cos(math.pi * step / iterations)) / 2
        weights_GHD.addcmul_(moved_GHD, rates_H1, value=-cosine)
        bias_GH1.addcmul_(moved_GH1, rates_H1, value=-cosine)
    return bank


def _scores(bias_GH1: Tensor, weights_GHD: Tensor, x_GBD: Tensor, classes: int) -> Tensor:
    """Of each head, class and image: [G, R, C, B]."""
    return torch.baddbmm(bias_GH1, weights_GHD, x_GBD.transpose(1, 2)).unflatten(1, (-1, classes))


def share(groups: int, rates: int, rank: int, world: int) -> tuple[range, range]:
    """Which groups, and which of their rates, a rank has: several ranks share a group only where groups are fewer."""
    together = max(1, world // groups)
    return range(rank // together, groups, max(1, world // together)), range(rank % together, rates, together)


def _require_memory(groups: Sequence[Rows], heads: int, batch: int, device: torch.device, neighbours: int) -> None:
    if not groups:
        return
    width, itemsize = groups[0].width, groups[0].parts[0][0].itemsize
    pool = len(groups) * min(len(groups[0]) + batch, _BLOCK * _BLOCKS + batch) * width * itemsize
    trained = len(groups) * 4 * (2 * width * heads + 3 * batch * heads + batch * width)
    host = 2 * pool  # the pool in use, and the next one
    needs = [(device, host + trained)] if device.type == "cpu" else [(_CPU, host), (device, pool + trained)]
    for place, needed in needs:
        if needed > free_bytes(place, neighbours):
            raise UserError(
                f"SGD: {size_text(needed)} for {len(groups)} layers at once do not fit in memory: probe fewer "
                "--layers at a time, or use more GPUs"
            )


def batches(groups: Sequence[Rows], size: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, (float32 [G, B, D], int64 [B]); every image once an epoch, each epoch in another order."""
    for pool_GID, labels_I in ahead(_pools(groups, size, seed)):
        x_GID, y_I = torch.from_numpy(pool_GID).to(device), torch.from_numpy(labels_I).to(device)
        for first in range(0, len(labels_I), size):
            yield x_GID[:, first : first + size].float(), y_I[first : first + size]


def _pools(groups: Sequence[Rows], size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features [G, I, D] as they are kept, and labels, of a whole number of batches of `size`."""
    blocks, width, dtype = groups[0].blocks(_BLOCK), groups[0].width, groups[0].parts[0][0].dtype
    left_GID: np.ndarray = np.empty((len(groups), 0, width), dtype)
    left_I: np.ndarray = np.empty(0, np.int64)
    for epoch in count():
        order = np.argsort(random_keys(stable_hash(seed, epoch), len(blocks)), kind="stable")
        for begin in range(0, len(order), _BLOCKS):
            chosen = [blocks[i] for i in order[begin : begin + _BLOCKS]]
            total = sum(stop - first for _, first, stop in chosen)
            # What is left of the rows before comes first, so that no batch is cut short.
            kept = len(left_I)
            pool_GID = np.empty((len(groups), kept + total, width), dtype)
            labels_I = np.empty(kept + total, np.int64)
            pool_GID[:, :kept], labels_I[:kept] = left_GID, left_I
            places = np.argsort(np.argsort(random_keys(stable_hash(seed, epoch, begin, 1), total), kind="stable"))
            done = 0
            for part, first, stop in chosen:
                here = kept + places[done : done + stop - first]
                for group, rows in enumerate(groups):
                    pool_GID[group, here] = rows.read(part, first, stop)
                labels_I[here] = groups[0].labels(part, first, stop)
                done += stop - first
            whole = len(labels_I) // size * size
            left_GID, left_I = pool_GID[:, whole:].copy(), labels_I[whole:].copy()
            if whole:
                yield pool_GID[:, :whole], labels_I[:whole]
