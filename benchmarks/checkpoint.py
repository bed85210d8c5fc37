"""What saving costs training. Run by hand: `python benchmarks/checkpoint.py [--layers 24] [--batch 2]`.

The target: training waits at most the time of one step of the small preset, whose 76 M parameters and their moments
are 0.9 GB. In one process: steps without a save, the pause that a save makes (copying the state), and steps while the
thread writes. A real step has 128 images; a CPU is timed on few and the time of 128 stated beside it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from igpt_ds.checkpoint.write import Saver
from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.distributed.engine import Engine
from igpt_ds.distributed.ranks import launched


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    options = parser.parse_args()
    sets = [f"model.layers={options.layers}", f"training.batch={options.batch}", "data.resolution=32"]
    config = load_config("s", sets)
    ranks = launched()
    division = divide_batch(options.batch, "auto", ranks.world)
    engine = Engine(config, resolve(load_ds_config("zero3"), config, division), division, ranks)
    tokens = torch.randint(512, (division.micro_batch, 1024))

    def step() -> float:
        began = time.perf_counter()
        engine.train_step([{"tokens": tokens, "positions": torch.arange(len(tokens))}], 1e-4)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), ranks.rank, ranks.world, engine.ranks.any, ranks.neighbours)
        facts: dict[str, object] = {"identity": {}, "config": {}}
        plain, during, pauses, writes = [], [], [], []
        step()
        for number in range(3):
            plain += [step(), step()]
            began = time.perf_counter()
            saver.begin(number, engine.state.shards(), facts)
            pauses.append(time.perf_counter() - began)
            while saver.busy:
                during.append(step())
            writes.append(time.perf_counter() - began)
            saver.conclude()
    medians = [statistics.median(values) for values in (plain, pauses, during or plain, writes)]
    for name, value in zip(("step", "pause of a save", "step while writing", "until written"), medians, strict=True):
        print(f"{name:<20}{value:>8.2f} s   {value / medians[0]:>6.2f} of a step of {options.batch} images")
    print(f"{'pause of a save':<20}{'':>8}     {medians[1] / medians[0] * options.batch / 128:>6.3f} of a step of 128")
    engine.close()
    ranks.leave()


if __name__ == "__main__":
    main()
