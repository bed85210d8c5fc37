"""How long a GPU computes on a step: forward and backward pass, without messages and the optimiser.

    products     2 FLOPs a weight and token forward, 4 backward; and the bytes of their inputs, outputs and weights
    attention    two products of all pairs of positions forward, five backward, half of each where the mask is causal
    passes       what lies between: norms, activation, residual additions, each read from memory and written to it
    loss         logits in float32, their softmax, and back

All are added up. What is computed again in the backward pass counts once more as forward pass. The shares of the data
sheet that kernels reach are `Assumptions`; they were set by estimates of iGPT-XL's step on an H200, and tested against
those (tests/igpt_ds/planner/test_kernels.py). Nothing of it has been measured.
"""

from typing import TYPE_CHECKING

from igpt_ds.config.size import attention_flops_per_image
from igpt_ds.planner.devices import Device
from igpt_ds.planner.layout import Layout

if TYPE_CHECKING:
    from igpt_ds.planner.step_time import Assumptions

# In units of B T d numbers, as memory.py has them. A block's four products read and write 1 + 3, 1 + 1, 1 + 4, 4 + 1.
_PRODUCTS = 16
_LOSS = 28  # bytes a logit: converted, softmax, its gradient, converted back


def compute_seconds(layout: Layout, device: Device, assumed: "Assumptions") -> float:
    """Seconds of one step's forward and backward passes of a rank."""
    config, precision = layout.config, layout.config.training.precision
    d, k, layers = config.model.width, config.palette_size, config.model.layers
    images, width = layout.division.micro_batch, layout.width
    tokens = images * config.sequence_length / layout.sequence_parallel
    peak, memory = device.peak(precision), assumed.memory * device.bandwidth
    kernel = device.attention if layout.bf16 else "efficient"

    def product(weights: int, units: float) -> float:
        """Seconds of a product with so many weights, and so many numbers a token read and written."""
        return 2 * weights * tokens / (assumed.products * peak) + width * (units * tokens + weights) / memory

    passes = assumed.passes_compiled if config.training.compile else assumed.passes
    forward_pass, backward_pass = (tokens * d * width * count / memory for count in passes)
    products = product(12 * d * d, _PRODUCTS * d)
    # A third of attention's model FLOPs is the forward pass's.
    attention = attention_flops_per_image(config) / 3 / layers * images / layout.sequence_parallel
    attention /= assumed.attention[kernel] * peak
    forward = products + attention + forward_pass
    backward = 2 * products + 2.5 * attention + backward_pass
    again = forward - attention if layout.checkpointing == "selective" else forward
    head = 3 * product(k * d, d + k) + _LOSS * tokens * k / memory
    seconds = layers * (forward + backward) + len(layout.recomputed) * again + head
    return layout.division.accumulation * seconds / assumed.speed
