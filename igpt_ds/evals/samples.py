"""Pictures that a model draws: free samples, and completions of images whose lower half is hidden (paper figure 1)."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from igpt_ds.atomic import publish_file
from igpt_ds.errors import UserError
from igpt_ds.model import ImageGPT
from igpt_ds.palette import Palette
from igpt_ds.sampling import sample
from igpt_ds.shards import Dataset

BATCH = 64  # images drawn at once
COMPLETIONS = 4  # of each image
GAP = 2  # pixels of white between two pictures
LEAST_SIDE = 64  # smaller images are enlarged, each pixel to a square
HIDDEN = 192  # grey of what the model was not shown


def free_samples(model: ImageGPT, palette: Palette, count: int, seed: int, temperature: float) -> Image.Image:
    """A nearly square sheet of `count` images drawn from nothing."""
    tokens = _draw(model, torch.empty(count, 0, dtype=torch.int64), seed, temperature, "samples")
    return contact_sheet(_images(tokens, palette), columns=round(count**0.5) or 1)


def completions(
    model: ImageGPT, dataset: Dataset, palette: Palette, count: int, seed: int, temperature: float
) -> Image.Image:
    """One row each for the first `count` images of a dataset: what the model saw, its completions, the original.

    Raises:
        UserError: the dataset has fewer images, or images of another size or palette than the model's.
    """
    if count > dataset.rows:
        raise UserError(f"{dataset.path}: has {dataset.rows} images: ask for at most --n {dataset.rows}")
    if dataset.sequence_length != model.sequence_length:
        raise UserError(
            f"{dataset.path}: images of {dataset.sequence_length} tokens, the model draws {model.sequence_length}: "
            f"build the data at the model's resolution"
        )
    if dataset.palette.sha256 != palette.sha256:
        raise UserError(f"{dataset.path}: another palette than the run's: build the data with the run's palette.npy")
    tokens = dataset.images(count)
    side = dataset.manifest.resolution
    prefix_BT = torch.from_numpy(tokens.astype(np.int64))[:, : side // 2 * side].repeat_interleave(COMPLETIONS, dim=0)
    drawn = _images(_draw(model, prefix_BT, seed, temperature, "completions"), palette)
    originals = _images(tokens, palette)
    given = originals.copy()
    given[:, side // 2 :] = HIDDEN
    drawn = drawn.reshape(count, COMPLETIONS, side, side, 3)
    rows = np.concatenate([given[:, None], drawn, originals[:, None]], axis=1)
    return contact_sheet(rows.reshape(-1, side, side, 3), columns=COMPLETIONS + 2)


def contact_sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Images (uint8 [N, side, side, 3]) side by side on white, small ones enlarged by a whole factor."""
    side = images.shape[1] * max(1, -(-LEAST_SIDE // images.shape[1]))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), "white")
    for index, pixels in enumerate(images):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (GAP + index % columns * (side + GAP), GAP + index // columns * (side + GAP)))
    return sheet


def save_png(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with publish_file(path) as file:
        sheet.save(file, format="png")


def _draw(model: ImageGPT, prefix_BT: torch.Tensor, seed: int, temperature: float, title: str) -> np.ndarray:
    # Image i has the generator (seed, i) whatever the batch.
    parts = [
        sample(model, prefix_BT[first : first + BATCH], seed, temperature, first, title)
        for first in range(0, len(prefix_BT), BATCH)
    ]
    return torch.cat(parts).numpy()


def _images(tokens: np.ndarray, palette: Palette) -> np.ndarray:
    side = round(tokens.shape[1] ** 0.5)
    return palette.decode(tokens).reshape(len(tokens), side, side, 3)
