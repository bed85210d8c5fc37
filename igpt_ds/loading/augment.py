"""The paper's augmentation for CIFAR, on the grid of tokens (paper section 3.1, after Zagoruyko and Komodakis 2016).

"4 pixels are reflection padded on each side, and a 32×32 crop is randomly sampled from the padded image or its
horizontal flip." Each pixel is a token of its own, and padding, flipping and cropping only move pixels about: doing so
with tokens gives exactly the tokens of the image that was so treated. The shards are thus quantised once, and every
epoch still sees other crops.
"""

import numpy as np

from igpt_ds.hashing import splitmix64, stable_hash

PAD = 4  # pixels a side
_PURPOSE = 0x61756772656E74  # keeps these draws apart from the masks', which hash the same positions


def draws(positions_B: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What happens to the images at these places of the sample order: a pure function of place and seed.

    A place is visited once, whatever the world size and wherever a run goes on, and tells epoch and image.

    Returns:
        Whether each is flipped, bool [B], and its crop's top and left in the padded image, int64 [B] in 0..2 PAD.
    """
    keys = splitmix64(positions_B.astype(np.uint64) ^ np.uint64(stable_hash(seed, _PURPOSE)))
    # 16 bits for each: the remainder prefers some offsets by less than one part in 7000.
    offsets = np.uint64(2 * PAD + 1)
    top, left = (((keys >> np.uint64(shift)) & np.uint64(0xFFFF)) % offsets for shift in (16, 32))
    return (keys & np.uint64(1)).astype(bool), top.astype(np.int64), left.astype(np.int64)


def crop_and_flip(tokens_BT: np.ndarray, positions_B: np.ndarray, seed: int) -> np.ndarray:
    """Pad by reflection, flip half of the images, crop to the original size: [B, n] of any type, raster order."""
    side = round(tokens_BT.shape[1] ** 0.5)
    flipped, top, left = draws(positions_B, seed)
    padded = np.pad(np.arange(side), PAD, mode="reflect")  # place in the padded image -> place in the image
    rows_BS = padded[top[:, None] + np.arange(side)]
    columns_BS = padded[left[:, None] + np.arange(side)]
    columns_BS = np.where(flipped[:, None], side - 1 - columns_BS, columns_BS)
    images_BSS = tokens_BT.reshape(-1, side, side)
    moved = images_BSS[np.arange(len(images_BSS))[:, None, None], rows_BS[:, :, None], columns_BS[:, None, :]]
    return moved.reshape(tokens_BT.shape)
