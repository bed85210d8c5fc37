"""The whole job on a small real data set: `make demo`.

scikit-learn's 1 797 hand-written digits become PNG files in class folders; then every command of the README runs
on them, small: palette, shards, pre-training under ZeRO-3 with two processes (killed once on the way, to show
that it goes on), a linear probe of every layer, samples and completions.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from igpt_ds.dataset.shards import Dataset
from igpt_ds.run.metrics import read_metrics

FOLDER = Path("demo")
DIGITS, PALETTE, DATA, RUN = FOLDER / "digits", FOLDER / "palette.npy", FOLDER / "data", FOLDER / "run"
BIN = Path(sys.executable).parent
COLOURS = 16
KILL_AFTER = 110  # steps; a checkpoint is made every 100
TIME_LIMIT = 3600  # seconds for each command: minutes on a quiet laptop


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    title("scikit-learn's digits as PNG files in class folders")
    export_digits()
    title("palette: the k-means colours that tokens stand for")
    command("igpt-data", "palette", DIGITS, "--k", COLOURS, "--no-crop", "--out", PALETTE)
    title("token shards, a tenth of the images held out")
    options = ("--resolution", 8, "--holdout", 0.1, "--views", 1, "--no-crop")
    command("igpt-data", "shards", "image_folder", DIGITS, "--palette", PALETTE, *options, "--out", DATA)
    command("igpt-data", "verify", DATA / "train")
    title("pre-training, ZeRO-3 on two processes, killed on the way")
    pretrain(kill_after=KILL_AFTER)
    title("the same command again: it goes on from the newest checkpoint")
    pretrain(kill_after=None)
    title("linear probe of every layer, samples, completions")
    command("igpt-ds", "probe", RUN, "--data", DATA, "--json", FOLDER / "probe.json", "--untrained")
    command("igpt-ds", "sample", RUN, "--images", 64, "--out", FOLDER / "samples.png")
    command("igpt-ds", "sample", RUN, "--images", 8, "--complete", DATA, "--out", FOLDER / "completions.png")
    summary(time.monotonic() - began)


def export_digits() -> None:
    """8 × 8 grey images, labelled 0 to 9; the two brightest of their 17 levels become one, so that 16 colours do."""
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = DIGITS / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.minimum(image, 15).astype(np.uint8) * 17).save(path)
    print(f"{index + 1} images in {DIGITS}")


def command(name: str, *arguments: object) -> None:
    """Run a console script of this environment; its failure ends the demo."""
    words = [str(BIN / name), *map(str, arguments)]
    print("$", " ".join([name, *words[1:]]), flush=True)
    try:
        status = subprocess.run(words, check=False, timeout=TIME_LIMIT, env=environment()).returncode
    except subprocess.TimeoutExpired:
        sys.exit(f"demo: {name} {arguments[0]} took more than {TIME_LIMIT} s: is the machine busy?")
    if status:
        sys.exit(f"demo: {name} {arguments[0]} ended with status {status}: what it said is above")


def environment() -> dict[str, str]:
    """The launcher must find this environment's programs; the time to import a compiler is saved."""
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "TORCHDYNAMO_DISABLE": "1"}


def pretrain(kill_after: int | None) -> None:
    """Pre-train through the deepspeed launcher; with `kill_after`, kill all of it once that step is recorded."""
    words = ["deepspeed", "--num_accelerators", "2", "--module", "igpt_ds", "pretrain"]
    words += [str(RUN), "--preset", "demo", "--data", str(DATA), "--ds", "zero3"]
    print("$", *words, flush=True)
    # A session of its own, so that launcher and ranks can be killed together.
    errors = (FOLDER / "pretrain.stderr.txt").open("w")
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=errors)
    deadline = time.monotonic() + TIME_LIMIT
    try:
        while process.poll() is None:
            lines = read_metrics(RUN / "metrics.jsonl")
            if kill_after is not None and lines and lines[-1]["step"] > kill_after:
                print(f"*** kill -9 at step {lines[-1]['step']} ***", flush=True)
                return
            if time.monotonic() > deadline:
                sys.exit(f"demo: pre-training took more than {TIME_LIMIT} s")
            time.sleep(0.2)
        if process.returncode != 0:
            sys.exit(f"demo: pre-training ended with status {process.returncode}; see {errors.name}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(seconds: float) -> None:
    """One table of what was seen, beside what it must beat."""
    validation = Dataset.open(DATA / "val")
    tokens = validation.images()
    shares = np.bincount(tokens.ravel(), minlength=COLOURS) / tokens.size
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    losses = [line for line in read_metrics(RUN / "metrics.jsonl") if "val_loss" in line]
    probe = json.loads((FOLDER / "probe.json").read_text())
    rows = [
        (f"validation loss, nats a token ({validation.rows} images)", "", ""),
        (f"  after {losses[-1]['step']} steps", f"{losses[-1]['val_loss']:.4f}", ""),
        ("  unigram entropy of the tokens", f"{entropy:.4f}", ""),
        (f"  ln {COLOURS}", f"{math.log(COLOURS):.4f}", ""),
        (f"linear probe, accuracy ({probe['validation_images']} images)", "trained", "untrained"),
    ]
    for trained, untrained in zip(probe["layers"], probe["untrained"], strict=True):
        best = "best layer" if trained["layer"] == probe["best_layer"] else ""
        label = f"  layer {trained['layer']}  {best}".rstrip()
        rows.append((label, f"{trained['accuracy']:.4f}", f"{untrained['accuracy']:.4f}"))
    rows.append(("  raw pixels", f"{probe['pixels']:.4f}", ""))
    title(f"what was seen, in {seconds:.0f} s")
    for name, first, second in rows:
        print(f"{name:<48}{first:>10}{second:>12}".rstrip())
    print("\npictures to look at:")
    for name, what in (
        ("samples.png", "64 digits that the model drew"),
        ("completions.png", "rows: upper half given, four completions, the original"),
        ("probe.png", "probe accuracy by depth"),
    ):
        print(f"  {FOLDER / name!s:<24} {what}")


def title(text: str) -> None:
    """A heading between the commands."""
    print(f"\n--- {text}", flush=True)


if __name__ == "__main__":
    main()
