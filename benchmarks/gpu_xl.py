"""How near one GPU comes to its peak: `python -m benchmarks.gpu_xl [--preset xl] [--preset l] ...`.

iGPT-XL (6.8 billion parameters, 64 x 64 tokens) in bfloat16 under ZeRO-3 on one GPU, as the harness trains it, over
micro-batches x activation checkpointing x torch.compile. One engine serves the whole sweep: the batch that it is fed,
what its blocks keep and whether they are compiled are changed between measurements. For each it prints seconds a step,
model TFLOP/s, MFU by both conventions (attention's products counted half, as the causal mask leaves them, and in full,
as most papers count them), and the peak of memory beside the plan's. Recomputation is never counted as work. The
profiler is asked for fused attention and fused Adam, and their absence is an error.

Then a bare loop at the best setting, in a process of its own as the sweep was: the same network, bfloat16 weights,
float32 master weights and moments, torch's fused AdamW block by block. Targets: at least 55 % MFU (full attention;
57.8 % is the best published for a model of this size on one H200), and the harness at least 0.97 of the bare loop.

On a CPU it rehearses itself: `python -m benchmarks.gpu_xl --preset tiny --micro-batch 2`.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels import require_fused
from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config, replace
from igpt_ds.config.size import flops_per_image, parameter_count
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.planner.devices import peak_flops
from igpt_ds.planner.layout import lay_out
from igpt_ds.planner.memory import bytes_per_rank

MICRO_BATCHES = {"xl": (1, 2, 4, 8), "l": (4, 8, 16), "m": (16, 32, 64), "s": (64, 128)}
RESOLUTIONS = {"xl": 64, "l": 32, "m": 32, "s": 32}
WARM_UP, STEPS = 2, 5
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    micro_batch: int
    checkpointing: str
    compiled: bool


@dataclass(frozen=True)
class Measured:
    """What one setting gave: seconds a step, peak bytes."""

    setting: Setting
    seconds: float
    peak: int


def configure(preset: str, micro_batch: int) -> Config:
    """The preset in bfloat16, one micro-batch a step."""
    facts = [
        f"data.resolution={RESOLUTIONS.get(preset, 8)}",
        "data.palette_size=512",
        "training.precision=bfloat16",
        f"training.batch={micro_batch}",
    ]
    return load_config(preset, facts)


def random_batch(config: Config, images: int) -> dict[str, Tensor]:
    """Tokens and positions of one micro-batch."""
    tokens_BT = torch.randint(0, config.palette_size, (images, config.sequence_length))
    batch = {"tokens": tokens_BT, "positions": torch.arange(images)}
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if CUDA else batch


def seconds_a_step(step: Callable[[], object]) -> tuple[float, int]:
    """Median over `STEPS`, after `WARM_UP`; and the peak of allocated memory, bytes (0 on a CPU)."""
    for _ in range(WARM_UP):
        step()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found), torch.cuda.max_memory_allocated() if CUDA else 0


def sweep(preset: str, micro_batches: list[int]) -> list[Measured]:
    """Measure the harness's step at every setting; one that does not fit is told and left out."""
    from igpt_ds.distributed.device import missing_to_compile
    from igpt_ds.distributed.engine import Engine

    config = configure(preset, micro_batches[0])
    division = divide_batch(config.training.batch, "auto", 1)
    begin = time.perf_counter()
    engine = Engine(config, resolve(load_ds_config("zero3"), config, division), division, Ranks())
    print(f"{preset}: {parameter_count(config):,} parameters, built in {time.perf_counter() - begin:.0f} s")
    model, found = engine.module, list[Measured]()
    eager = [block.forward for block in model.blocks]
    rate = config.training.learning_rate
    missing = missing_to_compile()
    if missing:
        print(f"  compiled: left out, {' and '.join(missing)} not found")
    for compiled in (False,) if missing else (False, True):
        if compiled:
            model.compile_blocks()
        for checkpointing in ("full", "selective"):
            model.checkpointing = checkpointing
            for micro_batch in micro_batches:
                setting = Setting(micro_batch, checkpointing, compiled)
                if CUDA and planned_bytes(config, setting) > 0.98 * torch.cuda.get_device_properties(0).total_memory:
                    print(f"  {setting}: {planned_bytes(config, setting) / 2**30:.1f} GiB are planned, left out")
                    continue
                step = partial(engine.train_step, [random_batch(config, micro_batch)], rate)
                try:
                    if not found:
                        print(f"  in use: {require_fused(step)}")
                    seconds, peak = seconds_a_step(step)
                except torch.cuda.OutOfMemoryError:
                    # In the middle of ZeRO-3's gathering, which cannot be taken up again.
                    print(f"  {setting}: out of memory, the sweep ends here")
                    return found
                found.append(Measured(setting, seconds, peak))
                tell(config, found[-1])
    for block, forward in zip(model.blocks, eager, strict=True):
        block.forward = forward
    engine.close()
    return found


