"""Which fused kernels a training step runs: asked of the profiler, since a fallback gives no error."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",  # with _for_cpu on a CPU
    "aten::_scaled_dot_product_cudnn_attention",
)
ADAM = ("aten::_fused_adamw_", "aten::_fused_adam_")


def fused_kernels(step: Callable[[], object]) -> dict[str, str | None]:
    """Run one step; the fused operators found for attention and Adam, None where there is none."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        step()
    names = {event.key for event in profiler.key_averages()}

    def first(starts: tuple[str, ...]) -> str | None:
        return next((name for name in sorted(names) if name.startswith(starts) and "backward" not in name), None)

    return {"attention": first(ATTENTION), "adam": first(ADAM)}


def require_fused(step: Callable[[], object]) -> dict[str, str | None]:
    """As `fused_kernels`; on a GPU all must be there.

    Raises:
        AssertionError: one is not.
    """
    found = fused_kernels(step)
    assert found["attention"], "attention runs without a fused kernel"
    assert found["adam"] or not torch.cuda.is_available(), "Adam runs without its fused kernel"
    return found
