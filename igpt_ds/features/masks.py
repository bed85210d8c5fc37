"""Several masks an image for BERT models: the modal prediction (paper section 4.6).

A BERT model sees masked input when it is evaluated, too, as it did in training. The mask hides parts of the image
from the classifier; so the image is classified under M independent masks and the class named most often counts.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from igpt_ds.config.schema import Config
from igpt_ds.hashing import splitmix64, stable_hash

VOTES = 5  # masks that an image is classified under
_EVALUATION = zlib.crc32(b"masks of an evaluation")  # keeps these masks apart from those of a training
_TIES = zlib.crc32(b"ties of a vote")


def mask_seed(seed: int, split: str, number: int) -> int:
    """The seed of an evaluation's masks, in place of the run's: other masks than in any step of the training.

    Args:
        seed: the run's.
        number: 0 for the features that a classifier is trained on, 0 to M - 1 for the images that it classifies.
    """
    return stable_hash(_EVALUATION, seed, zlib.crc32(split.encode()), number)


def vote(predictions_MB: Tensor, positions_B: Tensor, config: Config) -> Tensor:
    """The class that most of the M predictions of each image name: int64 [B], on the CPU.

    Ties are broken at random: each class named most often is as likely as the others; a pure function of the
    configuration's seed and of the image's place.

    Args:
        predictions_MB: int64, classes.
        positions_B: int64, the images' places in the dataset.
    """
    found_MB = predictions_MB.cpu().numpy()
    votes_MB = (found_MB[:, None] == found_MB[None, :]).sum(axis=1)
    # Each of the tied classes stands here equally often, so that a draw among the masks is one among the classes.
    tied_MB = votes_MB == votes_MB.max(axis=0)
    seed = np.array(stable_hash(_TIES, config.seed), np.uint64)
    drawn_B = splitmix64(positions_B.cpu().numpy().astype(np.uint64) ^ splitmix64(seed))
    chosen_B = drawn_B % tied_MB.sum(axis=0).astype(np.uint64)
    rank_MB = tied_MB.cumsum(axis=0) - 1
    first_B = (tied_MB & (rank_MB == chosen_B.astype(np.int64))).argmax(axis=0)
    return torch.from_numpy(np.take_along_axis(found_MB, first_B[None], axis=0)[0].astype(np.int64))
