"""Which of torch's kernels computes softmax(q k^T / sqrt(E)) v.

torch takes the first in an order that can do a call. What each can do (read in torch 2.13, sdp_utils.cpp for CUDA):

    flash       float16 and bfloat16 from compute capability 8.0 on; E up to 256 (192 in training with dropout on 8.6,
                8.9 and 12.x)
    cuDNN       the same types and devices; E a multiple of 8 up to 128 (256 with the newest); a dropout that is a
                multiple of 1/16
    efficient   float32 too, on any of these devices
    math        anything, by way of the matrix of all pairs; on a CPU whatever has dropout

The heads of the paper's networks are 64 to 128 wide. A call that one kernel refuses goes to the next. FlashAttention 3,
which has to be built and switched on, raises an error there (with dropout, say): it is left alone.
"""

from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# The operators behind them, but for math, which has none of its own.
OPERATORS = [
    operator.default
    for operator in (
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
    )
]

_chosen = ExitStack()


def choose(
    device: torch.device, dtype: torch.dtype, tokens: int, head_width: int, causal: bool, dropout: float = 0.0
) -> str:
    """Put the kernels into their order for a device, in this process until `leave`; the one that a training then takes.

    For the process and not for a call: what is computed again in the backward pass, or is compiled, takes the same one.

    Returns:
        FLASH_ATTENTION, CUDNN_ATTENTION, EFFICIENT_ATTENTION or MATH.
    """
    _chosen.enter_context(sdpa_kernel(_order(device, tokens), set_priority=True))
    q_BHTE = torch.empty(1, 1, tokens, head_width, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q_BHTE, q_BHTE, q_BHTE, None, dropout, causal)).name


def leave() -> None:
    """The order is torch's own again."""
    _chosen.close()


def _order(device: torch.device, tokens: int) -> list[SDPBackend]:
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]  # the last: of other devices
    if device.type != "cuda" or torch.version.hip:
        return [flash, *rest]
    # Before 9.15.1 cuDNN's gradients can be NaN where the length is no multiple of 128 (pytorch #169849). Newer torch
    # prefers cuDNN on Hopper and Blackwell itself, but with such a version only.
    if tokens % 128 and (torch.backends.cudnn.version() or 0) <= 91500:
        return [flash, *rest]
    major, _ = torch.cuda.get_device_capability(device)
    return [cudnn, flash, *rest] if major in (9, 10) else [flash, cudnn, *rest]
