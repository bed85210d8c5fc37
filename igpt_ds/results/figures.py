"""The course of a training in pictures, from the lines of its metrics.jsonl."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from igpt_ds.evals import Record
from igpt_ds.plots import new


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
    points = [(line["step"], line[key]) for line in metrics if key in line]
    figure = new(6.4, 3)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color="C0", linewidth=1, marker="." if len(points) < 50 else "")
    if log and not any(value <= 0 for _, value in points):  # nan is a gap
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
