"""Training objectives: one file each, found by the name that the configuration gives.

An objective module has two functions:

    mask(tokens_BT, positions_B, config) -> bool [B, T] or None      what is hidden from the network
    image_losses(logits_BPK, tokens_BT, mask_BT, part) -> float32 [B]    nats a token, one figure an image

A step's loss is the mean of `image_losses` over the images of the global batch. Bits are nats / ln 2. Where several
ranks share an image (sequence parallelism), each has the logits of P = T / ranks positions, those of `part`, and the
image's loss is the mean of what the ranks find.
"""

import importlib
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor

from igpt_ds.config.schema import Config


class Objective(Protocol):
    """What an objective module offers."""

    def mask(self, tokens_BT: Tensor, positions_B: Tensor, config: Config) -> Tensor | None: ...

    def image_losses(
        self, logits_BPK: Tensor, tokens_BT: Tensor, mask_BT: Tensor | None, part: slice = slice(None)
    ) -> Tensor: ...


def load_objective(config: Config) -> Objective:
    """The objective module that `config.objective.name` names."""
    return cast(Objective, importlib.import_module(f"{__name__}.{config.objective.name}"))


def token_nats(logits_BPK: Tensor, tokens_BP: Tensor) -> Tensor:
    """-log p of each token: float32 [B, P]."""
    # One row a token: with the colours on the second axis, as for images, it takes five times as long on a CPU.
    nats = F.cross_entropy(logits_BPK.float().flatten(0, 1), tokens_BP.flatten(), reduction="none")
    return nats.view(tokens_BP.shape)
