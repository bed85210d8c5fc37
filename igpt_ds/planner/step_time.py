"""How long a step takes, by a stated model. Nothing but the processor's time is measured; every assumption is a field
of `Assumptions`.

    computation    kernels.py: what products, attention and passes over memory take
    gradients      bytes that are moved to sum them up, for every micro-batch / memory bandwidth
    messages       bytes through the slower of the links in a node and the network between nodes, and for each message
                   the hops of its ring
    optimiser      bytes of states read and written / memory bandwidth
    host           what the processor takes to start all kernels
    step           what overlaps counts by its longer part; the rest is added

Of N nodes of M GPUs, each node receives (N - 1) / N of what is gathered, through the network of all its GPUs; within
it every GPU passes on what all others have. With overlap ZeRO-3's gatherings and reductions, and stage 2's reductions,
go on beside the computation; stage 0's and 1's reductions, the gathering after the step and the exchange of heads do
not.
"""

import math
from dataclasses import dataclass, field

from igpt_ds.config.deepspeed import offloads
from igpt_ds.config.size import attention_flops_per_image, flops_per_image, matrix_flops_per_image, parameter_count
from igpt_ds.planner.communication import Transfer, transfers
from igpt_ds.planner.devices import Device
from igpt_ds.planner.kernels import compute_seconds
from igpt_ds.planner.layout import Layout


@dataclass(frozen=True)
class Assumptions:
    """What the data sheets do not say. Tuples have a figure for each ZeRO stage.

    Attributes:
        speed: of forward and backward passes, times what kernels.py says; `--mfu` sets it.
        products, memory, links: what matrix products, the passes over memory and large messages reach of a data sheet's
            rate.
        attention: what each kernel reaches of the peak, by the FLOPs that it does.
        passes, passes_compiled: over memory beside the products of a block, forward and backward, in units of B T d
            numbers, each read or written.
        gradient_bytes: moved a parameter and micro-batch, beside the backward pass's own writing (a single rank's were
            counted by benchmarks/gradients.py; how they are divided was read in DeepSpeed 0.19).
        gradient_share_bytes: the same, of the parameters of the rank's share.
        optimizer_bytes: moved a parameter of the rank's share and step: norm, copies, Adam, and weights written.
        host: seconds that a rank's processor takes a block and micro-batch, the block being computed again (measured).
        host_kept: the share of that where it is not; host_compiled: where it is compiled.
        sync: seconds by which waiting for the device once delays it.
        hop, hop_between_nodes: seconds by which a ring's step delays a message (what NCCL's own model of its ring
            protocol for large messages has).
        host_bandwidth: of a node's processor memory, bytes/s.
    """

    speed: float = 1.0
    products: float = 0.89
    memory: float = 0.83
    links: float = 0.8
    attention: dict[str, float] = field(default_factory=lambda: {"cudnn": 0.55, "flash": 0.38, "efficient": 0.25})
    passes: tuple[int, int] = (18, 30)
    passes_compiled: tuple[int, int] = (17, 26)
    gradient_bytes: tuple[int, ...] = (12, 18, 12, 12)
    gradient_share_bytes: tuple[int, ...] = (0, 0, 26, 28)
    optimizer_bytes: tuple[int, ...] = (32, 34, 66, 66)
    host: tuple[float, ...] = (2.5e-3, 3.2e-3, 4.2e-3, 7.5e-3)
    host_kept: float = 0.55
    host_compiled: float = 0.8
    sync: float = 50e-6
    hop: float = 3.4e-6
    hop_between_nodes: float = 14e-6
    host_bandwidth: float = 300e9


