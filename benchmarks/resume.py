"""What metrics.jsonl of a long run costs who resumes it, beside another version: `python -m benchmarks.resume`.

The file has 2 million lines as a training writes them, and the checkpoint is 500 steps before its end. Rank 0 reads
what was decided and drops what lies beyond the checkpoint; the others read nothing, while in commit 29c4e7f each rank
parsed it. Processor time and memory of a process of its own, beside its imports; `--base CHECKOUT` of a version from
before tells what it takes there, in turn, medians. The targets: 2 s and 100 MB.

Beside it the manifest of a dataset of 100 000 shards, which every rank reads; the target: 0.5 s.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LINES, BEYOND, SHARDS = 2_000_000, 500, 100_000
MANIFEST = """
import sys, time
from pathlib import Path
try:  # the older names first: an installed package may lend the newer ones to any checkout
    from igpt_ds.manifest import Manifest
except ImportError:
    from igpt_ds.dataset.manifest import Manifest
begin = time.process_time()
assert len(Manifest.load(Path(sys.argv[1])).shards) == int(sys.argv[2])
print(time.process_time() - begin)
"""
RESUME = """
import re, sys, time
from pathlib import Path
import torch.utils.tensorboard
try:
    from igpt_ds import metrics
    read = metrics.read_metrics
except ImportError:
    from igpt_ds.run import metrics
    read = metrics.read_rollbacks
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
run, step = Path(sys.argv[1]), int(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
before, begin = most(), time.process_time()
decided = read(run / "metrics.jsonl")
each = time.process_time() - begin
del decided
metrics.Metrics(run, step, {}).close()
print(each, time.process_time() - begin, (most() - before) / 1e6)
"""


def write_lines(path: Path) -> None:
    """The file of a run that logs every step."""
    draw = random.Random(0)
    with path.open("w") as file:
        for step in range(1, LINES + 1):
            loss = 2 + draw.random()
            line = {
                "step": step,
                "loss": loss,
                "bits": loss * 1.4427,
                "lr": 0.003 * draw.random(),
                "grad_norm": loss / 7,
            }
            rates = {"tokens_per_s": 1e6 * loss, "images_per_s": 1e3 * loss, "tflops": 300 * loss, "mfu": loss / 7}
            line |= {**rates, "data_wait": 1e-4 * loss, "memory_gib": 70.5, "eta_s": 1e5 * loss}
            file.write(json.dumps(line) + "\n")


def write_manifest(path: Path) -> None:
    """The manifest of 102 million images."""
    places = {"rows": 1024, "bytes": 2_200_000, "view": 0, "token_offset": 640, "block_bytes": 530_000}
    names = [f"train-{number:06d}" for number in range(SHARDS)]
    shards = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **places} for name in names]
    content = {"format": "igpt-ds-tokens", "version": 1, "rows": 1024 * SHARDS, "sequence_length": 1024}
    content |= {"resolution": 32, "rows_per_block": 256, "storage": "uint16", "source": "x", "split": "train"}
    content |= {"palette": {"k": 512, "sha256": "0" * 64, "distortion": 0.01}, "views": 1, "transform": {}, "seed": 0}
    content |= {"classes": None, "versions": {}, "rejected": 0, "shards": shards}
    path.write_text(json.dumps(content, indent=1))


def run(checkout: Path, script: str, *words: object) -> list[float]:
    """The numbers that a script prints which has the package of a checkout."""
    command, environment = [sys.executable, "-c", script, *map(str, words)], {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def measure(checkout: Path, folder: Path) -> list[float]:
    """Processor seconds of the first reading and of both, the MB that they took, and seconds of the manifest."""
    with TemporaryDirectory(dir=folder) as resumed:
        copy = Path(shutil.copy(folder / "metrics.jsonl", resumed))  # which is cut
        found = run(checkout, RESUME, resumed, LINES - BEYOND)
        assert copy.read_bytes().count(b"\n") == LINES - BEYOND
    return found + run(checkout, MANIFEST, folder, SHARDS)


def main() -> None:
    """Measure this version, and another in turn with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = {"this": Path(__file__).parents[1], **({"that": arguments.base.resolve()} if arguments.base else {})}
    found: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    with TemporaryDirectory() as folder:
        write_lines(lines := Path(folder, "metrics.jsonl"))
        write_manifest(Path(folder, "manifest.json"))
        print(f"{LINES:,} lines, {lines.stat().st_size / 1e6:.0f} MB")
        for _ in range(arguments.rounds):
            for name, checkout in checkouts.items():
                found[name].append(measure(checkout, Path(folder)))
    for name, measured in found.items():
        read, both, size, manifest = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name}: decisions {read:.2f} s, with the cut {both:.2f} s of processor time, {size:.0f} MB")
        print(f"{name}: manifest {manifest:.2f} s")


if __name__ == "__main__":
    main()
