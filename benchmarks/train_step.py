"""One training step: ours, a bare PyTorch loop over the same network, and Hugging Face's ImageGPT.

    python -m benchmarks.train_step [time] [memory]

iGPT-S's width in 6 layers, 8 images of 1 024 tokens, 512 colours, float32, dropout 0; the same weights, tokens, Adam
and rate. A step is forward, backward and update. `ours` is `Engine.train_step` on one rank; `bare` the same module with
cross entropy, backward and torch's AdamW; `hugging face` its eager attention (it supports no fused one). First all
three losses must be equal; then they take turns in one process, and the ratios are medians over the rounds.

`memory` runs each alone in a process of its own, two steps, and reports the process's peak.

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

from igpt_ds.config import Config, load_config
from igpt_ds.ds_config import divide_batch, load_ds_config, resolve
from igpt_ds.model import ImageGPT, initialise
from igpt_ds.place import Place

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
    }
    return load_config("s", [f"{key}={value}" for key, value in facts.items()])


def tokens_of(config: Config) -> torch.Tensor:
    """One batch: int64 [B, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.palette_size, (config.training.batch, config.sequence_length), generator=generator)


def ours(config: Config) -> Step:
    """The harness's step on one rank, without ZeRO."""
    from igpt_ds.engine import Engine

    division = divide_batch(config.training.batch, None, 1)
    engine = Engine(config, resolve(load_ds_config("zero0"), config, division), division, Place(0, 1, 0))
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
    from tests.hugging_face import counterpart

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


def measure_time(arguments: argparse.Namespace) -> None:
    """Alternate; print medians and ratios."""
    for checkpointing in (False, True):
        config = configure(arguments, checkpointing)
        steps = {who: MAKERS[who](config) for who in WHO}
        losses = {who: [step() for _ in range(2)] for who, step in steps.items()}  # warms up as well
        for who in WHO:
            np.testing.assert_allclose(losses[who], losses["bare"], rtol=1e-4, err_msg=who)
        seconds: dict[str, list[float]] = {who: [] for who in WHO}
        for number in range(arguments.rounds):
            for who in WHO[number % 3 :] + WHO[: number % 3]:
                begin = time.perf_counter()
                steps[who]()
                seconds[who].append(time.perf_counter() - begin)
        print(f"\nactivation checkpointing {'full' if checkpointing else 'none'}, losses {losses['ours']}")
        for who in WHO:
            print(f"  {who:<14}{statistics.median(seconds[who]):>8.3f} s a step")
        for other, target in (("hugging face", 1.5), ("bare", 0.97)):
            ratios = [theirs / mine for theirs, mine in zip(seconds[other], seconds["ours"], strict=True)]
            print(f"  {other} / ours{statistics.median(ratios):>8.3f}    target at least {target}")


def measure_memory(arguments: argparse.Namespace) -> None:
    """Peak of a process that does nothing else, by who and checkpointing."""
    print(f"\n{'peak memory, MiB':<24}{'none':>10}{'full':>10}")
    peaks: dict[str, list[float]] = {}
    for who in WHO:
        peaks[who] = []
        for checkpointing in (False, True):
            words = ["--alone", who, "--layers", arguments.layers, "--batch", arguments.batch]
            words += ["--resolution", arguments.resolution, *(["--checkpointing"] if checkpointing else [])]
            command = [sys.executable, "-m", "benchmarks.train_step", *map(str, words)]
            peaks[who].append(json.loads(subprocess.check_output(command).splitlines()[-1])["peak"] / 2**20)
        print(f"  {who:<22}{peaks[who][0]:>10.0f}{peaks[who][1]:>10.0f}")
    ratios = [mine / theirs for mine, theirs in zip(peaks["ours"], peaks["hugging face"], strict=True)]
    print(f"  {'ours / hugging face':<22}{ratios[0]:>10.3f}{ratios[1]:>10.3f}    targets at most 0.7 and 0.75")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["time", "memory", []], help="default: both")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.alone:
        step = MAKERS[arguments.alone](configure(arguments, arguments.checkpointing))
        step(), step()
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)
        os._exit(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    # Memory first: an engine here would leave its rank and port to the processes that are measured.
    for what, act in {"memory": measure_memory, "time": measure_time}.items():
        if not arguments.what or what in arguments.what:
            act(arguments)


if __name__ == "__main__":
    main()
