"""The augmentation on tokens against Pillow and NumPy on the image, and its draws."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from igpt_ds.dataset.palette import Palette
from igpt_ds.loading.augment import PAD, crop_and_flip, draws

SIDE = 32


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32))


def photos(count: int) -> np.ndarray:
    """Pieces of a photograph: uint8 [count, 32, 32, 3]."""
    photo = np.asarray(load_sample_images().images[0])
    return np.stack([photo[40 + 7 * i : 40 + 7 * i + SIDE, 3 * i : 3 * i + SIDE] for i in range(count)])


def test_tokens_are_those_of_the_augmented_image(palette: Palette) -> None:
    images, positions = photos(40), np.arange(1000, 1040)
    flipped, top, left = draws(positions, seed=3)
    assert 0 < flipped.sum() < 40 and len(set(zip(top, left, strict=True))) > 20
    expected = []
    for image, flip, row, column in zip(images, flipped, top, left, strict=True):
        # As the paper tells it: the image or its mirror image, padded, cropped.
        turned = np.asarray(ImageOps.mirror(Image.fromarray(image)) if flip else Image.fromarray(image))
        padded = np.pad(turned, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
        crop = Image.fromarray(padded).crop((int(column), int(row), int(column) + SIDE, int(row) + SIDE))
        expected.append(palette.encode(np.asarray(crop)).reshape(-1))
    found = crop_and_flip(palette.encode(images).reshape(40, -1), positions, seed=3)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, expected)


def test_an_image_depends_on_its_place_and_the_seed_alone() -> None:
    tokens = np.random.default_rng(1).integers(0, 512, (12, SIDE**2)).astype(np.uint16)
    positions = np.arange(12) * 977
    whole = crop_and_flip(tokens, positions, seed=5)
    for i in range(12):
        np.testing.assert_array_equal(crop_and_flip(tokens[i : i + 1], positions[i : i + 1], seed=5)[0], whole[i])
    assert (crop_and_flip(tokens, positions, seed=6) != whole).any()
    assert (crop_and_flip(tokens, positions + 1, seed=5) != whole).any()


def test_every_crop_and_both_sides_are_equally_likely() -> None:
    count = 81_000
    flipped, top, left = draws(np.arange(count), seed=0)
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / count**0.5
    cells = np.bincount(top * 9 + left, minlength=81)
    assert len(cells) == 81
    # Chi-square with 80 degrees of freedom: mean 80, standard deviation sqrt(160).
    assert abs(((cells - count / 81) ** 2 / (count / 81)).sum() - 80) < 5 * 160**0.5
    assert abs(np.corrcoef(flipped, left)[0, 1]) < 5 / count**0.5


def test_the_draws_do_not_change_for_ever() -> None:
    flipped, top, left = draws(np.array([0, 1, 2, 10**12]), seed=0)
    assert [flipped.tolist(), top.tolist(), left.tolist()] == [[False, False, True, True], [1, 1, 3, 2], [0, 6, 4, 2]]
