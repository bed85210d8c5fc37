"""What a busy machine costs: processor time of the demo's commands beside busy loops, against the quiet machine.

    python -m benchmarks.contention [--loops 4] [--rounds 1]

Threads that wait for one another spin, and so a busy machine shows in processor time. The target is a ratio of at most
1.5 for each command. Wall-clock time must grow, since the loops take their share of the cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples import demo

STEPS = 100  # of pre-training
LIMIT = 1.5


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def processor_seconds(words: list[str]) -> tuple[float, float]:
    """Processor time of a command and all that it started and waited for; and the time on the wall."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=demo.environment())
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(words)}\n{output.read().decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begin


def commands(folder: Path, number: int) -> dict[str, list[str]]:
    """What is measured. Each writes to names of its own, so that nothing is complete already."""
    digits, data, run = (str(folder / name) for name in ("digits", "data", "run"))
    fresh = str(folder / str(number))
    igpt_data, igpt_ds, deepspeed = (str(demo.BIN / name) for name in ("igpt-data", "igpt-ds", "deepspeed"))
    train = [
        "--preset",
        "demo",
        "--data",
        data,
        "--set",
        f"training.steps={STEPS}",
        "--set",
        "training.warmup_steps=10",
    ]
    return {
        "palette": [igpt_data, "palette", digits, "--k", "16", "--no-crop", "--out", f"{fresh}.npy"],
        "pretrain, 1 rank": [igpt_ds, "pretrain", f"{fresh}-run", *train],
        "pretrain, 2 ranks": [
            *(deepspeed, "--num_accelerators", "2", "--module", "igpt_ds", "pretrain", f"{fresh}-two", *train)
        ],
        "eval": [igpt_ds, "eval", run, "--data", data, "--split", "train", "--json", f"{fresh}-eval.json"],
        "probe": [igpt_ds, "probe", run, "--data", data, "--json", f"{fresh}/probe.json"],
        "sample": [igpt_ds, "sample", run, "--images", "16", "--out", f"{fresh}.png"],
    }


def prepare(folder: Path) -> None:
    """The demo's digits, shards and a run, at `folder`."""
    demo.DIGITS = folder / "digits"
    demo.export_digits()
    made = commands(folder, 0)
    processor_seconds(made["palette"])
    shards = [str(demo.BIN / "igpt-data"), "shards", "image_folder", str(folder / "digits"), "--no-crop"]
    shape = ["--palette", str(folder / "0.npy"), "--resolution", "8", "--holdout", "0.1", "--out", str(folder / "data")]
    processor_seconds([*shards, *shape])
    processor_seconds(made["pretrain, 1 rank"])
    (folder / "0-run").rename(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        times: dict[str, list[tuple[float, float, float, float]]] = {}
        for number in range(1, wanted.rounds + 1):
            for what in commands(folder, 0):
                quiet = processor_seconds(commands(folder, 2 * number)[what])
                with busy(wanted.loops):
                    loaded = processor_seconds(commands(folder, 2 * number + 1)[what])
                times.setdefault(what, []).append((*quiet, *loaded))
    print(f"{'command':<20}{'quiet':>10}{'busy':>10}{'ratio':>8}      on the wall")
    worst = 0.0
    for what, found in times.items():
        quiet_cpu, quiet_wall, busy_cpu, busy_wall = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(row[2] / row[0] for row in found)
        worst = max(worst, ratio)
        print(f"{what:<20}{quiet_cpu:>8.1f} s{busy_cpu:>8.1f} s{ratio:>8.2f}{quiet_wall:>8.1f} s{busy_wall:>8.1f} s")
    print(f"largest ratio {worst:.2f}, aim {LIMIT}: {'reached' if worst <= LIMIT else 'missed'}")


if __name__ == "__main__":
    main()
