"""How fast a run goes: rates between two log lines, and the line itself."""

import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from igpt_ds.config.schema import Config
from igpt_ds.config.size import flops_per_image
from igpt_ds.planner.devices import peak_flops
from igpt_ds.text import clock

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import Batch


class Meter:
    """Rates since it was last restarted; time in validation and saving is left out."""

    def __init__(self, config: Config, engine: "Engine"):
        import torch

        self._config, self._engine = config, engine
        self._cuda = engine.device.type == "cuda"
        name = torch.cuda.get_device_name(engine.device) if self._cuda else ""
        self._peak = peak_flops(name)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._waiting, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        """Hand the batches on and add up the time that they took to come."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waiting += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def count_step(self) -> None:
        self._steps += 1

    def read(self, remaining: int) -> dict[str, float | None]:
        """The rates of the interval, and begin a new one.

        Returns:
            tokens_per_s and images_per_s over all ranks; tflops model TFLOP/s of one device, mfu its share of
            the device's peak (None where that is not known); data_wait share of the time; memory_gib peak on the
            device, or resident in RAM without one; eta_s seconds for `remaining` steps.
        """
        import torch

        seconds = time.perf_counter() - self._began
        images = self._steps * self._config.training.batch / seconds
        flops = images * flops_per_image(self._config) / self._engine.division.world
        if self._cuda:
            memory = float(torch.cuda.max_memory_allocated(self._engine.device))
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        reading = {
            "tokens_per_s": images * self._config.sequence_length,
            "images_per_s": images,
            "tflops": flops / 1e12,
            "mfu": flops / self._peak if self._peak else None,
            "data_wait": self._waiting / seconds,
            "memory_gib": memory / 2**30,
            "eta_s": remaining * seconds / self._steps,
        }
        self.restart()
        return reading


def training_line(line: dict[str, Any], steps: int) -> str:
    """One aligned line for people. MFU: model FLOPs (config/size.py) over the device's dense bfloat16 peak."""
    mfu = "" if line["mfu"] is None else f"  MFU {line['mfu']:6.1%} (causal)"
    beside = f"nats {line['bits']:.4f} bits" if "bits" in line else f"nats accuracy {line['accuracy']:.4f}"
    return (
        f"step {line['step']:>8}/{steps}  loss {line['loss']:.4f} {beside}  lr {line['lr']:.2e}  "
        f"grad {line['grad_norm']:8.3g}  {line['tokens_per_s']:9.3g} tokens/s {line['images_per_s']:8.3g} images/s  "
        f"{line['tflops']:6.3g} TFLOP/s{mfu}  data wait {line['data_wait']:5.1%}  "
        f"memory {line['memory_gib']:.2f} GiB  left {clock(line['eta_s'])}"
    )
