"""iGPT-S, M and L on one card: the harness as the machine decides it, against a bare loop.

    python -m benchmarks.gpu_one [--preset s] ...

Ours is `Engine.train_step` with what the planner decides for the card: precision, ZeRO stage, micro-batch,
recomputation, compiled blocks. The bare loop is what one would write in an afternoon: the same network in plain
modules, float32 weights under autocast to bfloat16 (where the card has it), torch's fused attention, the whole network
through torch.compile, torch's fused AdamW. Same shapes, weights, images, rate and micro-batch (or the largest that fits
the bare loop); each in a process of its own, in turns. The losses of the first steps must agree.

Target: the harness at least 0.97 of the bare loop. On a CPU it rehearses itself: `--preset tiny`.
"""

import argparse
import contextlib
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu
from igpt_ds.config.batch import divide_batch, divisors
from igpt_ds.config.deepspeed import resolve
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.planner.choose import Decision, decide

ROUNDS = 2
STEPS_COMPARED = 3


def decided(preset: str) -> Decision:
    """What the machine decides."""
    return decide(gpu.configure(preset), None, gpu.here())


def batches_of(config: Config, micro_batch: int) -> list[dict[str, Tensor]]:
    """The images of a step, in micro-batches."""
    torch.manual_seed(0)
    whole = gpu.random_batch(config, config.training.batch)
    parts = {name: tensor.split(micro_batch) for name, tensor in whole.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(parts["tokens"]))]


def ours(preset: str) -> dict[str, Any]:
    """Seconds a step of the harness, the first losses, and its micro-batch."""
    from igpt_ds.distributed.engine import Engine

    decision = decided(preset)
    config = decision.config
    division = divide_batch(config.training.batch, config.training.micro_batch, 1)
    engine = Engine(config, resolve(decision.ds, config, division), division, Ranks())
    batches, rate = batches_of(config, division.micro_batch), config.training.learning_rate
    losses = [float(engine.train_step(batches, rate)[0]) for _ in range(STEPS_COMPARED)]
    kernels = gpu.require_fused(lambda: engine.train_step(batches, rate), engine)
    print(f"  {decision.line}\n  {kernels}")
    seconds, _ = gpu.seconds_a_step(lambda: engine.train_step(batches, rate))
    return {"seconds": seconds, "losses": losses, "micro_batch": division.micro_batch}


class Layer(nn.Module):
    """A block as one would write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm_attention(h)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(y.transpose(1, 2).reshape(B, T, D))
        u = self.up(self.norm_mlp(h))
        return h + self.down(u * torch.sigmoid(1.702 * u))


class Plain(nn.Module):
    """The network as one would write it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, shape = config.model.width, config.model
        self.token_embedding = nn.Parameter(torch.empty(config.palette_size, width))
        self.start = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(config.sequence_length, width))
        self.blocks = nn.ModuleList(Layer(width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.palette_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> their mean loss, nats."""
        x = F.embedding(tokens, self.token_embedding)
        h = torch.cat([self.start.expand(len(x), 1, -1), x[:, :-1]], dim=1) + self.position_embedding
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), tokens.flatten())


def plain_network(config: Config) -> Plain:
    """It, with the weights that the harness begins with."""
    source = ImageGPT(config)
    initialise(source, config.seed)
    names = ((name.replace(".attention.", ".").replace(".mlp.", "."), p) for name, p in source.named_parameters())
    model = Plain(config)
    model.load_state_dict({name.replace("gain", "weight"): p for name, p in names})
    return model


def bare(preset: str, micro_batch: int) -> dict[str, Any]:
    """Seconds a step of the bare loop, the first losses, and its micro-batch."""
    config = decided(preset).config
    for fewer in [size for size in divisors(config.training.batch) if size <= micro_batch][::-1]:
        try:
            return bare_loop(config, fewer) | {"micro_batch": fewer}
        except torch.cuda.OutOfMemoryError:
            print(f"  bare loop: {fewer} images at once do not fit")
        torch.cuda.empty_cache()
    raise SystemExit("the bare loop does not fit with one image")


def bare_loop(config: Config, micro_batch: int) -> dict[str, Any]:
    """As `bare`, with so many images at once."""
    device, recipe = torch.device("cuda" if gpu.CUDA else "cpu"), config.training
    model = plain_network(config).to(device)
    run = torch.compile(model) if gpu.here().compiles else model
    betas = (recipe.beta1, recipe.beta2)
    adam = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, weight_decay=0.0, fused=gpu.CUDA
    )
    lower = torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bfloat16" else contextlib.nullcontext()
    batches = batches_of(config, micro_batch)

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for batch in batches:
            with lower:
                loss = run(batch["tokens"].to(device, non_blocking=True)) / len(batches)
            loss.backward()
            total += loss.detach()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return total

    losses = [float(step()) for _ in range(STEPS_COMPARED)]
    return {"seconds": gpu.seconds_a_step(step)[0], "losses": losses}


def compare(preset: str) -> None:
    """Take turns; the ratio of the medians."""
    print(f"{preset}:", flush=True)
    best = {"ours": float("inf"), "bare": float("inf")}
    for number in range(ROUNDS):
        mine = gpu.alone("benchmarks.gpu_one", "ours", preset=preset)
        theirs = gpu.alone("benchmarks.gpu_one", "bare", preset=preset, micro_batch=mine["micro_batch"])
        for a, b in zip(mine["losses"], theirs["losses"], strict=True):
            assert abs(a - b) < 0.02 * b, f"losses {mine['losses']} and {theirs['losses']}: not the same training"
        best = {"ours": min(best["ours"], mine["seconds"]), "bare": min(best["bare"], theirs["seconds"])}
        print(f"  round {number + 1}: ours {mine['seconds']:.3f} s, bare {theirs['seconds']:.3f} s a step", flush=True)
    config = gpu.configure(preset)
    for who, seconds in best.items():
        print(f"  {who:<5}{gpu.rates(config, config.training.batch, seconds)}")
    print(f"  bare / ours {best['bare'] / best['ours']:.3f}    target at least 0.97", flush=True)


PARTS: dict[str, gpu.Part] = {"ours": ours, "bare": bare}


def main() -> None:
    """Compare each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="s, m, l; all three if none is named")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--facts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not gpu.CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    if arguments.part:
        gpu.answer(PARTS[arguments.part], arguments.facts)
    print(f"torch {torch.__version__}, {gpu.name_of_device()}", flush=True)
    for preset in arguments.preset or ["s", "m", "l"]:
        compare(preset)


if __name__ == "__main__":
    main()
