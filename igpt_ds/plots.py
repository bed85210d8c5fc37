"""Figures: made, labelled, saved. What is drawn stands where it is recorded; nothing here loads a model."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from igpt_ds.atomic import publish_file
from igpt_ds.text import visible


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with publish_file(path) as file:
        figure.savefig(file, format="png")


def png(figure: Figure) -> bytes:
    """The bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def new(width: float = 6.4, height: float = 4.0) -> Figure:
    """An empty figure of so many inches, at 120 dots an inch."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def plain(text: str) -> str:
    """A user's string as a label: dollars begin no formula, and a leading underscore does not hide it."""
    return (" " if text.startswith("_") else "") + visible(text).replace("$", "\\$")


def by_layer(axes: Axes, results: Sequence[dict[str, Any]], style: str, color: str, label: str) -> None:
    """Add one line of accuracies by layer."""
    layers, accuracies = [r["layer"] for r in results], [100 * r["accuracy"] for r in results]
    axes.plot(layers, accuracies, style, color=color, label=label, markersize=4)
    axes.set_xlabel("layer (the last is the final norm)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
