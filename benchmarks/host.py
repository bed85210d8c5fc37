"""What a processor does to start a step's kernels: `python -m benchmarks.host [--out FILE]`.

A network of 24 layers so narrow that to compute it is nothing: what a step of the engine takes is Python, torch and
DeepSpeed. Processor time of one thread, the least of some steps, by ZeRO stage, recomputation and torch.compile, each
in a process of its own; milliseconds a layer and micro-batch. The planner assumes these (planner/step_time.py): where a
GPU has its kernels done before the processor has started the next, the processor sets the pace.
"""

import argparse
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from igpt_ds.text import Table

LAYERS, STEPS = 24, 15
SETTINGS = [
    (ds, mode, compiled)
    for compiled in ("false", "true")
    for ds in ("zero0", "zero1", "zero2", "zero3")
    for mode in ("none", "full")
]


def milliseconds(ds: str, mode: str, compiled: str) -> float:
    """Processor time of a step, in this process."""
    import torch

    from igpt_ds.config.batch import divide_batch
    from igpt_ds.config.deepspeed import load_ds_config, resolve
    from igpt_ds.config.file import load_config
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.distributed.ranks import Ranks

    torch.set_num_threads(1)
    facts = [
        *("model.width=32", "model.heads=1", f"model.layers={LAYERS}", "data.resolution=4", "data.palette_size=16"),
        *("training.batch=1", f"training.activation_checkpointing={mode}", f"training.compile={compiled}"),
        f"training.precision={'float32' if ds == 'zero0' else 'bfloat16'}",
    ]
    config = load_config("s", facts)
    division = divide_batch(1, 1, 1)
    engine = Engine(config, resolve(load_ds_config(ds), config, division), division, Ranks())
    batch = {"tokens": torch.randint(0, 16, (1, 16)), "positions": torch.arange(1)}
    times = []
    for _ in range(STEPS + 4):  # ZeRO-3 learns the order of the modules first
        began = time.process_time()
        engine.train_step([batch], 1e-3)
        times.append(time.process_time() - began)
    return 1e3 * min(times[4:])  # what else the machine does only adds to it


def main() -> None:
    """All settings, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--setting", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(f"RESULT {milliseconds(*options.setting)}")
        return
    rows = []
    for ds, mode, compiled in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.host", "--setting", ds, mode, compiled]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        found = float(done.stdout.partition("RESULT ")[2].split()[0])
        rows.append([ds, mode, "compiled" if compiled == "true" else "eager", f"{found:.0f}", f"{found / LAYERS:.2f}"])
        print(*rows[-1], flush=True)
    headings = ("--ds", "recomputation", "blocks", "ms a step", "ms a layer")
    note = (
        f"{date.today()}, {platform.python_implementation()} {platform.python_version()}, `python -m benchmarks.host`."
    )
    text = Table("Processor time of a step of 24 layers", headings, rows, note).markdown()
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
