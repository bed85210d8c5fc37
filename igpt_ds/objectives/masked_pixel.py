"""L_BERT: the negative log-likelihood of masked tokens, given the others (paper section 2.1).

Every position is in the mask M independently with probability `objective.mask_rate` (0.15 in the paper).
"""

from typing import TYPE_CHECKING

import numpy as np

from igpt_ds.hashing import splitmix64
from igpt_ds.objectives import token_nats

if TYPE_CHECKING:
    from torch import Tensor

CAUSAL = False


def mask(tokens_BT: "Tensor", positions_B: "Tensor", seed: int, rate: float) -> "Tensor":
    """The BERT mask, bool [B, T].

    A pure function of the seed and of each image's place in the sample order (which tells epoch and sample), so
    a resumed run hides the same tokens again, on any number of ranks.
    """
    import torch

    tokens = np.arange(tokens_BT.shape[1], dtype=np.uint64)
    images = splitmix64(positions_B.cpu().numpy().astype(np.uint64) ^ splitmix64(np.array(seed, np.uint64)))
    hashes_BT = splitmix64(images[:, None] ^ splitmix64(tokens)[None, :])
    # 2^64 is no uint64; a rate below 1 keeps the threshold inside.
    mask_BT = torch.from_numpy(hashes_BT < np.uint64(int(rate * 2**64)))
    # From memory that is not pinned the copy would wait for all that the GPU has yet to do.
    return (mask_BT.pin_memory() if tokens_BT.is_cuda else mask_BT).to(tokens_BT.device, non_blocking=True)


def image_losses(
    logits_BPK: "Tensor", tokens_BT: "Tensor", mask_BT: "Tensor | None", part: slice = slice(None)
) -> "Tensor":
    """Mean over M of -log p(x_i | unmasked tokens), in nats a token: float32 [B]; of `part`, see `igpt_ds.objectives`.

    An image whose mask is empty has the loss 0 and no gradient; the mean over the batch still counts it, so that
    the loss does not depend on how the batch is divided.
    """
    assert mask_BT is not None
    nats_BP = token_nats(logits_BPK, tokens_BT[:, part])
    parts = tokens_BT.shape[1] // nats_BP.shape[1]
    return (nats_BP * mask_BT[:, part]).sum(dim=1) * parts / mask_BT.sum(dim=1).clamp(min=1)
