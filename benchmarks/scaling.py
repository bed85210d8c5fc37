"""What a step costs against ranks, depth and sequence length: `python -m benchmarks.scaling [--out FILE]`.

By hand; nothing else should be running. Each figure is the median of steps that are timed in turns with those of the
other sizes, so that what else the machine does strikes all alike; beside it the model's FLOPs (config/size.py), and
the ratio of both to the first row's. Straight lines where they should be:

    weak      the same images on each rank: a step should take as long on 4 ranks as on 1, where each has its core
    strong    the same images over all: half the time on twice the ranks
    depth     layers: a straight line
    sequence  tokens: a line with attention's square above it, in the share that the FLOPs say

Ranks are processes on this machine with one thread each, under ZeRO-3. What they take from one another, cores and
memory bandwidth, is told by as many processes that compute the same share and exchange nothing ("apart"); what the
exchange and the waiting for one another cost, by the ratio to these.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.config.size import attention_flops_per_image, flops_per_image
from igpt_ds.text import Table
from tests.helpers.ranks import ROOT, free_port, run_ranks

SHAPE = ("model.width=128", "model.heads=4", "data.palette_size=64", "training.activation_checkpointing=none")
DEPTHS, RESOLUTIONS = (2, 4, 8, 16), (8, 16, 24, 32, 48)
WORLDS, IMAGES = (1, 2, 4), 8


def config_of(layers: int, resolution: int, batch: int) -> Config:
    """A small network of the preset's make."""
    facts = (f"model.layers={layers}", f"data.resolution={resolution}", f"training.batch={batch}")
    return load_config("tiny", [*SHAPE, *facts])


