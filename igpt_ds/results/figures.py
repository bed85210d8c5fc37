"""Recorded results of one run -> pictures. Reads what training and evaluations wrote; never loads a model.

A function draws one `Figure`; `save` publishes it. The figures of the paper, of several runs, are in paper_figures.py.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from igpt_ds.atomic import publish_file
from igpt_ds.run.records import Record


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
    return (" " if text.startswith("_") else "") + text.replace("$", "\\$")


def probe_by_depth(record: Record, path: Path) -> None:
    """`depth` as a PNG file."""
    save(depth(record), path)


def depth(record: Record) -> Figure:
    """Accuracy of the linear probe by layer (figure 2 of the paper) of one network.

    Args:
        record: what `igpt-ds probe` wrote as JSON.
    """
    figure = new()
    axes = figure.subplots()
    by_layer(axes, record["layers"], "o-", "C0", f"after {record['step']:,} steps")
    if record.get("untrained"):
        by_layer(axes, record["untrained"], "s--", "C7", "the same network, untrained")
    if record.get("pixels") is not None:
        pixels = record["pixels"]
        accuracy = pixels["accuracy"] if isinstance(pixels, dict) else pixels
        axes.axhline(100 * accuracy, color="C1", linestyle=":", label="raw pixels")
    axes.set_ylabel(f"accuracy on {record['validation_images']:,} held-out images, %")
    axes.set_title("Linear probe by depth")
    axes.legend()
    return figure


def by_layer(axes: Axes, results: Sequence[Record], style: str, color: str, label: str) -> None:
    """Add one line of accuracies by layer."""
    layers, accuracies = [r["layer"] for r in results], [100 * r["accuracy"] for r in results]
    axes.plot(layers, accuracies, style, color=color, label=label, markersize=4)
    axes.set_xlabel("layer (the last is the final norm)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def likelihood_map(record: Record) -> Figure:
    """Mean nats by position, in the place that the position has in the image.

    Args:
        record: what `igpt-ds eval` wrote as JSON.
    """
    side = record["resolution"]
    values = [np.nan if nats is None else nats for nats in record["positions"]["nats_per_token"]]
    figure = new(5.2, 4.6)
    axes = figure.subplots()
    axes.set_facecolor("0.6")  # positions that were never scored
    image = axes.imshow(np.reshape(values, (side, side)), cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="nats a token", shrink=0.9)
    axes.set_title(
        f"{record['nats_per_token']:.4f} nats a token, mean of {record['images']:,} {record['split']} images"
    )
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return figure


def few_labels(record: Record) -> Figure:
    """Accuracy by labels a class, mean and standard deviation over random subsets.

    Args:
        record: what the low-data evaluation wrote as JSON.
    """
    found = sorted((int(count), result) for count, result in record["labels_per_class"].items())
    figure = new()
    axes = figure.subplots()
    means, deviations = ([100 * result[key] for _, result in found] for key in ("mean", "std"))
    axes.errorbar([count for count, _ in found], means, deviations, fmt="o-", capsize=4)
    for count, result in found:
        axes.plot([count] * len(result["accuracies"]), [100 * a for a in result["accuracies"]], ".", color="C7")
    axes.set_xscale("log")
    axes.set_xticks([count for count, _ in found], [str(count) for count, _ in found])
    axes.minorticks_off()
    axes.set_xlabel("labels a class")
    axes.set_ylabel("accuracy, %")
    axes.set_title("Few labels: mean ± standard deviation over subsets")
    axes.grid(alpha=0.3)
    return figure


# --- the course of a training ------------------------------------------------------------------------------------


def losses(metrics: Sequence[Record]) -> Figure:
    """Training and validation loss by step; vertical lines where a step was skipped, spiked or rolled back."""
    figure = new()
    axes = figure.subplots()
    _both(axes, metrics, "loss")
    events = [line["step"] for line in metrics if "event" in line]
    for number, step in enumerate(dict.fromkeys(events)):
        axes.axvline(step, color="C3", linewidth=0.7, alpha=0.6, label="" if number else "events")
    # A fine-tuning's is that of a class too.
    axes.set_ylabel("nats" if any("accuracy" in line for line in metrics) else "nats a token")
    axes.set_title("Loss")
    axes.legend()
    return _by_step(figure, axes)


def accuracies(metrics: Sequence[Record]) -> Figure:
    """Training and validation accuracy of a fine-tuning by step."""
    figure = new()
    axes = figure.subplots()
    _both(axes, metrics, "accuracy", 100)
    axes.set_ylabel("accuracy, %")
    axes.set_title("Accuracy")
    axes.legend()
    return _by_step(figure, axes)


def _both(axes: Axes, metrics: Sequence[Record], key: str, scale: float = 1) -> None:
    """A quantity of the training lines and of the validation lines."""
    train = [(line["step"], scale * line[key]) for line in metrics if key in line]
    validation = [(line["step"], scale * line[f"val_{key}"]) for line in metrics if f"val_{key}" in line]
    if train:
        axes.plot(*zip(*train, strict=True), color="C0", linewidth=1, label="training (the step's own batch)")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="C1", markersize=3, label="validation")


def course(metrics: Sequence[Record], key: str, title: str, unit: str, log: bool = False) -> Figure:
    """One quantity of the training lines that have it by step."""
    points = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), int | float)]
    figure = new(6.4, 3)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color="C0", linewidth=1, marker="." if len(points) < 50 else "")
    if log and all(value > 0 for _, value in points):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.set_title(title)
    return _by_step(figure, axes)


def _by_step(figure: Figure, axes: Axes) -> Figure:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.3)
    return figure
