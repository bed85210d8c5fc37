"""Colours to tokens: our table of all 2^24 colours against a k-d tree. Run by hand: `python benchmarks/palette.py`.

The target: 10 times the tree's speed, on the pixels of two photographs and on random colours, 512 colours. The two are
timed in turn, medians of five; "farther" counts pixels for which the tree knows a nearer colour. The table's
construction (once a palette, then kept on disk) is told beside it.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree
from sklearn.datasets import load_sample_images

from igpt_ds.dataset.palette import Palette, nearest_table

PIXELS = 1_000_000
ROUNDS = 5


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    generator = np.random.default_rng(0)
    photos = np.concatenate([image.reshape(-1, 3) for image in load_sample_images().images])
    chosen = generator.choice(np.unique(photos, axis=0), 512, replace=False)
    palette = Palette((chosen / 127.5 - 1).astype(np.float32))
    tree = cKDTree(palette.colours.astype(np.float64))
    print(f"table of 2^24 colours: {seconds(lambda: nearest_table(palette.colours)):.2f} s, once a palette")
    palette.encode(photos[:1])  # the table, kept from now on
    inputs = {
        "photographs": generator.choice(photos, PIXELS),
        "random": generator.integers(0, 256, (PIXELS, 3), dtype=np.uint8),
    }
    print(f"{'pixels':<14}{'table, Mpixel/s':>17}{'k-d tree, Mpixel/s':>20}{'ratio':>8}{'farther':>9}")
    for name, pixels in inputs.items():
        scaled = pixels / 127.5 - 1
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(seconds(lambda: palette.encode(pixels)))  # noqa: B023
            theirs.append(seconds(lambda: tree.query(scaled)))  # noqa: B023
        chosen_by_us = palette.colours[palette.encode(pixels)].astype(np.float64)
        distances = np.sqrt(((scaled - chosen_by_us) ** 2).sum(axis=1))
        farther = int((distances > tree.query(scaled)[0] + 1e-9).sum())
        mine, other = PIXELS / statistics.median(ours) / 1e6, PIXELS / statistics.median(theirs) / 1e6
        print(f"{name:<14}{mine:>17.1f}{other:>20.2f}{mine / other:>8.1f}{farther:>9}")


if __name__ == "__main__":
    main()
