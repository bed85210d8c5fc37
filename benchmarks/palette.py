"""Colours to tokens, and the palette's fit against that of another version. By hand: `python -m benchmarks.palette`.

The table of all 2^24 colours against a k-d tree, on the pixels of two photographs and on random colours, 512 colours.
The target: 10 times the tree's speed. The two are timed in turn, medians of five; "farther" counts pixels for which the
tree knows a nearer colour. The table's construction (once a palette, then kept on disk) is told beside it.

`--base CHECKOUT SOURCE PATH`: 512 colours for the images of a source, by this version and by the one in CHECKOUT, each
fit in a process of its own, in turn; `--no-crop` counts their own pixels, else those of the 32 x 32 crops. Processor
time and distortion (root mean square) are compared. Targets: at most a fifth of the time of commit 3eec70e, and at most
0.2 % above its distortion.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.spatial import cKDTree
from sklearn.datasets import load_sample_images

from data_prep.palette.count import add_up, colour_tasks, count_colours
from data_prep.palette.fit import distortion
from data_prep.sources import open_source
from igpt_ds.dataset.palette import Palette, nearest_table
from igpt_ds.images.transforms import evaluation

PIXELS = 1_000_000
ROUNDS = 5
FIT = """
import sys, time
from pathlib import Path
import numpy as np
from data_prep.palette.fit import fit
counts = np.load(sys.argv[1])
begin = time.process_time()
palette = fit(counts, 512, int(sys.argv[3]))
print(time.process_time() - begin)
palette.save(Path(sys.argv[2]))
"""


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def table() -> None:
    """Compare the table with the tree."""
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


def fits(base: Path, source: str, paths: list[str], no_crop: bool, rounds: int) -> None:
    """Compare this version's fit with that of another checkout."""
    versions = {"that": base, "this": Path(__file__).parent.parent}
    spent: dict[str, list[float]] = {name: [] for name in versions}
    levels: dict[str, list[float]] = {name: [] for name in versions}
    with TemporaryDirectory() as work:
        transform = evaluation(None if no_crop else 32, not no_crop)
        tasks = colour_tasks(open_source(source, paths), transform, Path(work))
        begin = time.process_time()
        for task in tasks:
            count_colours(task)
        counts, tally = add_up([task.path for task in tasks])
        counted = f"{tally.seen:,} images counted in {time.process_time() - begin:.1f} CPU s"
        print(f"{counted}: {counts.sum():,} pixels of {(counts > 0).sum():,} colours", flush=True)
        np.save(f"{work}/counts.npy", counts)
        for seed in range(rounds):
            for name, checkout in versions.items():
                command = [sys.executable, "-c", FIT, f"{work}/counts.npy", f"{work}/{name}.npy", str(seed)]
                environment = {**os.environ, "PYTHONPATH": str(checkout)}
                done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, check=True)
                palette = Palette.load(Path(work, f"{name}.npy"))
                spent[name].append(float(done.stdout))
                levels[name].append(distortion(counts, palette).rms_levels)
                told = f"{spent[name][-1]:.1f} CPU s, {levels[name][-1]:.4f} levels, sha256 {palette.sha256[:16]}"
                print(f"seed {seed}, {name} version: {told}", flush=True)
    for what, found, target in (("time", spent, "at most 0.2"), ("distortion", levels, "at most 1.002")):
        ratios = [mine / theirs for mine, theirs in zip(found["this"], found["that"], strict=True)]
        print(f"{what}: median ratio {statistics.median(ratios):.4f}    target {target}")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--no-crop", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("source", nargs="*", help="SOURCE PATH...")
    arguments = parser.parse_args()
    if arguments.base:
        fits(arguments.base.resolve(), arguments.source[0], arguments.source[1:], arguments.no_crop, arguments.rounds)
    else:
        table()


if __name__ == "__main__":
    main()