def planned_bytes(config: Config, setting: Setting) -> int:
    """What the planner says that a setting takes at its peak."""
    planned = replace(config, "training", activation_checkpointing=setting.checkpointing, batch=setting.micro_batch)
    return bytes_per_rank(lay_out(planned, "zero3", nodes=1, ranks_per_node=1), gpu=CUDA).total


def tell(config: Config, measured: Measured) -> None:
    """One line of the table."""
    setting, device = measured.setting, torch.cuda.get_device_name() if CUDA else "cpu"
    full = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name="masked_pixel"))
    causal_rate, full_rate = (flops_per_image(c) * setting.micro_batch / measured.seconds for c in (config, full))
    peak = peak_flops(device)
    shares = f"{causal_rate / peak:>8.1%}{full_rate / peak:>8.1%}" if peak else f"{'-':>8}{'-':>8}"
    how = "compiled" if setting.compiled else "eager"
    print(
        f"  micro-batch {setting.micro_batch:>3}  {setting.checkpointing:<9}  {how:<8}"
        f"{measured.seconds:>9.3f} s{full_rate / 1e12:>8.1f} TFLOP/s  MFU causal, full{shares}"
        f"  peak {measured.peak / 2**30:6.1f} GiB of {planned_bytes(config, setting) / 2**30:.1f} planned",
        flush=True,
    )


def bare(preset: str, setting: Setting) -> float:
    """Seconds a step of a loop without DeepSpeed; each block's update follows the whole backward pass."""
    config = replace(configure(preset, setting.micro_batch), "training", activation_checkpointing=setting.checkpointing)
    device = torch.device("cuda" if CUDA else "cpu")
    with torch.device(device):
        model = ImageGPT(config).to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if setting.compiled:
        model.compile_blocks()
    groups = [list(block.parameters()) for block in model.blocks]
    inside = {id(p) for group in groups for p in group}
    groups.append([p for p in model.parameters() if id(p) not in inside])
    masters = [[p.detach().float() for p in group] for group in groups]
    recipe = config.training
    adams = [
        torch.optim.AdamW(
            group, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=CUDA
        )
        for group in masters
    ]
    batch = random_batch(config, setting.micro_batch)

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

    return seconds_a_step(step)[0]


def alone(part: str, **facts: Any) -> dict[str, Any]:
    """What a part found, run in a process of its own: the next is to find the device's memory free."""
    command = [sys.executable, "-m", "benchmarks.gpu_xl", "--part", part, "--facts", json.dumps(facts)]
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
            else:
                print(line, end="", flush=True)
    if process.returncode or not found:
        raise SystemExit(f"{part} ended with status {process.returncode}")
    return found


def best_of(preset: str, micro_batches: list[int]) -> dict[str, Any]:
    """The sweep's setting with the most images a second, and its seconds a step."""
    best = min(sweep(preset, micro_batches), key=lambda m: m.seconds / m.setting.micro_batch)
    return {"setting": dataclasses.asdict(best.setting), "seconds": best.seconds}


def bare_at(preset: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The bare loop's seconds a step."""
    return {"seconds": bare(preset, Setting(**setting))}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"sweep": best_of, "bare": bare_at}


def main() -> None:
    """Sweep each preset, then compare its best setting with the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="xl (the default), l, m, s; several are run in turn")
    parser.add_argument("--micro-batch", action="append", type=int, help="instead of the preset's own list")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--facts", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](**arguments.facts)), flush=True)
        os._exit(0)  # DeepSpeed's threads need seconds to wind up
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU: a rehearsal'}", flush=True)
    for preset in arguments.preset or ["xl"]:
        micro_batches = arguments.micro_batch or list(MICRO_BATCHES.get(preset, (2,)))
        best = alone("sweep", preset=preset, micro_batches=micro_batches)
        seconds = alone("bare", preset=preset, setting=best["setting"])["seconds"]
        ratio = f"bare / ours {seconds / best['seconds']:.3f}    target at least 0.97"
        print(f"  best: {best['setting']}; bare loop {seconds:.3f} s; {ratio}", flush=True)


if __name__ == "__main__":
    main()
