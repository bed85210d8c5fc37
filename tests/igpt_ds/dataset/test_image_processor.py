"""Our tokens of an image against Hugging Face's image processor: equal, but where its float32 rounds two colours alike.

Their processor computes |a|² - 2 ab + |b|² in float32 of pixels in [-1, 1]. Ours is exact. Wherever the two differ,
both colours must be equally near within their rounding, shown in float64, and ours must be the nearer one.
"""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt_ds.dataset.palette import Palette

# Their sums have terms of up to 3 + 2 * 3 + 3 = 12 for a pixel and an entry in the corners of the cube; each of some 8
# roundings (of the pixel, squares, products and sums) is within half an ulp of at most 12: 12 * 2^-24 * 8, for each of
# the two distances that are compared.
ROUNDING = 2 * 8 * 12 * 2.0**-24


def photographs() -> np.ndarray:
    """uint8 [16, 128, 128, 3]: pieces of two photographs."""
    pieces = [
        photo[y : y + 128, x : x + 128]
        for photo in load_sample_images().images
        for y in (0, 200)
        for x in range(0, 500, 128)
    ]
    return np.stack(pieces)


def all_kinds() -> np.ndarray:
    """uint8 [16, 128, 128, 3]: colours drawn evenly from all 2^24."""
    return np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), np.uint8)


def even_palette() -> np.ndarray:
    """512 colours on a grid, the middles between them levels of 8 bits: ties and near ties abound."""
    axis = np.linspace(16, 240, 8) / 127.5 - 1
    return np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3).astype(np.float32)


def random_palette() -> np.ndarray:
    """512 colours drawn from the cube, as k-means gives them: no level of 8 bits is one."""
    return np.random.default_rng(1).uniform(-1, 1, (512, 3)).astype(np.float32)


def twins() -> np.ndarray:
    """256 colours, each with another one a few float32 roundings away."""
    one = random_palette()[:256]
    return np.concatenate([one, np.clip(one + np.float32(3e-7) * np.sign(one[::-1]), -1, 1)]).astype(np.float32)


@pytest.mark.parametrize("images", [photographs, all_kinds])
@pytest.mark.parametrize("colours", [even_palette, random_palette, twins])
def test_tokens_differ_where_rounding_ties_two_colours_alone(images: object, colours: object) -> None:
    pictures, palette = images(), Palette(colours())  # type: ignore[operator]
    processor = ImageGPTImageProcessorPil(clusters=palette.colours, size={"height": 128, "width": 128})
    theirs = np.concatenate([processor(picture, return_tensors="np")["input_ids"] for picture in pictures])
    ours = palette.encode(pictures).reshape(len(pictures), -1)
    assert theirs.shape == ours.shape
    where = np.nonzero(theirs != ours)
    exact = pictures.reshape(len(pictures), -1, 3)[where].astype(np.float64) / 127.5 - 1
    entries = palette.colours.astype(np.float64)
    to_ours = ((exact - entries[ours[where]]) ** 2).sum(1)
    to_theirs = ((exact - entries[theirs[where]]) ** 2).sum(1)
    gap = to_theirs - to_ours
    assert (gap >= 0).all(), "ours is never the farther one"
    assert (gap <= ROUNDING).all(), f"{gap.max():.1e}"
    share = len(gap) / ours.size
    print(
        f"{images.__name__}, {colours.__name__}: {len(gap)} of {ours.size} tokens differ, gap {gap.max(initial=0):.1e}"
    )  # type: ignore[attr-defined]
    # Only palettes that are made for it have many of them.
    assert (1e-3 < share < 0.5) if colours in (even_palette, twins) else share < 1e-4


def test_a_wrong_neighbour_would_be_seen() -> None:
    palette = Palette(random_palette())
    picture = all_kinds()[0]
    exact = picture.reshape(-1, 3).astype(np.float64) / 127.5 - 1
    squares = ((exact[:, None] - palette.colours.astype(np.float64)) ** 2).sum(-1)
    two = np.sort(squares, axis=1)[:, :2]
    assert np.median(two[:, 1] - two[:, 0]) > 100 * ROUNDING
