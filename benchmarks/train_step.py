"""One training step: ours, a bare PyTorch loop over the same network, and Hugging Face's ImageGPT.

    python -m benchmarks.train_step

iGPT-S's width in 6 layers, 8 images of 1 024 tokens, 512 colours, float32, dropout 0; the same weights, tokens, Adam
and rate. A step is forward, backward and update. `ours` is `Engine.train_step` on one rank; `bare` the same module with
cross entropy, backward and torch's AdamW, as one would write it; `hugging face` its eager attention (it supports no
fused one). Each has a process of its own, which keeps the memory that it frees as igpt-ds does (igpt_ds/memory.py), and
they take turns. First all three losses must be equal; the ratios are medians over the rounds, the memory is each
process's peak.

Targets: ours at least 1.5 times as fast as Hugging Face's, at least 0.97 of the bare loop; peak memory at most 0.7 of
Hugging Face's, 0.75 where both recompute activations.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.memory import keep_freed_memory
from igpt_ds.model.transformer import ImageGPT, initialise

WHO = ("ours", "bare", "hugging face")
Step = Callable[[], float]


def configure(arguments: argparse.Namespace, checkpointing: bool) -> Config:
    """The network and the recipe."""
    facts = {
        "model.layers": arguments.layers,
        "data.resolution": arguments.resolution,
        "data.palette_size": 512,
        "training.batch": arguments.batch,
        "training.activation_checkpointing": "full" if checkpointing else "none",
        "training.precision": "float32",
        "training.compile": "false",
    }
    return load_config("s", [f"{key}={value}" for key, value in facts.items()])


def tokens_of(config: Config) -> torch.Tensor:
    """One batch: int64 [B, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.palette_size, (config.training.batch, config.sequence_length), generator=generator)


def ours(config: Config) -> Step:
    """The harness's step on one rank, without ZeRO."""
    from igpt_ds.distributed.engine import Engine

    division = divide_batch(config.training.batch, "auto", 1)
    engine = Engine(config, resolve(load_ds_config("zero0"), config, division), division, Ranks())
    batch = {"tokens": tokens_of(config), "positions": torch.arange(config.training.batch)}
    return lambda: float(engine.train_step([batch], config.training.learning_rate)[0])


def bare(config: Config) -> Step:
    """What anybody would write around the network."""
    model = ImageGPT(config)
    initialise(model, config.seed)
    tokens_BT = tokens_of(config)

    def loss() -> torch.Tensor:
        logits_BTK = model(tokens_BT).logits_BTK
        assert logits_BTK is not None
        return F.cross_entropy(logits_BTK.flatten(0, 1), tokens_BT.flatten())

    return _stepping(model, loss, config)


def hugging_face(config: Config) -> Step:
    """Hugging Face's network with our weights."""
    from tests.helpers.hugging_face import counterpart

    source = ImageGPT(config)
    initialise(source, config.seed)
    model = counterpart(source)
    if config.training.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()
    model.train()
    tokens_BT = tokens_of(config)
    shifted_BT = torch.cat([torch.full_like(tokens_BT[:, :1], config.palette_size), tokens_BT[:, :-1]], dim=1)

    def loss() -> torch.Tensor:
        logits_BTK = model(input_ids=shifted_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTK.flatten(0, 1), tokens_BT.flatten())

    return _stepping(model, loss, config)


def _stepping(model: torch.nn.Module, loss: Callable[[], torch.Tensor], config: Config) -> Step:
    recipe = config.training
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        weight_decay=0.0,
    )

    def step() -> float:
        adam.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        adam.step()
        return found.item()

    return step


MAKERS: dict[str, Callable[[Config], Step]] = dict(zip(WHO, (ours, bare, hugging_face), strict=True))


class Contestant:
    """One of WHO in a process of its own, which steps when it is told to."""

    def __init__(self, who: str, words: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step", "--alone", who, *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """{"loss": nats, "seconds": of the step, "processor": seconds, "peak": bytes of the process so far}."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return dict(json.loads(next(line for line in self._process.stdout if line.startswith("{"))))

    def end(self) -> None:
        """Nobody tells it to step any more."""
        self._process.communicate()


def alone(step: Step) -> None:
    """The contestant's side: a line in, a step, a line out."""
    for _ in sys.stdin:
        begin, processor = time.perf_counter(), time.process_time()
        loss = step()
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"loss": loss, "seconds": seconds, "processor": processor, "peak": peak}), flush=True)
    os._exit(0)


def compare(arguments: argparse.Namespace, checkpointing: bool) -> None:
    """Take turns; print medians and ratios."""
    words = [f"--layers={arguments.layers}", f"--batch={arguments.batch}", f"--resolution={arguments.resolution}"]
    contestants = {who: Contestant(who, words + ["--checkpointing"] * checkpointing) for who in WHO}
    warm = {who: [contestant.step() for _ in range(2)] for who, contestant in contestants.items()}
    losses = {who: [step["loss"] for step in steps] for who, steps in warm.items()}
    for who in WHO:
        np.testing.assert_allclose(losses[who], losses["bare"], rtol=1e-4, err_msg=who)
    found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    for number in range(arguments.rounds):
        for who in WHO[number % 3 :] + WHO[: number % 3]:
            found[who].append(contestants[who].step())
    peaks = {who: steps[-1]["peak"] for who, steps in found.items()}
    for contestant in contestants.values():
        contestant.end()
    print(f"\nactivation checkpointing {'full' if checkpointing else 'none'}, losses {losses['ours']}")
    for who in WHO:
        seconds, processor = (statistics.median(s[what] for s in found[who]) for what in ("seconds", "processor"))
        times = f"{seconds:>8.3f} s a step, {processor:.3f} of processors"
        print(f"  {who:<22}{times}{peaks[who] / 2**20:>8.0f} MiB at the peak")
    for other, target in (("hugging face", 1.5), ("bare", 0.97)):
        pairs = list(zip(found[other], found["ours"], strict=True))
        ratios = [statistics.median(b[what] / a[what] for b, a in pairs) for what in ("seconds", "processor")]
        print(f"  {other + ' / ours':<22}{ratios[0]:>8.3f}, {ratios[1]:.3f} of processors    target at least {target}")
    ratio, most = peaks["ours"] / peaks["hugging face"], 0.75 if checkpointing else 0.7
    print(f"  {'ours / hugging face':<22}{ratio:>8.3f}    of the memory; target at most {most}", flush=True)


def main() -> None:
    """Compare without and with checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help="only with it, not both without and with it")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.alone:
        keep_freed_memory()
        alone(MAKERS[arguments.alone](configure(arguments, arguments.checkpointing)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    for checkpointing in (True,) if arguments.checkpointing else (False, True):
        compare(arguments, checkpointing)


if __name__ == "__main__":
    main()
