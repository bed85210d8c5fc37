"""How near one GPU comes to its peak: `python -m benchmarks.gpu_xl [--preset xl] [--preset l] ...`.

iGPT-XL (6.8 billion parameters, 64 x 64 tokens) as the harness trains it on one GPU, over micro-batches x activation
checkpointing, compiled and not. The planner is asked first: what does not fit the card is left out and named, and on a
card too small for iGPT-XL (its states alone are 114 GiB) L, M and S are measured, and one rank of 64 of iGPT-XL is
rehearsed. One engine serves the sweep of a preset, with the DeepSpeed configuration that the planner chooses: the batch
that it is fed, what its blocks keep and whether they are compiled are changed between measurements. For each it prints
seconds a step, model TFLOP/s, MFU by both conventions (attention's products counted half, as the causal mask leaves
them, and in full, as most papers count them), and the peak of memory beside the plan's. Recomputation and embeddings
are never counted as work. The profiler is asked for fused attention and fused Adam; their absence is an error.

Then a bare loop at the best setting, in a process of its own as the sweep was: the same network, bfloat16 weights,
float32 master weights and moments, torch's fused AdamW block by block. Goals: at least 60 % MFU on an H200, attention
counted in full (the best published there for a model of this size is 54.5 % in this convention), and the harness at
least 0.97 of the bare loop.

On a CPU it rehearses itself: `python -m benchmarks.gpu_xl --preset tiny --micro-batch 2`.
"""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import gpu
from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import resolve
from igpt_ds.config.schema import Config, replace
from igpt_ds.config.size import parameter_count
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.planner.choose import Decision, decide
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import bytes_per_rank

MICRO_BATCHES = {"xl": (1, 2, 4), "l": (4, 8, 16), "m": (8, 16, 32), "s": (32, 64, 128)}
SMALLER = ("l", "m", "s")
KEPT = ("none", "1/8", "1/4", "1/2", "selective", "full")  # from the least recomputation to the most
USABLE = 0.95  # of the free memory, by plan
REHEARSAL = "rehearse xl --nodes 8 --gpus-per-node 8 --set data.resolution=64 --set data.palette_size=512"


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    micro_batch: int
    checkpointing: str
    compiled: bool


def decided(preset: str) -> Decision:
    """What the planner chooses for this card."""
    return decide(gpu.configure(preset), None, gpu.here())


def with_setting(config: Config, setting: Setting) -> Config:
    """The configuration of one point: a step is one micro-batch."""
    kept, images = setting.checkpointing, setting.micro_batch
    return replace(
        config,
        "training",
        activation_checkpointing=kept,
        compile=setting.compiled,
        batch=images,
        micro_batch=images,
    )


def planned_bytes(decision: Decision, setting: Setting) -> int:
    """What the planner says that a setting takes at its peak."""
    config = with_setting(decision.config, setting)
    division = divide_batch(config.training.batch, "auto", 1)
    zero = resolve(decision.ds, config, division)["zero_optimization"]
    return bytes_per_rank(Layout(config, zero, division, 1), gpu=gpu.CUDA).total


def settings_that_fit(decision: Decision, micro_batches: Sequence[int]) -> list[Setting]:
    """Of each micro-batch the least recomputation that fits, selective and full; the least memory first.

    Eager blocks are measured with the smallest micro-batch.
    """
    machine = gpu.here()
    found: dict[Setting, int] = {}
    for micro_batch in micro_batches:
        for compiled in (False, True) if micro_batch == micro_batches[0] else (True,):
            sizes = {kept: planned_bytes(decision, Setting(micro_batch, kept, compiled)) for kept in KEPT}
            fitting = [kept for kept in KEPT if sizes[kept] <= USABLE * machine.memory]
            for kept in fitting[:1] + [kept for kept in fitting[1:] if kept in ("selective", "full")]:
                if machine.compiles or not compiled:
                    found[Setting(micro_batch, kept, compiled)] = sizes[kept]
            if not fitting:
                gib = min(sizes.values()) / 2**30
                print(f"  micro-batch {micro_batch}: at least {gib:.1f} GiB are planned, left out")
    # Blocks are compiled once, and stay it.
    return sorted(found, key=lambda setting: (setting.compiled, found[setting]))


