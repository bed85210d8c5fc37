"""A step from within: bytes by phase, and seconds in which a device is busy, from made-up events of a profiler."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._C._autograd import DeviceType

from igpt_ds.rehearse import watch
from igpt_ds.rehearse.watch import Phase


@dataclass(frozen=True)
class Event:
    """As kineto has them; times in nanoseconds."""

    label: str
    begin: int
    end: int = 0
    size: int = 0
    device: DeviceType = DeviceType.CPU
    annotation: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.begin

    def end_ns(self) -> int:
        return self.end

    def nbytes(self) -> int:
        return self.size

    def device_type(self) -> DeviceType:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_memory_is_counted_in_the_phase_in_which_it_is_taken() -> None:
    events = [
        Event("phase: backward", 30),
        Event("[memory]", 10, size=100),
        Event("phase: forward", 0),
        Event("[memory]", 20, size=-40),
        Event("[memory]", 40, size=70),
        Event("aten::mm", 41, 50),
        Event("[memory]", 50, size=-130),
        Event("phase: optimizer", 60),
        Event("[memory]", 70, size=5),
        # A second micro-batch.
        Event("phase: forward", 80),
        Event("[memory]", 90, size=120),
        Event("phase: backward", 95),
        Event("[memory]", 100, size=-122),
        Event("phase: optimizer", 110),
        Event("[memory]", 115, size=2),
        # What follows the step is no forward pass.
        Event("phase: forward", 120),
        Event("[memory]", 125, size=-5),
    ]
    phases = watch._phases(events)
    assert phases == {"forward": Phase(125, 125), "backward": Phase(3, 130), "optimizer": Phase(5, 5)}


def test_a_cpu_is_busy_in_operators_and_a_collective_is_none() -> None:
    second = 10**9
    events = [
        Event("aten::linear", 0, 4 * second),
        Event("aten::mm", 1 * second, 2 * second),  # within it
        Event("aten::mul", 5 * second, 6 * second),
        Event("Hook", 6 * second, 9 * second),
        Event("c10d::_allgather_base_", 7 * second, 8 * second),
        Event("aten::copy_", 7 * second, 8 * second),  # within that
    ]
    assert watch._times(events, cuda=False) == (5.0, 1.0)


def test_a_gpu_is_busy_while_kernels_run_on_any_of_its_streams() -> None:
    second, gpu = 10**9, DeviceType.CUDA
    events = [
        Event("aten::mm", 0, second),
        Event("c10d::allreduce_", second, 2 * second),
        Event("gemm", 3 * second, 6 * second, device=gpu),
        Event("copy", 5 * second, 7 * second, device=gpu),  # on another stream
        Event("Optimizer.step", 3 * second, 20 * second, device=gpu, annotation=True),
        Event("adam", 9 * second, 10 * second, device=gpu),
    ]
    assert watch._times(events, cuda=True) == (5.0, 1.0)


def test_a_gpus_allocator_tells_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    # Allocated, and the most since it was last asked: before the step, and at the end of each phase.
    told = iter([(100, 900), (150, 180), (120, 400), (100, 125)])
    now = [(0, 0)]

    def allocated() -> int:
        now[0] = next(told)
        return now[0][0]

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now[0][1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    allocator = watch._Allocator()
    for phase in ("forward", "backward", "optimizer", "forward"):
        allocator.mark(phase)
    assert allocator.phases == {"forward": Phase(50, 80), "backward": Phase(20, 300), "optimizer": Phase(0, 25)}


def test_phases_begin_where_the_engine_goes_from_one_to_the_next() -> None:
    order: list[str] = []

    class Within:
        def backward(self, loss: str) -> None:
            order.append(f"backward of {loss}")

        def step(self) -> None:
            order.append("step")

    within = Within()
    engine = cast(Any, SimpleNamespace(deepspeed=within))
    with watch._marked(engine, lambda phase: order.append(f"> {phase}")):
        within.backward("loss")
        within.step()
    within.step()
    assert order == ["> forward", "> backward", "backward of loss", "> optimizer", "step", "> forward", "step"]


def test_each_storage_counts_once() -> None:
    whole = torch.zeros(100)
    assert watch.storage_bytes([whole, whole[3:7], torch.zeros(5, dtype=torch.float64)]) == 440
