"""Bytes of one rank by kind.

Model states are what DeepSpeed 0.19 was measured to hold (tests/igpt_ds/planner/test_ranks.py). A parameter of the
network takes, divided over the ranks from the ZeRO stage in brackets on:

    weights [3]             2 in bfloat16, 4 in float32
    gradients [2]           4: they are summed in float32; at stage 1 whole in bfloat16, or where several micro-batches
                            are added up
    master weights [1]      4: in float32, too, as a second copy; none at stage 0
    Adam's two moments [1]  8

Activations are counted in units of B T d numbers, B being the micro-batch. Inside of a block the backward pass needs
16 on a GPU: the inputs and outputs of two norms (4), q, k, v (3), attention's output (1), and input and output of the
activation, 4 d wide (8). On a CPU the norms are not fused, and keep one more each.
"""

import itertools
from dataclasses import asdict, dataclass

from igpt_ds.config.deepspeed import offloads
from igpt_ds.config.size import block_parameters, parameter_count
from igpt_ds.planner.gathering import Gathering, gathering
from igpt_ds.planner.layout import Layout, module_sizes

_INSIDE, _UNFUSED_NORMS = 16, 2
# Units beside the blocks' (measured): the final norm's, and gradients on their way through a block.
_PASSING = 6


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, in the device's memory but for `host`.

    Attributes:
        second_copy: of the weights, divided over an hpZ group.
        buffers: for gradients that are to be reduced; at stage 3 they stay.
        live: parameters gathered at one time, and messages with others that have come (ZeRO-3).
        optimizer_step: needed while the optimiser steps, when there are no activations.
        host: in the processor's memory, by offload.
        arriving: of the gradients, those that come as activations go, and are gone at the end of the step.
        passes: the peak of forward and backward pass, beyond what stays.
        resting: of the buffers, those that stay.
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
    passes: int = 0
    resting: int = 0

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.master + self.moments + self.second_copy

    @property
    def total(self) -> int:
        """The peak: in the backward pass, or while the optimiser steps."""
        return self.states - self.arriving + self.resting + max(self.passes, self.optimizer_step)

    def kinds(self) -> dict[str, int]:
        """All figures that people know by name, and the total."""
        kinds = {**asdict(self), "total": self.total}
        del kinds["arriving"], kinds["passes"], kinds["resting"]
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
    # Stage 1 sends its gradients away as they come, where none are to be added to them.
    sent = stage == 1 and not summed and layout.division.accumulation == 1
    gradients = 4 * part(1 if sent else 2)
    master, moments = 4 * part(1) if stage else 0, 8 * part(1)
    host = 0
    if weights_offloaded:
        host, parameters = parameters, 0
    if offloaded:
        # Gradients are copied there once, and again for the step.
        host += master + moments + 8 * part(1)
        master = moments = 0
        gradients = gradients if stage == 1 else 0
    arriving = 0 if stage == 3 or summed else gradients
    step = 0
    if stage and not offloaded:
        # The optimiser gets its gradients as one flat copy, in stage 3 of a group of parameters at a time; an unfused
        # Adam makes two temporaries as large, when those that had arrived are gone.
        copied = _sub_group(layout) if stage == 3 else part(1)
        step = max(arriving + 4 * copied, (4 if gpu else 12) * copied)
        if summed:  # flat from the beginning
            step = 0 if gpu else 8 * copied
    held, buffers = gathering(layout) if stage == 3 else Gathering(), _buffers(layout)
    resting = buffers if stage == 3 else 0
    activations = _backward(layout, gpu)
    return Memory(
        parameters,
        gradients,
        master,
        moments,
        second_copy=layout.width * -(-count // layout.hpz_group) if layout.hpz_group > 1 else 0,
        activations=activations[0],
        live=layout.width * held.live,
        buffers=buffers,
        optimizer_step=step,
        host=host,
        arriving=arriving,
        passes=_passes(layout, activations, arriving, buffers, held) - resting,
        resting=resting,
    )


def _passes(layout: Layout, activations: list[int], arriving: int, buffers: int, held: Gathering) -> int:
    """The peak of both passes, with buffers but without all else that stays, on the rank whose gradients come first."""
    config, summed_up = layout.config, layout.division.accumulation > 1
    elements, collected = _sent(layout)
    sent = layout.sent_width * elements
    block, done = block_parameters(config), sum(module_sizes(config).after)

    def full(done: int) -> bool:
        """Whether a bucket is full while a block is differentiated: two thirds of it, the MLP, come at once."""
        return done + 2 * block // 3 >= elements

    there, gathered = arriving * summed_up + activations[0], layout.width * held.live_backward
    # In the forward pass the most is gathered before its end. When the backward pass begins, stages 1 and 2 have no
    # buffers yet; when the first gradient comes, the logits are gone.
    peaks = [
        there - activations[-1] + layout.width * held.live + buffers,
        there + gathered + (buffers if layout.stage == 3 else 0),
    ]
    for size in [activations[0] - _logit_bytes(layout), *activations[1:]]:
        if summed_up:
            # Stage 2 has those of the last micro-batch apart.
            arrived = arriving * (2 if layout.stage == 2 else 1)
        elif collected:
            # All of their memory is taken when the first bucket is full and sent.
            arrived = arriving if full(done) else 0
        else:
            arrived = min(arriving, 4 * done)
        copied = sent if collected and full(done) else 0
        peaks.append(arrived + size + copied + gathered + buffers)
        done += block
    # In the end a bucket that is full only now is sent, or what is left after others were; or all.
    whole = layout.sent_width * parameter_count(config)
    peaks.append(min(sent, whole) + buffers if collected else arriving + sent)
    peaks.append(arriving + whole % sent + buffers if collected and whole >= sent else 0)
    return max(peaks)


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
    found = _backward(layout, gpu)
    return found[0], found[-1]


def _backward(layout: Layout, gpu: bool) -> list[int]:
    """Activations when the backward pass comes to each block, from the last block to the first; at first the logits."""
    config, layers = layout.config, layout.config.model.layers
    tokens = layout.division.micro_batch * config.sequence_length // layout.sequence_parallel
    inside = _INSIDE if gpu else _INSIDE + _UNFUSED_NORMS
    # Of a block that is computed again: its input, and attention's output. When it is, it is there in full.
    kept = 2 if layout.checkpointing == "selective" else 1
    before = [0, *itertools.accumulate(kept if layer in layout.recomputed else inside for layer in range(layers - 1))]
    unit = tokens * config.model.width * layout.width
    found = [unit * (units + inside + _PASSING) for units in reversed(before)]
    found[0] += _logit_bytes(layout)
    return found


def _logit_bytes(layout: Layout) -> int:
    """The logits, their logarithms of probabilities and the gradient of these, both in float32."""
    tokens = layout.division.micro_batch * layout.config.sequence_length // layout.sequence_parallel
    return tokens * layout.config.palette_size * (layout.width + 8)


def _buffers(layout: Layout) -> int:
    """Bytes in which gradients are collected until they are sent: stages 1 and 2 fill one bucket while another is on
    its way. Stage 3's has the type in which ranks sum up, theirs that of the weights."""
    elements, collected = _sent(layout)
    if layout.stage == 3:
        return layout.sent_width * elements
    return collected * layout.width * elements * (2 if layout.option("overlap_comm", False) else 1)


def _sent(layout: Layout) -> tuple[int, bool]:
    """Elements of the copy of gradients that is sent at a time, and whether gradients are collected for it.

    Stage 3 sorts a bucket by rank in it. Stage 0, and stage 1 in bfloat16, collect nothing, and send all when the last
    backward pass is over, in copies of 500 million.
    """
    if layout.stage == 0 or (layout.stage == 1 and layout.bf16 and not offloads(layout.zero, "optimizer")):
        return min(parameter_count(layout.config), 500_000_000), False
    return layout.option("reduce_bucket_size", 500_000_000), True
