"""Pictures that a model draws: free samples, and completions of images of which it is given the upper rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from igpt_ds.dataset.palette import Palette
from igpt_ds.distributed.ranks import Ranks, launched
from igpt_ds.errors import RunError, UserError
from igpt_ds.features.extract import Precision, load_model
from igpt_ds.loading.splits import open_split
from igpt_ds.memory import available_bytes, free_bytes
from igpt_ds.model.sampling import Drawing, images_at_once, not_finite, sample
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.samples.files import require_file, require_new, save_npz, save_pngs
from igpt_ds.samples.sheet import (
    COMPLETIONS,
    completion_sheet,
    first_images,
    pictures,
    prefixes,
    require_room,
    sample_sheet,
    save_png,
)
from igpt_ds.text import size_text
from igpt_ds.weights.base import config_of, palette_of, require_head
from igpt_ds.weights.formats import open_weights
from igpt_ds.weights.placed import Placement

IMAGES = 16  # unless it is said how many
_BYTES = 2 * 8 + 2 + 3  # of a pixel: tokens of each rank and of all as int64, as uint16, and its colour


@dataclass(frozen=True)
class Outputs:
    """Where what is drawn goes; see `igpt_ds.samples.sheet` and `igpt_ds.samples.files`."""

    sheet: Path | None = None
    npz: Path | None = None
    pngs: Path | None = None

    @property
    def named(self) -> list[Path]:
        """Those that are asked for."""
        return [path for path in (self.sheet, self.npz, self.pngs) if path]

    def check(self, images: int, tiles: int, resolution: int) -> None:
        """Refuse what could not be written before anything is drawn; `tiles`: of an image, on a sheet."""
        if not self.named:
            raise UserError("sample: nowhere to write to: add --out FILE.png, --npz FILE.npz or --pngs FOLDER")
        if self.sheet:
            require_room(images, tiles, resolution)
        needed = images * resolution**2 * _BYTES
        if needed > available_bytes():
            raise UserError(
                f"--images {images}: {size_text(needed)} do not fit in memory: draw several of other --seed"
            )
        for path in filter(None, (self.sheet, self.npz)):
            require_file(path)
        if self.pngs:
            require_new(self.pngs)


def draw(
    path: Path,
    out: Outputs,
    drawing: Drawing,
    *,
    step: int | None = None,
    images: int | None = None,
    complete: str | None = None,
    split: str | None = None,
    paths: Sequence[Path] = (),
    rows: int | None = None,
    precision: Precision = "float32",
    placement: Placement | None = None,
) -> int | None:
    """Draw images, or completions, and write them; every rank of a launch calls this.

    Args:
        path: a run, a checkpoint, or weights of any format.
        images: how many are drawn, or completed of `complete`.
        complete: a dataset's folder, whose first images of `split` are completed.
        paths: of pictures that are completed.
        rows: of each image that the model is shown; None: the upper half.
        placement: as for `load_model`.

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
    require_head(weights)
    config, palette = config_of(weights), palette_of(weights)
    if palette is None:
        raise UserError(f"{weights.path}: no palette.npy: igpt-ds convert adds one: --to native --palette FILE")
    if not config.causal:
        raise UserError(f"{path}: is a BERT model: only next_pixel models draw images token by token")
    asked = len(paths) or images or IMAGES
    side, tokens = round(config.sequence_length**0.5), None
    out.check(asked, COMPLETIONS + 2 if complete or paths else 1, side)
    if paths:
        tokens = pictures(paths, config.sequence_length, palette)
    elif complete:
        dataset = open_split(complete, split or "val")
        tokens = first_images(dataset, asked, config.sequence_length, palette)
    rows = side // 2 if rows is None else rows
    # Refused before the ranks meet.
    given_BT = torch.empty(asked, 0, dtype=torch.int64) if tokens is None else prefixes(tokens, rows)
    with ranks.meeting():
        model = load_model(config, weights, precision, placement)
        drawn = drawn_tokens(model, given_BT, drawing, ranks, "samples" if tokens is None else "completions")
    if drawn is None:
        return None
    _write(out, drawn, palette, tokens, rows)
    return weights.step


def _write(out: Outputs, drawn: np.ndarray, palette: Palette, completed: np.ndarray | None, rows: int) -> None:
    if out.sheet:
        sheet = sample_sheet(drawn, palette) if completed is None else completion_sheet(completed, drawn, palette, rows)
        save_png(sheet, out.sheet)
    if out.npz:
        save_npz(drawn, palette, out.npz)
    if out.pngs:
        save_pngs(drawn, palette, out.pngs)


def drawn_tokens(
    model: ImageGPT, prefix_BT: torch.Tensor, drawing: Drawing, ranks: Ranks, title: str
) -> np.ndarray | None:
    """Images that go on from `prefix_BT`: int64 [B, n] on rank 0, None on the others; a collective of the ranks."""
    bar = title if ranks.rank == 0 else None  # one for all ranks

    def draw_rows(prefix_BT: torch.Tensor, first: int) -> torch.Tensor:
        free = free_bytes(model.token_embedding.device, ranks.neighbours) // 2
        size = max(1, images_at_once(model, free))
        parts = [
            sample(model, prefix_BT[i : i + size], drawing, first + i, bar) for i in range(0, len(prefix_BT), size)
        ]
        return torch.cat(parts)

    found = ranks.share_rows(draw_rows, prefix_BT)
    if found is not None and (fault := not_finite(found)):
        raise RunError(f"{title}: {fault}: the weights are damaged, take another checkpoint")
    return None if found is None else found.numpy()
