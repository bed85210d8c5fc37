"""What a selection looks like: a histogram of similarities by fate, and a contact sheet of the thumbnails that the
chunks hold, so that people see where the threshold lies and what it does."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.selection.embed import THUMBNAIL, Chunk
from data_prep.selection.ranking import Cut
from data_prep.selection.verdicts import BELOW, CLOSE, EXACT, FATES, KEPT, NEAR, OUTSIDE, Judged
from igpt_ds.atomic import publish_file

_BINS = np.linspace(-1, 1, 201)
_COLUMNS = 12
_GAP, _LABEL = 4, 18
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


class _Shown(NamedTuple):
    """A thumbnail: its image's similarity, its chunk, its number there."""

    similarity: float
    chunk: Chunk
    number: int


# Title, fate, and whether the most (1) or the least (-1) similar ones are shown.
_ROWS = (
    ("kept, the most similar", KEPT, 1),
    ("kept, the least similar", KEPT, -1),
    ("below the threshold, the most similar", BELOW, 1),
    ("below the threshold, the least similar", BELOW, -1),
    ("outside the clusters, the most similar", OUTSIDE, 1),
    ("near duplicates of an earlier image", NEAR, 1),
    ("exact duplicates of an earlier image", EXACT, 1),
    ("close to an evaluation set", CLOSE, 1),
)


class Pictures:
    """Gathers what the pictures show, a chunk at a time."""

    def __init__(self) -> None:
        self._histogram = np.zeros((len(FATES), len(_BINS) - 1), np.int64)
        self._rows: list[list[_Shown]] = [[] for _ in _ROWS]

    def add(self, judged: Judged) -> None:
        """Take note of a chunk."""
        # Rounding can carry a cosine past 1.
        similarity = np.clip(judged.similarity, -1, 1)
        for fate in np.unique(judged.fates):
            self._histogram[fate] += np.histogram(similarity[judged.fates == fate], _BINS)[0]
        (rows,) = judged.chunk.read("thumbnail_rows")
        shown = [_Shown(float(similarity[row]), judged.chunk, number) for number, row in enumerate(rows)]
        fates = judged.fates[rows]
        for found, (_, fate, most) in zip(self._rows, _ROWS, strict=True):
            found += [each for each, its in zip(shown, fates, strict=True) if its == fate]
            found.sort(key=lambda each: -most * each.similarity)
            del found[_COLUMNS:]

    def save(self, histogram: Path, sheet: Path, where: Cut | None) -> None:
        """Publish both as PNG files."""
        self._plot(histogram, where)
        with publish_file(sheet) as file:
            self._sheet().save(file, "PNG")

    def _plot(self, path: Path, where: Cut | None) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        used = [fate for fate in range(len(FATES)) if self._histogram[fate].any()]
        axes.stackplot(
            (_BINS[1:] + _BINS[:-1]) / 2,
            *(self._histogram[fate] for fate in used),
            labels=[f"{FATES[fate]} ({self._histogram[fate].sum():,})" for fate in used],
            step="mid",
        )
        if where:
            axes.axvline(where.threshold, color="black", linestyle="--", linewidth=1)
            axes.annotate(
                f"threshold {where.threshold:.3f}",
                (where.threshold, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
            )
        filled = np.flatnonzero(self._histogram.any(0))
        axes.set_xlim(_BINS[max(filled[0] - 2, 0)], _BINS[min(filled[-1] + 3, len(_BINS) - 1)])
        axes.set_xlabel("cosine to the nearest sub-centroid")
        axes.set_ylabel("images in a bin of 0.01")
        axes.legend(loc="upper left", frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        with publish_file(path) as file:
            file.write(buffer.getvalue())

    def _sheet(self) -> Image.Image:
        rows = [(title, found) for (title, _, _), found in zip(_ROWS, self._rows, strict=True) if found]
        height = _LABEL + THUMBNAIL + 2 * _GAP
        sheet = Image.new("RGB", (_COLUMNS * (THUMBNAIL + _GAP) + _GAP, max(1, len(rows)) * height), _PAPER)
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
        for row, (title, found) in enumerate(rows):
            low, high = min(each.similarity for each in found), max(each.similarity for each in found)
            draw.text((_GAP, row * height + 2), f"{title}: similarity {low:.3f} to {high:.3f}", _INK, font)
            for column, each in enumerate(found):
                thumbnail = Image.fromarray(each.chunk.read("thumbnails")[0][each.number])
                sheet.paste(thumbnail, (_GAP + column * (THUMBNAIL + _GAP), row * height + _LABEL))
        return sheet
