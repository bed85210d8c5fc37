"""One training step seen from within: bytes by phase, and how long the device was busy.

On a GPU torch's allocator tells the bytes, and CUDA's profiler when kernels ran. On a CPU torch's profiler tells both:
each piece of memory taken or given back, and when an operator ran.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine

PHASES = ("forward", "backward", "optimizer")
_MARK = "phase: "
_OPERATORS, _COLLECTIVES = "aten::", "c10d::"


@dataclass
class Phase:
    """Bytes beyond those that stay from step to step: at the end of the phase, and the most within it.

    Of several micro-batches the end is the last one's.
    """

    end: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Watched:
    """A step.

    Attributes:
        phases: by their names, see PHASES.
        seconds: that it took, under the profiler.
        busy: seconds in which the device computed: a GPU's kernels, a CPU's operators.
        playing: seconds of the host in collectives, which where ranks are played copy in place of sending.
    """

    phases: dict[str, Phase]
    seconds: float
    busy: float
    playing: float


def watch(engine: "Engine", step: Callable[[], object]) -> Watched:
    """Watch a step of the engine, once it has learnt its order (ZeRO-3 takes two for that).

    Args:
        step: calls `Engine.train_step` once.
    """
    cuda = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    allocator = _Allocator()
    # Cycles hold tensors of the steps before.
    gc.collect()
    with profile(activities=activities, profile_memory=not cuda) as profiled:
        began = time.perf_counter()
        with _marked(engine, allocator.mark if cuda else _mark):
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    return Watched(allocator.phases if cuda else _phases(events), seconds, *_times(events, cuda))


def tensor_bytes() -> int:
    """Bytes of all tensors on the CPU that Python knows of."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return storage_bytes(thing for thing in gc.get_objects() if isinstance(thing, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take, each storage once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@contextmanager
def _marked(engine: "Engine", mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` with the name of each phase as it begins."""
    within = engine.deepspeed
    backward, step = within.backward, within.step

    def marked_backward(*args: Any, **options: Any) -> Any:
        mark("backward")
        return backward(*args, **options)

    def marked_step() -> None:
        mark("optimizer")
        step()
        mark("forward")

    within.backward, within.step = marked_backward, marked_step
    mark("forward")
    try:
        yield
    finally:
        del within.backward, within.step


def _mark(name: str) -> None:
    """Note the beginning of a phase among the profiler's events."""
    with record_function(_MARK + name):
        pass


def _phases(events: Iterable[Any]) -> dict[str, Phase]:
    """Phases from a CPU's memory events."""
    found = {name: Phase() for name in PHASES}
    current, now = found[PHASES[0]], 0
    moments = [event for event in events if event.name() == "[memory]" or event.name().startswith(_MARK)]
    for event in sorted(moments, key=lambda event: event.start_ns()):
        if event.name().startswith(_MARK):
            current.end = now
            current = found[event.name().removeprefix(_MARK)]
        else:
            now += event.nbytes()
            current.peak = max(current.peak, now)
    return found


class _Allocator:
    """Phases from the bytes of a GPU's allocator, which are known without waiting for the GPU."""

    def __init__(self) -> None:
        self.phases = {name: Phase() for name in PHASES}
        self._current: Phase | None = None
        self._stays = 0

    def mark(self, name: str) -> None:
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if self._current is None:
            self._stays = now
        else:
            self._current.end = now - self._stays
            self._current.peak = max(self._current.peak, peak - self._stays)
        torch.cuda.reset_peak_memory_stats()
        self._current = self.phases[name]


def _times(events: Iterable[Any], cuda: bool) -> tuple[float, float]:
    """Seconds in which the device was busy, and of the host in collectives."""
    computing, sending = [], []
    for event in events:
        span = event.start_ns(), event.end_ns()
        if event.device_type() == DeviceType.CUDA:
            if not event.is_user_annotation():  # named stretches, with the gaps in them
                computing.append(span)
        elif event.name().startswith(_COLLECTIVES):
            sending.append(span)
        elif not cuda and event.name().startswith(_OPERATORS):
            computing.append(span)
    if cuda:
        return _covered(computing), _covered(sending)
    # A collective of the CPU copies by operators, and no operator sends.
    return _covered(computing + sending) - _covered(sending), _covered(sending)


def _covered(spans: list[tuple[int, int]]) -> float:
    """Seconds that intervals of nanoseconds cover together."""
    covered, reached = 0, 0
    for begin, end in sorted(spans):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / 1e9
