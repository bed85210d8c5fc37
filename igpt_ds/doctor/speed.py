"""How fast each rank multiplies and all of them add up; and who is slow.

Rates are floating-point operations a second of one square matrix product, 2 n³ over the median time. Bandwidth of an
all-reduce is given as bus bandwidth, as nccl-tests do: 2 (ranks - 1) / ranks times the bytes of one rank's tensor over
the time, which on a ring is what each link carries, whatever the number of ranks.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from igpt_ds.doctor.report import Check, named
from igpt_ds.planner.devices import peak_flops
from igpt_ds.text import time_text

_WARN_BELOW, _FAIL_BELOW = 0.9, 0.7  # of the median rank
_LOW_SHARE = 0.4  # of the data sheet's peak: a healthy GPU reaches 0.6 and more
_SLOW_NCCL = 5e9  # bytes a second; below it NCCL most likely goes over plain sockets
_CYCLE = 7  # of the numbers added up
NETWORK = {  # where to look, by backend
    "nccl": "see NCCL_SOCKET_IFNAME and NCCL_IB_HCA, and what NCCL_DEBUG=INFO tells",
    "gloo": "see GLOO_SOCKET_IFNAME, and whether the nodes know each other's names",
}


def matmul(device: int | None, seconds: float = 1.0) -> dict[str, Any]:
    """Multiply for about a second: bfloat16 on a GPU, float32 on the CPU (device None).

    Returns:
        "rate" in FLOP/s; "peak", the data sheet's dense bfloat16 rate of this GPU (None: not known); "kind" of number.
    """
    import torch

    place = torch.device("cpu") if device is None else torch.device("cuda", device)
    size, kind = (1024, torch.float32) if device is None else (8192, torch.bfloat16)
    # Random: on zeros a GPU takes less power, and does not slow down where it would in training.
    left, right = (torch.randn(size, size, device=place, dtype=kind) for _ in range(2))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 8 or (time.perf_counter() - began < seconds and len(times) < 1000):
        start = time.perf_counter()
        torch.mm(left, right)
        if device is not None:
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - start)
    name = "" if device is None else torch.cuda.get_device_name(device)
    # The first ones choose and load the kernel.
    return {"rate": 2 * size**3 / statistics.median(times[3:]), "peak": peak_flops(name), "kind": str(kind)[6:]}


def judge_matmul(facts: Sequence[tuple[str, dict[str, Any]]]) -> Check:
    """Every rank near the median. Of two middle ones the faster is taken: what is wrong with a machine slows it.

    Args:
        facts: (label, `matmul`) of each rank or GPU.
    """
    rates = [fact["rate"] for _, fact in facts]
    median = statistics.median_high(rates)
    value = f"{_flops(median)}" + (f" median of {len(rates)}, least {_flops(min(rates))}" if len(rates) > 1 else "")
    value += f" in {' and '.join(sorted({fact['kind'] for _, fact in facts}))}"
    slow = sorted((fact["rate"] / median, label) for label, fact in facts if fact["rate"] < _WARN_BELOW * median)
    if slow:
        value += "; slow: " + named([f"{label} ({share:.0%} of the median)" for share, label in slow])
        remedy = "look for other processes, heat and power limits there, or leave the node out (sbatch --exclude)"
        return Check("matmul", "FAIL" if slow[0][0] < _FAIL_BELOW else "WARN", value, remedy)
    shares = [(fact["rate"] / fact["peak"], label) for label, fact in facts if fact["peak"]]
    if shares:
        value += f", {min(shares)[0]:.0%} of the data sheet's peak at least"
        if min(shares)[0] < _LOW_SHARE:
            return Check("matmul", "WARN", value, "look for other processes, heat and power limits (nvidia-smi -q)")
    return Check("matmul", "OK", value)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e11 else f"{rate / 1e9:.3g} GFLOP/s"


def all_reduce(rank: int, world: int, device: int | None, group: Any = None) -> dict[str, Any]:
    """Add up a tensor over all ranks, some times; a collective.

    Returns:
        "right", whether every element was the sum; "seconds", the median; "bytes" of one rank's tensor.
    """
    import torch
    import torch.distributed as dist

    if device is not None:
        torch.cuda.set_device(device)
    place = torch.device("cpu") if device is None else torch.device("cuda", device)
    count = 4 * 2**20 if device is None else 64 * 2**20
    # Whole numbers far below 2²⁴, where float32 adds without rounding in any order.
    pattern = (torch.arange(count, device=place) % _CYCLE).float()
    expected = pattern * (world * (world + 1) // 2)
    right, times = True, []
    for _ in range(5 if device is None else 15):
        tensor = pattern * (rank + 1)
        if device is not None:
            torch.cuda.synchronize(place)
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if device is not None:
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - start)
        right = right and torch.equal(tensor, expected)
    # The first ones open the connections.
    return {"right": right, "seconds": statistics.median(times[2:]), "bytes": 4 * count}


def judge_all_reduce(facts: Sequence[tuple[str, dict[str, Any]]], backend: str) -> Check:
    """The sum is right on every rank, and does not go at the speed of plain sockets.

    Args:
        facts: (label, `all_reduce`) of every rank.
    """
    wrong = [label for label, fact in facts if not fact["right"]]
    if wrong:
        value = f"{backend}: a wrong sum on {named(wrong)}"
        return Check("all_reduce", "FAIL", value, "leave these nodes out (sbatch --exclude) and report them")
    ranks, size = len(facts), facts[0][1]["bytes"]
    seconds = max(fact["seconds"] for _, fact in facts)
    rate = 2 * (ranks - 1) / ranks * size / seconds
    value = f"{backend}: right, {rate / 1e9:.3g} GB/s bus bandwidth ({size / 1e6:.0f} MB in {time_text(seconds)})"
    if backend == "nccl" and rate < _SLOW_NCCL:
        return Check("all_reduce", "WARN", value, f"NCCL may have found no fast network: {NETWORK[backend]}")
    return Check("all_reduce", "OK", value)
