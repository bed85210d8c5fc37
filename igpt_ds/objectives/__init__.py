"""Training objectives: one module each, found by the name that the configuration gives.

An objective module states

    CAUSAL      whether position i of the network sees only the tokens before it; else all that are not hidden

and has two functions:

    mask(tokens_BT, positions_B, seed, rate) -> bool [B, T] or None      what is hidden from the network
    image_losses(logits_BPK, tokens_BT, mask_BT, part) -> float32 [B]    nats a token, one figure an image

A step's loss is the mean of `image_losses` over the images of the global batch. Bits are nats / ln 2. Where several
ranks share an image (sequence parallelism), each has the logits of P = T / ranks positions, those of `part`, and the
image's loss is the mean of what the ranks find. To import one of ours loads no torch: the planner asks for CAUSAL, too.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Protocol):
    """What an objective module offers."""

    CAUSAL: bool

    def mask(self, tokens_BT: "Tensor", positions_B: "Tensor", seed: int, rate: float) -> "Tensor | None": ...

    def image_losses(
        self, logits_BPK: "Tensor", tokens_BT: "Tensor", mask_BT: "Tensor | None", part: slice = slice(None)
    ) -> "Tensor": ...


def names() -> list[str]:
    """The objectives that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_objective(name: str) -> Objective:
    """The objective module of this name.

    Raises:
        UserError: it does not state its causality, without which a network would see what it is to predict.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    if not isinstance(getattr(module, "CAUSAL", None), bool):
        raise UserError(f"objective {name}: does not say whether it is causal: write CAUSAL = True or False in it")
    return cast(Objective, module)


def token_nats(logits_BPK: "Tensor", tokens_BP: "Tensor") -> "Tensor":
    """-log p of each token: float32 [B, P]."""
    import torch.nn.functional as F

    # One row a token: with the colours on the second axis, as for images, it takes five times as long on a CPU.
    nats = F.cross_entropy(logits_BPK.float().flatten(0, 1), tokens_BP.flatten(), reduction="none")
    return nats.view(tokens_BP.shape)