def shapes(rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds of a step in this process, by depth and by sequence length."""
    import torch

    from igpt_ds.model.transformer import ImageGPT, initialise
    from igpt_ds.objectives import next_pixel

    torch.set_num_threads(1)

    def step_of(config: Config, images: int) -> Callable[[], None]:
        model = ImageGPT(config)
        initialise(model, 0)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(0, config.palette_size, (images, config.sequence_length))

        def step() -> None:
            next_pixel.image_losses(model(tokens).logits_BTK, tokens, None).mean().backward()
            adam.step()
            adam.zero_grad()

        return step

    sizes = {
        "depth": {layers: step_of(config_of(layers, 16, 4), 4) for layers in DEPTHS},
        "sequence": {side**2: step_of(config_of(4, side, 2), 2) for side in RESOLUTIONS},
    }
    found: dict[str, dict[int, float]] = {}
    for name, steps in sizes.items():
        times: dict[int, list[float]] = {size: [] for size in steps}
        for turn in range(rounds + 1):
            for size, step in steps.items():
                began = time.perf_counter()
                step()
                if turn:  # the first one warms up
                    times[size].append(time.perf_counter() - began)
        found[name] = {size: statistics.median(values) for size, values in times.items()}
    return found


def rank_main(folder: Path, rounds: int, apart: bool) -> None:
    """One rank: weak and strong steps in turns; it records the medians.

    Args:
        apart: it is the only one of a world of its own, beside as many others.
    """
    import torch

    from igpt_ds.config.batch import divide_batch
    from igpt_ds.config.deepspeed import load_ds_config, resolve
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.distributed.ranks import launched

    ranks, beside = launched(), 1
    rank, world = ranks.rank, ranks.world
    if apart:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=str(free_port()))
        ranks, beside = launched(), world
    engines = {}
    for name, batch in (("weak", IMAGES * ranks.world), ("strong", IMAGES // beside)):
        config = config_of(4, 16, batch)
        division = divide_batch(batch, "auto", ranks.world)
        engines[name] = Engine(config, resolve(load_ds_config("zero3"), config, division), division, ranks)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 3):
        for name, engine in engines.items():
            images = engine.division.micro_batch
            tokens = torch.randint(0, 64, (images, engine.config.sequence_length))
            engine.ranks.sum([0.0])  # all begin together
            began = time.perf_counter()
            engine.train_step([{"tokens": tokens, "positions": torch.arange(images)}], 1e-4)
            if turn >= 3:  # ZeRO-3 learns the order of the modules first
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    (folder / f"{rank}.json").write_text(json.dumps(medians))
    ranks.leave()
    sys.stdout.flush()
    os._exit(0)


def over_ranks(rounds: int, repeats: int) -> dict[str, dict[int, float]]:
    """Median seconds of a step by the number of ranks, together and apart, taken in turns."""
    found: dict[str, dict[int, list[float]]] = {}
    for _ in range(repeats):
        for world in WORLDS:
            for suffix, more in (("", []), (" apart", ["--apart"])):
                with tempfile.TemporaryDirectory() as folder:
                    arguments = ["--rank-of", folder, "--rounds", str(rounds), *more]
                    run_ranks("benchmarks.scaling", arguments, world, limit=600)
                    for path in Path(folder).iterdir():
                        for name, seconds in json.loads(path.read_text()).items():
                            found.setdefault(name + suffix, {}).setdefault(world, []).append(seconds)
    return {name: {w: statistics.median(v) for w, v in times.items()} for name, times in found.items()}


def shape_table(name: str, times: dict[int, float]) -> Table:
    """Time and FLOPs of a step against depth or sequence length."""
    rows = []
    first = next(iter(times))
    for size, seconds in times.items():
        depth, side = (size, 16) if name == "depth" else (4, round(size**0.5))
        config = config_of(depth, side, 4)
        base = config_of(first, 16, 4) if name == "depth" else config_of(4, round(first**0.5), 4)
        flops = flops_per_image(config)
        share = attention_flops_per_image(config) / flops
        rows.append(
            [
                f"{size}",
                f"{1e3 * seconds:.1f}",
                f"{seconds / times[first]:.2f}",
                f"{size / first:.2f}",
                f"{flops / flops_per_image(base):.2f}",
                f"{100 * share:.1f}",
                f"{1e6 * seconds / size:.1f}",
            ]
        )
    headings = ("layers" if name == "depth" else "tokens", "ms a step", "ratio", "of sizes", "of FLOPs")
    return Table(name, (*headings, "attention's % of them", f"us a {'layer' if name == 'depth' else 'token'}"), rows)


def ranks_table(name: str, times: dict[int, float], apart: dict[int, float]) -> Table:
    """Time of a step against ranks."""
    rows = [
        [
            f"{world}",
            f"{1e3 * seconds:.1f}",
            f"{seconds / times[1]:.2f}",
            f"{1.0 if name == 'weak' else 1 / world:.2f}",
            f"{1e3 * apart[world]:.1f}",
            f"{apart[world] / apart[1]:.2f}",
            f"{seconds / apart[world]:.2f}",
        ]
        for world, seconds in times.items()
    ]
    headings = ("ranks", "ms a step", "ratio", "of the work", "ms apart", "ratio apart", "together / apart")
    return Table(f"{name} scaling", headings, rows)


def main() -> None:
    """Print the tables, and write them with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each size")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each number of ranks")
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.rank_of, options.rounds, options.apart)
        return
    began = os.getloadavg()[0]
    tables = [shape_table(name, times) for name, times in shapes(options.rounds).items()]
    ranks = over_ranks(options.rounds, options.repeats)
    tables += [ranks_table(name, ranks[name], ranks[f"{name} apart"]) for name in ("weak", "strong")]
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    text = "\n".join(
        [
            "# A step's cost against ranks, depth and sequence length",
            "",
            f"{date.today()}, commit {commit}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{os.cpu_count()} shared CPU cores, load {began:.1f} before and {os.getloadavg()[0]:.1f} at the end.",
            f"`python -m benchmarks.scaling --rounds {options.rounds} --repeats {options.repeats}`: width 128, 4 "
            "heads, float32, one thread a process; depth at 256 tokens, the others with 4 layers. The ratios matter.",
            "",
            *(table.markdown() for table in tables),
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
