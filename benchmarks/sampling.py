"""What drawing images costs. Run by hand: `python -m benchmarks.sampling [--rounds 3]`, with OMP_NUM_THREADS=2.

iGPT-S's width, 6 layers, 32², 8 images, float32, random weights: our sampler, Hugging Face's `generate` with its cache
on the same weights, and an uncached sampler (our network over the whole prefix at every position), in turn. The
targets: at least 8 times the uncached one, at least 1.5 times Hugging Face.

The uncached one is timed at 9 lengths of the prefix, and the time of all 1024 is the trapezoid sum over them. The
floor is the time in which the weights, and the keys and values filled so far, can be read once a step at the bandwidth
measured in the same round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor

from igpt_ds.config.file import load_config
from igpt_ds.model.sampling import Drawing, sample
from igpt_ds.model.transformer import ImageGPT, initialise
from tests.helpers.hugging_face import counterpart

LAYERS, IMAGES, COLOURS = 6, 8, 512


def seconds(action: Callable[[], object]) -> float:
    """One run."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def uncached(model: ImageGPT, tokens_BT: Tensor) -> float:
    """Seconds for all positions without a cache, by the trapezoid sum over some lengths."""
    n = model.sequence_length
    lengths = [1, *range(n // 8, n + 1, n // 8)]
    times = [seconds(partial(model, tokens_BT[:, :length])) for length in lengths]
    pairs = zip(lengths, lengths[1:], times, times[1:], strict=False)
    return sum((b - a) * (s + t) / 2 for a, b, s, t in pairs)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=32)
    options = parser.parse_args()
    facts = [f"model.layers={LAYERS}", f"data.resolution={options.resolution}", f"data.palette_size={COLOURS}"]
    model = ImageGPT(load_config("s", facts)).eval()
    initialise(model, 0)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight, std=0.05)
    theirs = counterpart(model)
    n = model.sequence_length
    nothing, start = torch.empty(IMAGES, 0, dtype=torch.int64), torch.full((IMAGES, 1), COLOURS)
    tokens_BT = sample(model, nothing, Drawing(), title=None)  # warms up, too
    theirs.generate(start, max_new_tokens=8, do_sample=True, top_k=0)
    block = torch.ones(64 << 20)
    weights = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("weight"))
    cache = 2 * LAYERS * IMAGES * model.width * 4 * (n + 1) / 2  # filled by half on average
    columns: dict[str, list[float]] = {"ours": [], "Hugging Face, cached": [], "uncached": [], "floor": []}
    for _ in range(options.rounds):
        bandwidth = block.nbytes / min(seconds(block.sum) for _ in range(5))
        columns["ours"].append(seconds(lambda: sample(model, nothing, Drawing(), title=None)))
        columns["Hugging Face, cached"].append(
            seconds(lambda: theirs.generate(start, max_new_tokens=n, do_sample=True, top_k=0))
        )
        columns["uncached"].append(uncached(model, tokens_BT))
        columns["floor"].append(n * (weights + cache) / bandwidth)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads; {LAYERS} layers of {model.width}, {IMAGES} images of {n} tokens")
    print(f"a step reads {weights / 1e6:.0f} MB of weights and on average {cache / 1e6:.0f} MB of keys and values")
    print(f"{'median of ' + str(options.rounds):<22} {'seconds':>9} {'tokens/s':>9} {'to ours':>9}   ratio by round")
    for name, times in columns.items():
        ratios = [taken / ours for taken, ours in zip(times, columns["ours"], strict=True)]
        middle = statistics.median(times)
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:<22} {middle:>9.1f} {IMAGES * n / middle:>9.0f} {statistics.median(ratios):>9.2f}   {each}")


if __name__ == "__main__":
    main()
