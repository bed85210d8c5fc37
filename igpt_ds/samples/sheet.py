"""Sheets of pictures: tokens and their pixels side by side, and the pictures that are to be completed.

On every tile what was given stands between two orange lines.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from igpt_ds.atomic import publish_file
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular

COMPLETIONS = 4  # of each image
GAP = 6  # pixels of white between two pictures
MARK = 3  # pixels of the gap that a line beside given rows takes
LEAST_SIDE = 64  # smaller images are enlarged, each pixel to a square
MOST_PIXELS = 1 << 26  # of a sheet, 200 MB: what other programs open without a question
HIDDEN = 192  # grey of what the model was not shown
GIVEN = (230, 80, 0)  # orange: beside what it was shown


def prefixes(tokens: np.ndarray, rows: int) -> torch.Tensor:
    """The first rows of each image, once for each of its completions: int64 [N COMPLETIONS, rows * side]."""
    side = round(tokens.shape[1] ** 0.5)
    if not 0 < rows < side:
        raise UserError(f"--rows {rows}: the images have {side} rows: give at least 1 and leave 1: 1 to {side - 1}")
    given = torch.from_numpy(tokens[:, : rows * side].astype(np.int64))
    return given.repeat_interleave(COMPLETIONS, dim=0)


def require_room(images: int, tiles: int, resolution: int) -> None:
    """Refuse more images than a sheet holds, each of which takes so many tiles, before anything is drawn."""
    tile = -(-LEAST_SIDE // resolution) * resolution + GAP
    most = max(1, MOST_PIXELS // (tiles * tile**2))
    if images > most:
        raise UserError(f"--images {images}: a sheet holds {most:,} of {resolution} x {resolution}: draw several")


def first_images(dataset: Dataset, count: int, sequence_length: int, palette: Palette) -> np.ndarray:
    """Tokens of the first `count` images of a dataset, uint16 [count, n]."""
    if count > dataset.rows:
        raise UserError(f"{dataset.path}: has {dataset.rows} images: ask for at most --images {dataset.rows}")
    if dataset.sequence_length != sequence_length:
        raise UserError(
            f"{dataset.path}: images of {dataset.sequence_length} tokens, the model draws {sequence_length}: "
            f"build the data at the model's resolution"
        )
    if dataset.palette.sha256 != palette.sha256:
        raise UserError(f"{dataset.path}: another palette than the run's: build the data with the run's palette.npy")
    return dataset.images(count)


def pictures(paths: Sequence[Path], sequence_length: int, palette: Palette) -> np.ndarray:
    """Tokens of PNG files of the model's resolution, by the run's palette: uint16 [N, n].

    Larger pictures are cut and scaled by igpt-data shards, as all data are, and by nothing else.
    """
    side = round(sequence_length**0.5)
    found = []
    for path in paths:
        try:
            with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
                if image.size == (side, side):  # looked at before anything is decoded
                    found.append(np.asarray(image.convert("RGB")))
                    continue
                size = image.size
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: cannot be read as a PNG: {error}: give whole PNG files") from error
        raise UserError(
            f"{path}: {size[0]} x {size[1]} pixels, the model draws {side} x {side}: scale it, or build the pictures "
            f"into a dataset with igpt-data shards and give it with --complete"
        )
    return palette.encode(np.stack(found)).reshape(len(found), sequence_length)


def contact_sheet(images: np.ndarray, columns: int, given: Sequence[int] = ()) -> Image.Image:
    """Images (uint8 [N, side, side, 3]) side by side on white, small ones enlarged by a whole factor.

    Args:
        given: rows of each image that the model was shown, marked by a line on either side.
    """
    scale = max(1, -(-LEAST_SIDE // images.shape[1]))
    side = images.shape[1] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), "white")
    for index, pixels in enumerate(images):
        left, top = GAP + index % columns * (side + GAP), GAP + index // columns * (side + GAP)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if given:
            for x in (left - MARK, left + side):
                sheet.paste(GIVEN, (x, top, x + MARK, top + given[index] * scale))
    return sheet


def sample_sheet(drawn: np.ndarray, palette: Palette) -> Image.Image:
    """A nearly square sheet of images, integers [N, n]."""
    return contact_sheet(decoded(drawn, palette), columns=round(len(drawn) ** 0.5) or 1)


def completion_sheet(tokens: np.ndarray, drawn: np.ndarray, palette: Palette, rows: int) -> Image.Image:
    """One line an image: what the model saw, its completions, the original; as `completion_tiles`."""
    tiles, marked = completion_tiles(tokens, drawn, palette, rows)
    return contact_sheet(tiles, COMPLETIONS + 2, marked)


def save_png(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with publish_file(path) as file:
        sheet.save(file, format="png")


def completion_tiles(
    tokens: np.ndarray, drawn: np.ndarray, palette: Palette, rows: int
) -> tuple[np.ndarray, list[int]]:
    """What was given, the completions and the original of each image, for `contact_sheet`.

    Args:
        tokens: the images, uint16 [N, n].
        drawn: integers [N COMPLETIONS, n].

    Returns:
        Tiles, uint8 [N (COMPLETIONS + 2), side, side, 3], and the rows that are given on each.
    """
    originals, completed = decoded(tokens, palette), decoded(drawn, palette)
    side = originals.shape[1]
    given = originals.copy()
    given[:, rows:] = HIDDEN
    completed = completed.reshape(len(tokens), COMPLETIONS, side, side, 3)
    tiles = np.concatenate([given[:, None], completed, originals[:, None]], axis=1)
    return tiles.reshape(-1, side, side, 3), [*[rows] * (1 + COMPLETIONS), 0] * len(tokens)


def decoded(tokens: np.ndarray, palette: Palette) -> np.ndarray:
    """Pixels of images: integers [N, n] -> uint8 [N, side, side, 3]."""
    side = round(tokens.shape[1] ** 0.5)
    return palette.decode(tokens).reshape(len(tokens), side, side, 3)
