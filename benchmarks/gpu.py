"""What the benchmarks of a GPU share: this machine for the planner, a timed step, its rates, and the kernels that ran.

Without a GPU all of it works on the CPU, so that the benchmarks can be rehearsed.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.config.size import flops_per_image
from igpt_ds.distributed.device import at_hand
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.planner.choose import Here
from igpt_ds.planner.devices import peak_flops

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine

CUDA = torch.cuda.is_available()
WARM_UP, STEPS = 3, 7
RESOLUTIONS = {"xl": 64, "l": 32, "m": 32, "s": 32}


def here() -> Here:
    """This machine, one rank on it."""
    return at_hand(Ranks())


def name_of_device() -> str:
    """As its driver calls it."""
    return torch.cuda.get_device_name() if CUDA else "CPU: a rehearsal"


def configure(preset: str) -> Config:
    """A preset on random images of the paper's size; other presets than the paper's on images of 8 x 8."""
    return load_config(preset, [f"data.resolution={RESOLUTIONS.get(preset, 8)}", "data.palette_size=512"])


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


def rates(config: Config, images: int, seconds: float) -> str:
    """Images and model FLOPs a second; the share of the device's peak, attention counted causal, and in full."""
    full = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name="masked_pixel"))
    causal_rate, full_rate = (flops_per_image(c) * images / seconds for c in (config, full))
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    shares = f"{causal_rate / peak:.1%}, {full_rate / peak:.1%}" if peak else "-, -"
    return f"{images / seconds:8.1f} images/s{full_rate / 1e12:7.1f} TFLOP/s  MFU causal, full: {shares}"


# What training in bfloat16 takes on a healthy GPU; float32 has the efficient kernel alone.
ATTENTION = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
ADAM = ("aten::_fused_adamw_", "aten::_fused_adam_")


def require_fused(step: Callable[[], object], engine: "Engine") -> str:
    """Run one step of an engine; tell the fused kernels that it ran, by torch's profiler: a fallback gives no error.

    Raises:
        AssertionError: attention's is not one for the type, or not the chosen one; or, on a GPU, Adam's is none.
    """
    attention, dtype = engine.attention, engine.module.token_embedding.dtype
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
    with profile(activities=activities) as profiler:
        step()
    names = sorted(event.key for event in profiler.key_averages())
    fitting = (*ATTENTION, "EFFICIENT_ATTENTION") if dtype == torch.float32 else ATTENTION
    assert attention in fitting, f"attention in {dtype} is computed by {attention}, not by one of {', '.join(fitting)}"
    ran = [name for name in names if name.startswith("aten::_scaled_dot_product") and "backward" not in name]
    assert ran and all(attention.lower() in name for name in ran), f"attention ran as {ran}, not as {attention}"
    adam = next((name for name in names if name.startswith(ADAM)), None)
    assert adam or not CUDA, "Adam ran without its fused kernel"
    return f"attention {', '.join(ran)}; Adam {adam or 'not fused, on a CPU'}"


Part = Callable[..., dict[str, Any]]


def alone(module: str, part: str, **facts: Any) -> dict[str, Any]:
    """What a part of a benchmark found, run in a process of its own: the next is to find the device's memory free."""
    command = [sys.executable, "-m", module, "--part", part, "--facts", json.dumps(facts)]
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


def answer(part: Part, facts: str) -> None:
    """The part's side; the process ends here."""
    print(json.dumps(part(**json.loads(facts))), flush=True)
    os._exit(0)  # DeepSpeed's threads need seconds to wind up
