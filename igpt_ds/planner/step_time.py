"""How long a step takes, by a stated model. Nothing here is measured; every assumption is a field of `Assumptions`.

    computation    model FLOPs / (ranks x peak x MFU)
    messages       bytes through the slower of the links in a node and the network between nodes, and for each message
                   the hops of its ring
    optimiser      bytes of states read and written / memory bandwidth
    step           what overlaps counts by its longer part; the rest is added

Of N nodes of M GPUs, each node receives (N - 1) / N of what is gathered, through the network of all its GPUs; within
it every GPU passes on what all others have. With overlap ZeRO-3's gatherings and reductions, and stage 2's reductions,
go on beside the computation; stage 0's and 1's reductions, the gathering after the step and the exchange of heads do
not.
"""

import math
from dataclasses import dataclass

from igpt_ds.config.deepspeed import offloads
from igpt_ds.config.size import attention_flops_per_image, flops_per_image, matrix_flops_per_image, parameter_count
from igpt_ds.planner.communication import Transfer, transfers
from igpt_ds.planner.devices import Device
from igpt_ds.planner.layout import Layout


@dataclass(frozen=True)
class Assumptions:
    """What the data sheets do not say.

    Attributes:
        mfu: model FLOPs of the computation alone over the device's peak (of bfloat16, or of float32 where the network
            computes in that); recomputation is no model FLOP.
        bandwidth_share: what large messages and the optimiser reach of a data sheet's bandwidth.
        hop, hop_between_nodes: seconds by which a ring's step delays a message (what NCCL's own model of its ring
            protocol for large messages has).
        host_bandwidth: of a node's processor memory, bytes/s.
    """

    mfu: float
    bandwidth_share: float = 0.8
    hop: float = 3.4e-6
    hop_between_nodes: float = 14e-6
    host_bandwidth: float = 300e9


_MFU = 0.5  # without recomputation
_CONCURRENT = {"gather weights": (3,), "gather in node": (3,), "scatter gradients": (3,), "reduce gradients": (2,)}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's parts.

    Attributes:
        hidden_messages: those that go on beside the computation, if it is long enough.
        messages: the others.
        transfers: each kind of message with its seconds.
    """

    computation: float
    hidden_messages: float
    messages: float
    optimizer: float
    transfers: tuple[tuple[Transfer, float], ...]

    @property
    def step(self) -> float:
        """The whole."""
        return max(self.computation, self.hidden_messages) + self.messages + self.optimizer


def assumed_mfu(layout: Layout) -> float:
    """0.5 without recomputation; with it less, as it takes time and is not counted."""
    return _MFU / (1 + recomputed_share(layout))


def recomputed_share(layout: Layout) -> float:
    """FLOPs computed again, over model FLOPs: a third of the blocks' under full checkpointing; under selective
    checkpointing without attention's."""
    if layout.checkpointing == "none":
        return 0.0
    config = layout.config
    head = 6 * config.sequence_length * config.palette_size * config.model.width
    again = matrix_flops_per_image(config) - head
    if layout.checkpointing == "full":
        again += attention_flops_per_image(config)
    return again / 3 / flops_per_image(config)


def step_time(layout: Layout, device: Device, network: float, assumptions: Assumptions) -> StepTime:
    """Seconds of a step.

    Args:
        network: bytes/s of a GPU's share of the network between nodes, one way.
    """
    peak = device.peak(layout.config.training.precision)
    flops = flops_per_image(layout.config) * layout.config.training.batch
    computation = flops / (layout.ranks * peak * assumptions.mfu)
    timed = tuple((t, _seconds(t, layout, device, network, assumptions)) for t in transfers(layout))
    overlap = layout.option("overlap_comm", layout.stage == 3)
    hidden = sum(s for t, s in timed if overlap and layout.stage in _CONCURRENT.get(t.operation, ()))
    return StepTime(
        computation,
        hidden,
        sum(s for _, s in timed) - hidden,
        _optimizer_seconds(layout, device, assumptions),
        timed,
    )


def _seconds(transfer: Transfer, layout: Layout, device: Device, network: float, assumptions: Assumptions) -> float:
    ranks = transfer.ranks
    within = min(ranks, layout.ranks_per_node)
    nodes = -(-ranks // layout.ranks_per_node)
    rate_within = math.inf if layout.ranks_per_node == 1 else device.link * assumptions.bandwidth_share
    seconds = transfer.sent / rate_within
    if nodes > 1:
        between = transfer.factor * transfer.size * (nodes - 1) / nodes
        if transfer.operation == "exchange heads":
            between *= within  # each GPU sends its own, not a part of the same
        seconds = max(seconds, between / (within * network * assumptions.bandwidth_share))
    hops = (ranks - nodes) * assumptions.hop + (nodes - 1) * assumptions.hop_between_nodes
    return seconds + transfer.messages * transfer.factor * hops


def _optimizer_seconds(layout: Layout, device: Device, assumptions: Assumptions) -> float:
    """Adam reads and writes master weights and moments, reads gradients, and writes weights."""
    shard = parameter_count(layout.config) / (layout.ranks if layout.stage else 1)
    touched = shard * (24 + 4 + layout.width)
    if not offloads(layout.zero, "optimizer"):
        return touched / (device.bandwidth * assumptions.bandwidth_share)
    # Gradients go to the processor, weights come back.
    bus = shard * 2 * layout.width / (device.host * assumptions.bandwidth_share)
    share = assumptions.host_bandwidth / min(layout.ranks, layout.ranks_per_node)
    return bus + touched / share
