"""Recorded results -> pictures. Reads what evaluations wrote; never loads a model."""

from pathlib import Path
from typing import Any

from igpt_ds.atomic import publish_file


def probe_by_depth(record: dict[str, Any], path: Path) -> None:
    """Accuracy of the linear probe by layer (figure 2 of the paper) as a PNG.

    Args:
        record: what `igpt-ds probe` wrote as JSON.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, style, color, label in (
        ("layers", "o-", "C0", f"after {record['step']:,} steps"),
        ("untrained", "s--", "C7", "the same network, untrained"),
    ):
        if not record[key]:
            continue
        axes.plot(
            [r["layer"] for r in record[key]], [r["accuracy"] for r in record[key]], style, color=color, label=label
        )
    axes.axhline(record["pixels"], color="C1", linestyle=":", label="raw pixels")
    axes.set_xlabel("layer (the last is the final norm)")
    axes.set_ylabel(f"accuracy on {record['validation_images']:,} held-out images")
    axes.set_title("Linear probe by depth")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with publish_file(path) as file:
        figure.savefig(file, format="png")
