"""L_CLF, which fine-tuning adds to the generative loss (paper section 2.3): weight * L_GEN + L_CLF.

L_CLF = -log p(class), p the softmax of a linear map (without a bias, as every linear layer of the network) of the
pooled features. Not an alternative to next_pixel and masked_pixel: one of them says what is hidden and gives L_GEN,
the mean over positions (over masked ones for BERT) of the nats a token.
"""

import torch.nn.functional as F
from torch import Tensor

from igpt_ds.config.schema import FinetuneConfig
from igpt_ds.model.transformer import Output
from igpt_ds.objectives import Objective


def names(finetune: FinetuneConfig) -> tuple[str, ...]:
    """What `image_measures` gives: the loss first, by which is trained; then its parts, and the share told right."""
    return ("loss", "gen_loss", "clf_loss", "accuracy") if finetune.generative_weight else ("loss", "accuracy")


def image_measures(
    output: Output,
    tokens_BT: Tensor,
    mask_BT: Tensor | None,
    labels_B: Tensor,
    generative: Objective,
    finetune: FinetuneConfig,
) -> list[Tensor]:
    """One float32 [B] for each of `names`; accuracy is 1 where the largest score is the label's, else 0."""
    assert output.class_logits_BC is not None
    clf_B = F.cross_entropy(output.class_logits_BC, labels_B, reduction="none")
    right_B = (output.class_logits_BC.argmax(dim=1) == labels_B).float()
    if not finetune.generative_weight:
        return [clf_B, right_B]
    assert output.logits_BTK is not None
    gen_B = generative.image_losses(output.logits_BTK, tokens_BT, mask_BT)
    return [finetune.generative_weight * gen_B + clf_B, gen_B, clf_B, right_B]
