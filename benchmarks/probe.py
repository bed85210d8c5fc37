"""What the features and the linear probe cost. Run by hand: `python -m benchmarks.probe [--share LAYERS]`.

Features: of all layers in one pass against one plain forward pass of the same network in turn, medians of ratios. The
target is a ratio of at most 1.1. The width is iGPT-S's, the layers fewer where there is no GPU.

Probe: logistic regression on synthetic features, 512 wide, of 50 000 images in 10 classes, at one strength of
regularisation; a share of the 49 layers is fitted, and the time of all extrapolated from it. The features lie in a
memory map, as after an extraction.

SGD: a bank of heads for 25 layers and 3 rates, trained in one pass, against one head alone, in turn, medians of ratios;
of 10 classes and of 1 000. What is counted is a batch: the heads begin and end alike.
"""

import argparse
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from igpt_ds.config.file import load_config
from igpt_ds.features import classifier, classifier_sgd
from igpt_ds.features.classifier import Rows
from igpt_ds.model.transformer import ImageGPT, initialise

CUDA = torch.cuda.is_available()
LAYERS, WIDTH, IMAGES, CLASSES = 49, 512, 50_000, 10
BANK, RATES = 25, (10.0, 3.0, 1.0)


def seconds(action: Callable[[], object]) -> float:
    """One run, to the end of the device's work; on a CPU its processors' time, which other load moves less."""
    clock = time.perf_counter if CUDA else time.process_time
    begin = clock()
    action()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - begin


@torch.no_grad()
def features(repeats: int) -> None:
    """Print the ratio. The two are timed in turn, so that other load on the machine strikes both alike."""
    layers, batch = (24, 64) if CUDA else (4, 2)
    facts = [f"model.layers={layers}", "data.resolution=32", "data.palette_size=512"]
    model = ImageGPT(config := load_config("s", facts))
    initialise(model, 0)
    model = model.eval().to("cuda" if CUDA else "cpu")
    tokens_BT = torch.randint(512, (batch, config.sequence_length), device=model.token_embedding.device)
    wanted = range(layers + 1)
    ways: dict[str, Callable[[], object]] = {
        "plain forward pass": lambda: model(tokens_BT),
        "features of the last layer, no logits": lambda: model(tokens_BT, features=[layers], logits=False),
        "features of all layers": lambda: [
            f.cpu() for f in model(tokens_BT, features=wanted, logits=False).features.values()
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, action in ways.items():
            taken = seconds(action)
            if number:  # the first warms up
                times[name].append(taken)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{layers} layers of 512, {batch} images of 32², float32, {device}, medians of {repeats} rounds")
    print(f"{'':<36} {'seconds':>9} {'to plain':>9} {'std':>7}")
    for name, each in times.items():
        # Within a round the load on the machine changes least.
        ratios = [taken / base for taken, base in zip(each, times["plain forward pass"], strict=True)]
        middle = statistics.median(ratios)
        print(f"{name:<36} {statistics.median(each):>9.4f} {middle:>9.3f} {statistics.stdev(ratios):>7.3f}")


def probe(share: int, strength: float) -> None:
    """Print time and memory. Classes are clouds that overlap, so that the optimum is not at infinity."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, IMAGES)
    centres = generator.normal(size=(CLASSES, WIDTH)) * 0.12
    mixing = generator.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5  # features are correlated, as real ones are
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(share, IMAGES, WIDTH))
        for layer in range(share):
            for first in range(0, IMAGES, 1000):  # the peak of memory is to be the classifier's
                here = labels[first : first + 1000]
                stored[layer, first : first + 1000] = (
                    centres[here] + generator.normal(size=(len(here), WIDTH))
                ) @ mixing
        before = peak()
        times, accuracies, converged = [], [], True
        for layer in range(share):
            rows = Rows([(stored[layer],)], labels)
            begin = time.perf_counter()
            found = next(classifier.fit(rows, (strength,)))
            times.append(time.perf_counter() - begin)
            accuracies.append(found.accuracy(rows))
            converged = converged and found.converged
    mean = statistics.mean(times)
    print(
        f"\nlogistic regression, {IMAGES:,} images of {WIDTH} features, {CLASSES} classes, regularisation {strength:g}"
    )
    print(f"fitted              {share} of {LAYERS} layers, converged: {converged}")
    print(f"training accuracy   {statistics.mean(accuracies):.4f} (n = {IMAGES:,} images)")
    print(f"a layer             {mean:.1f} s" + (f" ± {statistics.stdev(times):.1f} (std)" if share > 1 else ""))
    print(f"{LAYERS} layers           {mean * LAYERS / 60:.1f} min, extrapolated")
    print(f"memory              {peak() - before:.2f} GiB above the features' own pages; peak {peak():.2f} GiB")
    if CUDA:
        print(f"memory of the GPU   {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def sgd(repeats: int, dtype: str) -> None:
    """Print what a batch of the bank costs, and what one of a single head does."""
    generator = np.random.default_rng(0)
    images = 8192  # a pool
    print(f"\nSGD, {BANK} layers of {WIDTH} and {len(RATES)} rates, batches of 128, features in {dtype}")
    print(f"{'':<14} {'one head, ms':>13} {'bank, ms':>10} {'to one':>8} {'to all one by one':>18}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(BANK, images, WIDTH))
        for layer in range(BANK):
            stored[layer] = generator.normal(size=(images, WIDTH))
        for classes, batches in ((10, 256), (1000, 256 if CUDA else 8)):
            labels = generator.integers(0, classes, images)
            groups = [Rows([(layer,)], labels) for layer in stored]
            one, bank = (
                functools.partial(classifier_sgd.fit, some, classes, rates, batches, 0, "")
                for some, rates in ((groups[:1], RATES[:1]), (groups, RATES))
            )
            times = [(seconds(one) / batches, seconds(bank) / batches) for _ in range(repeats + 1)][1:]
            ratio = statistics.median(many / single for single, many in times)
            single, many = (1000 * statistics.median(each) for each in zip(*times, strict=True))
            heads = BANK * len(RATES)
            print(f"{classes:>5} classes {single:>14.2f} {many:>10.2f} {ratio:>8.2f} {ratio / heads:>18.3f}")


def peak() -> float:
    """The most memory that this process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=int, default=LAYERS if CUDA else 3, help="layers that are fitted")
    parser.add_argument("--repeats", type=int, default=9, help="of each forward pass")
    parser.add_argument("--regularisation", type=float, default=1.0)
    parser.add_argument("--only", choices=["features", "lbfgs", "sgd"], help="one of the three")
    arguments = parser.parse_args()
    if arguments.only in (None, "features"):
        features(arguments.repeats)
    if arguments.only in (None, "lbfgs"):
        probe(arguments.share, arguments.regularisation)
    if arguments.only in (None, "sgd"):
        for dtype in ("float32", "float16"):
            sgd(arguments.repeats, dtype)


if __name__ == "__main__":
    main()
