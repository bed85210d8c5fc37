"""L_AR: the negative log-likelihood of an image's tokens in raster order (paper section 2.1)."""

from typing import TYPE_CHECKING

from igpt_ds.objectives import token_nats

if TYPE_CHECKING:
    from torch import Tensor

CAUSAL = True


def mask(tokens_BT: "Tensor", positions_B: "Tensor", seed: int, rate: float) -> None:
    """Nothing is hidden: the causal network sees only the past."""


def image_losses(
    logits_BPK: "Tensor", tokens_BT: "Tensor", mask_BT: "Tensor | None", part: slice = slice(None)
) -> "Tensor":
    """-log p(x) / n of each image, in nats a token: float32 [B]; of `part`, see `igpt_ds.objectives`."""
    # The logits at position i already predict token i: the network shifts its input.
    return token_nats(logits_BPK, tokens_BT[:, part]).mean(dim=1)