def sweep(preset: str, micro_batches: list[int]) -> dict[str, Any]:
    """The setting with the most images a second, and its seconds a step; None: none fits."""
    from igpt_ds.distributed.engine import Engine

    try:
        decision = decided(preset)
    except UserError as fault:
        print(f"  {fault}: left out")
        return {"setting": None}
    print(f"  by plan: {decision.line}")
    settings = settings_that_fit(decision, micro_batches)
    if not settings:
        return {"setting": None}
    config = with_setting(decision.config, settings[0])
    division = divide_batch(config.training.batch, "auto", 1)
    begin = time.perf_counter()
    engine = Engine(config, resolve(decision.ds, config, division), division, Ranks())
    count = parameter_count(config)
    print(f"  {count:,} parameters, {decision.ds_name}, built in {time.perf_counter() - begin:.0f} s", flush=True)
    model, best = engine.module, (0.0, 0.0, settings[0])
    compiled = settings[0].compiled
    for setting in settings:
        if setting.compiled and not compiled:
            model.compile_blocks()
            compiled = True
        model.checkpointing = setting.checkpointing
        step = partial(
            engine.train_step, [gpu.random_batch(config, setting.micro_batch)], config.training.learning_rate
        )
        try:
            if setting == settings[0]:
                print(f"  {gpu.require_fused(step, engine)}")
            seconds, peak = gpu.seconds_a_step(step)
        except torch.cuda.OutOfMemoryError:
            # In the middle of ZeRO-3's gathering, which cannot be taken up again; those that follow need more.
            print(f"  {setting}: out of memory, the sweep ends here")
            break
        tell(config, setting, seconds, peak, planned_bytes(decision, setting))
        best = max(best, (setting.micro_batch / seconds, seconds, setting), key=lambda found: found[0])
    rate, seconds, setting = best
    return {"setting": dataclasses.asdict(setting) if rate else None, "seconds": seconds}


def tell(config: Config, setting: Setting, seconds: float, peak: int, planned: int) -> None:
    """One line of the table."""
    how = "compiled" if setting.compiled else "eager"
    print(
        f"  micro-batch {setting.micro_batch:>3}  {setting.checkpointing:<9}  {how:<8}{seconds:>9.3f} s"
        f"{gpu.rates(config, setting.micro_batch, seconds)}"
        f"  peak {peak / 2**30:6.1f} GiB of {planned / 2**30:.1f} planned",
        flush=True,
    )


def bare(preset: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step of a loop without DeepSpeed; each block's update follows the whole backward pass."""
    config = with_setting(decided(preset).config, Setting(**setting))
    recipe, device = config.training, torch.device("cuda" if gpu.CUDA else "cpu")
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    with torch.device(device):
        model = ImageGPT(config).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.choose_attention()
    if recipe.compile:
        model.compile_blocks()
    groups = [list(block.parameters()) for block in model.blocks]
    inside = {id(p) for group in groups for p in group}
    groups.append([p for p in model.parameters() if id(p) not in inside])
    masters = [[p.detach().float() for p in group] for group in groups]
    betas = (recipe.beta1, recipe.beta2)
    adams = [
        torch.optim.AdamW(group, lr=recipe.learning_rate, betas=betas, weight_decay=0.0, fused=gpu.CUDA)
        for group in masters
    ]
    batch = gpu.random_batch(config, recipe.batch)

    def step() -> None:
        tokens_BT = batch["tokens"].to(device, non_blocking=True)
        logits_BTK = model(tokens_BT).logits_BTK
        assert logits_BTK is not None
        F.cross_entropy(logits_BTK.float().flatten(0, 1), tokens_BT.flatten()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for group in groups for p in group if p.grad is not None])
        assert torch.isfinite(norm)
        for group, master, adam in zip(groups, masters, adams, strict=True):
            for p, m in zip(group, master, strict=True):
                m.grad, p.grad = p.grad.float() if p.grad is not None else None, None
            adam.step()
            adam.zero_grad(set_to_none=True)
            torch._foreach_copy_([p.data for p in group], master)

    return {"seconds": gpu.seconds_a_step(step)[0]}


PARTS: dict[str, gpu.Part] = {"sweep": sweep, "bare": bare}


def measure(preset: str, micro_batches: list[int]) -> bool:
    """Sweep a preset, then compare its best setting with the bare loop; whether any setting fitted."""
    print(f"{preset}:", flush=True)
    best = gpu.alone("benchmarks.gpu_xl", "sweep", preset=preset, micro_batches=micro_batches)
    if best["setting"] is None:
        print("  nothing measured", flush=True)
        return False
    seconds = gpu.alone("benchmarks.gpu_xl", "bare", preset=preset, setting=best["setting"])["seconds"]
    ratio = f"bare / ours {seconds / best['seconds']:.3f}    target at least 0.97"
    print(f"  best: {best['setting']}; bare loop {seconds:.3f} s; {ratio}", flush=True)
    return True


def main() -> None:
    """Measure what fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="xl (the default), l, m, s; several are run in turn")
    parser.add_argument("--micro-batch", action="append", type=int, help="instead of the preset's own list")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--facts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not gpu.CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    if arguments.part:
        gpu.answer(PARTS[arguments.part], arguments.facts)
    print(f"torch {torch.__version__}, {gpu.name_of_device()}", flush=True)

    def of(preset: str) -> bool:
        return measure(preset, arguments.micro_batch or list(MICRO_BATCHES.get(preset, (2,))))

    fitted = [of(preset) for preset in arguments.preset or ["xl"]]
    if gpu.CUDA and arguments.preset is None and not fitted[0]:
        for preset in SMALLER:
            of(preset)
        print("one rank of 64 of iGPT-XL:", flush=True)
        subprocess.run([sys.executable, "-m", "igpt_ds", *shlex.split(REHEARSAL)], check=True)


if __name__ == "__main__":
    main()
