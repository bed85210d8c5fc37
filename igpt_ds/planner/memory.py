"""Bytes of one rank by kind.

Model states are what DeepSpeed 0.19 was measured to hold (tests/igpt_ds/planner/test_ranks.py). A parameter of the
network takes, divided over the ranks from the ZeRO stage in brackets on:

    weights [3]             2 in bfloat16, 4 in float32
    gradients [2]           4: they are summed in float32; at stage 1 in bfloat16 whole, and 2 as they arrive
    master weights [1]      4: in float32, too, as a second copy; none at stage 0
    Adam's two moments [1]  8

Activations are counted in units of B T d numbers, B being the micro-batch. Inside of a block the backward pass needs
16 on a GPU: the inputs and outputs of two norms (4), q, k, v (3), attention's output (1), and input and output of the
activation, 4 d wide (8). On a CPU the norms are not fused, and keep one more each.
"""

from dataclasses import asdict, dataclass

from igpt_ds.config.deepspeed import offloads
from igpt_ds.config.size import parameter_count
from igpt_ds.planner.gathering import gathering
from igpt_ds.planner.layout import Layout, module_sizes

_INSIDE, _UNFUSED_NORMS = 16, 2
# Units beside the blocks' (measured): the final norm's, and gradients on their way through a block.
_PASSING = 6


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, in the device's memory but for `host`.

    Attributes:
        second_copy: of the weights, divided over an hpZ group.
        buffers: for gradients to be reduced and parameters to be gathered.
        live: whole parameters gathered at one time (ZeRO-3).
        optimizer_step: needed while the optimiser steps, when there are no activations.
        host: in the processor's memory, by offload.
        arriving: of the gradients, those that are there from a block's backward pass to the end of the step only:
            they come as activations go.
        last_block: of the activations, what is left when the first block, the last one in the backward pass, is
            differentiated.
    """

    parameters: int
    gradients: int
    master: int
    moments: int
    second_copy: int
    activations: int
    live: int
    buffers: int
    optimizer_step: int
    host: int = 0
    arriving: int = 0
    last_block: int = 0

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.master + self.moments + self.second_copy

    @property
    def total(self) -> int:
        """The peak: in the backward pass, or while the optimiser steps."""
        before, after = self.activations + self.live, self.arriving + self.last_block + self.live
        return self.states - self.arriving + self.buffers + max(before, after, self.optimizer_step)

    def kinds(self) -> dict[str, int]:
        """All figures that add up to the total by name, and the total."""
        kinds = {**asdict(self), "total": self.total}
        del kinds["arriving"], kinds["last_block"]
        return kinds


def bytes_per_rank(layout: Layout, gpu: bool = True) -> Memory:
    """The memory of a rank that trains.

    Args:
        gpu: with its fused norms and its fused Adam.
    """
    stage, count = layout.stage, parameter_count(layout.config)

    def part(since: int) -> int:
        """Elements of one rank of what is divided from a stage on."""
        return -(-count // layout.ranks) if stage >= since else count

    offloaded, weights_offloaded = offloads(layout.zero, "optimizer"), offloads(layout.zero, "param")
    parameters = layout.width * part(3)
    summed = stage == 1 and layout.bf16 and not offloaded  # in buffers that stay
    gradients = 4 * part(2) + (2 * count if summed else 0)
    master, moments = 4 * part(1) if stage else 0, 8 * part(1)
    host = 0
    if weights_offloaded:
        host, parameters = parameters, 0
    if offloaded:
        # Gradients are copied there once, and again for the step.
        host += master + moments + 8 * part(1)
        master = moments = 0
        gradients = gradients if stage == 1 else 0
    arriving = 0
    if stage < 3 and layout.division.accumulation == 1:
        arriving = 2 * count if summed else gradients
    step = 0
    if stage and not offloaded:
        # The optimiser gets its gradients as one flat copy, in stage 3 of a group of parameters at a time; an unfused
        # Adam makes two temporaries as large, when those that had arrived are gone.
        copied = _sub_group(layout) if stage == 3 else part(1)
        step = max(arriving + 4 * copied, (4 if gpu else 12) * copied)
    activations, last_block = activation_bytes(layout, gpu)
    return Memory(
        parameters,
        gradients,
        master,
        moments,
        second_copy=layout.width * -(-count // layout.hpz_group) if layout.hpz_group > 1 else 0,
        activations=activations,
        live=layout.width * gathering(layout).live if stage == 3 else 0,
        buffers=_buffers(layout),
        optimizer_step=step,
        host=host,
        arriving=arriving,
        last_block=last_block,
    )


def _sub_group(layout: Layout) -> int:
    """Elements of the largest group of parameters that stage 3 updates at once: one is closed when it is full."""
    sizes = module_sizes(layout.config)
    limit = layout.option("sub_group_size", 1_000_000_000)
    largest = current = 0
    for size in (*sizes.root, *sizes.block * layout.config.model.layers, *sizes.after):
        current += -(-size // layout.ranks)
        largest = max(largest, current)
        current = 0 if current >= limit else current
    return largest


def activation_bytes(layout: Layout, gpu: bool = True) -> tuple[int, int]:
    """What the backward pass of a micro-batch needs, when it begins, which is the most, and in its last block."""
    config, layers = layout.config, layout.config.model.layers
    tokens = layout.division.micro_batch * config.sequence_length // layout.sequence_parallel
    inside = _INSIDE if gpu else _INSIDE + _UNFUSED_NORMS
    # Of a block that is computed again: its input, and attention's output.
    again, kept = layout.recomputed, 2 if layout.checkpointing == "selective" else 1
    blocks = len(again) * kept + (layers - len(again)) * inside
    if layers - 1 in again:
        # The last block is there once in full; when an earlier one is, what the blocks after it kept is gone.
        blocks += inside - kept
    # The logits, their logarithms of probabilities and the gradient of these, both in float32.
    logits = tokens * config.palette_size * (layout.width + 8)
    unit = tokens * config.model.width * layout.width
    return unit * (blocks + _PASSING) + logits, unit * (inside + _PASSING)


def _buffers(layout: Layout) -> int:
    """Stage 3: gradients collected, and parameters as they arrive. Stage 2: gradients, twice where one bucket is filled
    while the other is on its way.

    While stage 3 sorts gradients by rank to send them, which takes a bucket more, the block's activations are gone.
    """
    reduce = layout.option("reduce_bucket_size", 500_000_000)
    if layout.stage == 3:
        gathered = min(layout.option("stage3_prefetch_bucket_size", 50_000_000), parameter_count(layout.config))
        return layout.width * (reduce + gathered)
    if layout.stage == 2:
        return layout.width * reduce * (2 if layout.option("overlap_comm", False) else 1)
    return 0
