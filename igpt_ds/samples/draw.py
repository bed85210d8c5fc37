"""Pictures that a model draws: free samples, and completions of images of which it is given the upper rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from igpt_ds.dataset.palette import Palette
from igpt_ds.distributed.ranks import Ranks, launched
from igpt_ds.errors import RunError, UserError
from igpt_ds.features.extract import Precision, load_model
from igpt_ds.loading.splits import open_split
from igpt_ds.memory import free_bytes
from igpt_ds.model.sampling import Drawing, images_at_once, not_finite, sample
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.samples.sheet import (
    COMPLETIONS,
    completion_tiles,
    contact_sheet,
    decoded,
    first_images,
    pictures,
    prefixes,
    require_room,
    save_png,
)
from igpt_ds.weights.base import config_of, palette_of
from igpt_ds.weights.formats import open_weights

IMAGES = 16  # unless it is said how many


def draw(
    path: Path,
    out: Path,
    drawing: Drawing,
    *,
    step: int | None = None,
    images: int | None = None,
    complete: str | None = None,
    split: str | None = None,
    paths: Sequence[Path] = (),
    rows: int | None = None,
    precision: Precision = "float32",
) -> int | None:
    """Draw a sheet of images, or of completions, and write it; every rank of a launch calls this.

    Args:
        path: a run, a checkpoint, or weights of any format.
        images: how many are drawn, or completed of `complete`.
        complete: a dataset's folder, whose first images of `split` are completed.
        paths: of pictures that are completed.
        rows: of each image that the model is shown; None: the upper half.

    Returns:
        The step of the weights; None on other ranks than 0.
    """
    if complete and paths:
        raise UserError("--picture: not beside --complete: complete the one or the other")
    if paths and images is not None:
        raise UserError("--images: not beside --picture, all of which are completed: leave it out")
    if split and not complete:
        raise UserError(f"--split {split}: without --complete there is no data: leave it out")
    if rows is not None and not (complete or paths):
        raise UserError(f"--rows {rows}: nothing is given: add --complete DIR or --picture FILE")
    ranks, weights = launched(), open_weights(path, step)
    config, palette = config_of(weights), palette_of(weights)
    if palette is None:
        raise UserError(f"{weights.path}: no palette.npy: igpt-ds convert adds one: --to native --palette FILE")
    if not config.causal:
        raise UserError(f"{path}: is a BERT model: only next_pixel models draw images token by token")
    asked = len(paths) or images or IMAGES
    require_room(asked, COMPLETIONS + 2 if complete or paths else 1, round(config.sequence_length**0.5))
    tokens = None
    if paths:
        tokens = pictures(paths, config.sequence_length, palette)
    elif complete:
        dataset = open_split(complete, split or "val")
        tokens = first_images(dataset, asked, config.sequence_length, palette)
    rows = round(config.sequence_length**0.5) // 2 if rows is None else rows
    if tokens is not None:
        prefixes(tokens, rows)  # refused before the ranks meet
    with ranks.meeting():
        model = load_model(config, weights, precision)
        if tokens is None:
            sheet = free_samples(model, palette, asked, drawing, ranks)
        else:
            sheet = completions(model, tokens, palette, rows, drawing, ranks)
    if sheet is None:
        return None
    save_png(sheet, out)
    return weights.step


def free_samples(model: ImageGPT, palette: Palette, count: int, drawing: Drawing, ranks: Ranks) -> Image.Image | None:
    """A nearly square sheet of `count` images drawn from nothing, on rank 0; a collective of the ranks."""
    tokens = _draw(model, torch.empty(count, 0, dtype=torch.int64), drawing, ranks, "samples")
    return None if tokens is None else contact_sheet(decoded(tokens, palette), columns=round(count**0.5) or 1)


def completions(
    model: ImageGPT, tokens: np.ndarray, palette: Palette, rows: int, drawing: Drawing, ranks: Ranks
) -> Image.Image | None:
    """One line each for these images, uint16 [N, n]: what the model saw, its completions, the original; on rank 0."""
    drawn = _draw(model, prefixes(tokens, rows), drawing, ranks, "completions")
    if drawn is None:
        return None
    tiles, marked = completion_tiles(tokens, drawn, palette, rows)
    return contact_sheet(tiles, COMPLETIONS + 2, marked)


def _draw(model: ImageGPT, prefix_BT: torch.Tensor, drawing: Drawing, ranks: Ranks, title: str) -> np.ndarray | None:
    """Tokens int64 [B, n] on rank 0."""
    bar = title if ranks.rank == 0 else None  # one for all ranks

    def draw_rows(prefix_BT: torch.Tensor, first: int) -> torch.Tensor:
        free = free_bytes(model.head.weight.device, ranks.neighbours) // 2
        size = max(1, images_at_once(model, free))
        parts = [
            sample(model, prefix_BT[i : i + size], drawing, first + i, bar) for i in range(0, len(prefix_BT), size)
        ]
        return torch.cat(parts)

    found = ranks.share_rows(draw_rows, prefix_BT)
    if found is not None and (fault := not_finite(found)):
        raise RunError(f"{title}: {fault}: the weights are damaged, take another checkpoint")
    return None if found is None else found.numpy()