_CONCURRENT = {"gather weights": (3,), "gather in node": (3,), "scatter gradients": (3,), "reduce gradients": (2,)}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's parts.

    Attributes:
        hidden_messages: those that go on beside the computation, if it is long enough.
        messages: the others.
        host: of the processor, beside all the others.
        waiting: of the device, where the processor waits for it in the middle of a step.
        transfers: each kind of message with its seconds.
    """

    computation: float
    gradients: float
    hidden_messages: float
    messages: float
    optimizer: float
    host: float
    waiting: float
    transfers: tuple[tuple[Transfer, float], ...]

    @property
    def device(self) -> float:
        """What the device takes, fed without a pause."""
        passes = max(self.computation + self.gradients, self.hidden_messages)
        return passes + self.messages + self.optimizer + self.waiting

    @property
    def step(self) -> float:
        """The whole."""
        return max(self.device, self.host)


def recomputed_share(layout: Layout) -> float:
    """FLOPs computed again, over model FLOPs: a third of the recomputed blocks'; under selective checkpointing without
    attention's."""
    config = layout.config
    head = 6 * config.sequence_length * config.palette_size * config.model.width
    again = matrix_flops_per_image(config) - head
    if layout.checkpointing != "selective":
        again += attention_flops_per_image(config)
    return len(layout.recomputed) / config.model.layers * again / 3 / flops_per_image(config)


def step_time(layout: Layout, device: Device, network: float, assumed: Assumptions) -> StepTime:
    """Seconds of a step.

    Args:
        network: bytes/s of a GPU's share of the network between nodes, one way.
    """
    timed = tuple((t, _seconds(t, layout, device, network, assumed)) for t in transfers(layout))
    overlap = layout.option("overlap_comm", layout.stage == 3)
    hidden = sum(s for t, s in timed if overlap and layout.stage in _CONCURRENT.get(t.operation, ()))
    return StepTime(
        compute_seconds(layout, device, assumed),
        _gradient_seconds(layout, device, assumed),
        hidden,
        sum(s for _, s in timed) - hidden,
        _optimizer_seconds(layout, device, assumed),
        _host_seconds(layout, assumed),
        # hpZ's second copy is made of each tensor alone, and waited for.
        6 * layout.config.model.layers * assumed.sync if layout.hpz_group > 1 else 0.0,
        timed,
    )


def _seconds(transfer: Transfer, layout: Layout, device: Device, network: float, assumed: Assumptions) -> float:
    ranks = transfer.ranks
    within = min(ranks, layout.ranks_per_node)
    nodes = -(-ranks // layout.ranks_per_node)
    rate_within = math.inf if layout.ranks_per_node == 1 else device.link * assumed.links
    seconds = transfer.sent / rate_within
    if nodes > 1:
        between = transfer.factor * transfer.size * (nodes - 1) / nodes
        if transfer.operation == "exchange heads":
            between *= within  # each GPU sends its own, not a part of the same
        seconds = max(seconds, between / (within * network * assumed.links))
    hops = (ranks - nodes) * assumed.hop + (nodes - 1) * assumed.hop_between_nodes
    return seconds + transfer.messages * transfer.factor * hops


def _gradient_seconds(layout: Layout, device: Device, assumed: Assumptions) -> float:
    """Copies of gradients on their way, and what adds them up."""
    stage = layout.stage
    moved = assumed.gradient_bytes[stage] + assumed.gradient_share_bytes[stage] / layout.ranks
    times = layout.division.accumulation - (stage == 0)  # there the first micro-batch's are the sum
    return times * moved * parameter_count(layout.config) / (device.bandwidth * assumed.memory)


def _optimizer_seconds(layout: Layout, device: Device, assumed: Assumptions) -> float:
    """Adam reads and writes master weights and moments, reads gradients, and writes weights; what goes with it."""
    count = parameter_count(layout.config)
    shard = count / (layout.ranks if layout.stage else 1)
    if not offloads(layout.zero, "optimizer"):
        whole = 0
        if layout.stage == 1 and layout.bf16:
            # The norm of all gradients, and their clearing; between ranks copies into messages and out of them.
            whole = 12 if layout.ranks == 1 else 24
        moved = assumed.optimizer_bytes[layout.stage] * shard + whole * count
        return moved / (device.bandwidth * assumed.memory)
    # Gradients go to the processor, weights come back.
    bus = shard * 2 * layout.width / (device.host * assumed.links)
    share = assumed.host_bandwidth / min(layout.ranks, layout.ranks_per_node)
    return bus + shard * (28 + layout.width) / share


def _host_seconds(layout: Layout, assumed: Assumptions) -> float:
    again, layers = len(layout.recomputed), layout.config.model.layers
    blocks = layout.division.accumulation * (again + assumed.host_kept * (layers - again))
    return blocks * assumed.host[layout.stage] * (assumed.host_compiled if layout.config.training.compile else 1)
