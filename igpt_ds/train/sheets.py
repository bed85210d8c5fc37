"""Sheets of a pre-training under way: RUN/samples/step-XXXXXXXX.png, and TensorBoard's picture "samples".

Always the same images from the same random numbers, so that sheets show what has changed: free samples above,
completions of the first validation images below. No generator of the training is drawn from.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from igpt_ds.errors import UserError
from igpt_ds.model.sampling import Drawing, not_finite
from igpt_ds.run.directory import LOGGER
from igpt_ds.samples.sheet import COMPLETIONS, completion_tiles, contact_sheet, decoded, prefixes, save_png

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from igpt_ds.distributed.engine import Engine
    from igpt_ds.run.metrics import Metrics
    from igpt_ds.train.job import Job

FREE = 2 * (COMPLETIONS + 2)  # two lines, as wide as the completions'
COMPLETED = 4
SEED = 0


def draw_sheet(
    engine: "Engine", job: "Job", folder: "Path", metrics: "Metrics | None", step: int, beat: "Callable[[], None]"
) -> None:
    """Draw one sheet; a collective. What goes wrong in writing it, or too little memory, is told and no more.

    Args:
        metrics: rank 0's.
        beat: called as tokens are drawn.
    """
    n, palette, drawing = job.config.sequence_length, job.train_sets[0].palette, Drawing(SEED)
    free = engine.sample(torch.empty(FREE, 0, dtype=torch.int64), drawing, beat)
    images = job.validation_set.images(COMPLETED) if job.validation_set is not None else np.empty((0, n), np.uint16)
    rows = round(n**0.5) // 2
    completed = engine.sample(prefixes(images, rows), drawing, beat) if len(images) and rows else None
    if metrics is None:
        return
    if free is None:
        LOGGER.warning(f"step {step:>8}  no samples: no memory is left for them")
        return
    if fault := not_finite(free if completed is None else torch.cat([free, completed])):
        LOGGER.warning(f"step {step:>8}  no samples: {fault}")
        return
    tiles, marked = decoded(free.numpy(), palette), [0] * FREE
    if completed is not None:
        below, marked_below = completion_tiles(images, completed.numpy(), palette, rows)
        tiles, marked = np.concatenate([tiles, below]), marked + marked_below
    sheet = contact_sheet(tiles, COMPLETIONS + 2, marked)
    path = folder / f"step-{step:08d}.png"
    try:
        save_png(sheet, path)
    except UserError as error:
        LOGGER.warning(f"{error}; going on without these samples")
        return
    metrics.show("samples", np.asarray(sheet), step)
    LOGGER.info(f"step {step:>8}  samples {path}")
