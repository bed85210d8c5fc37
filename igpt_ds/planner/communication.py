"""Bytes that one rank sends in a step, by operation.

A ring's count: of n ranks each sends (n - 1) / n of what is gathered or scattered, and twice that of what is reduced
for all. What DeepSpeed 0.19 does, by ZeRO stage (tests/igpt_ds/planner/test_ranks.py compares with its own
log of messages):

    0     all ranks reduce the gradients, once a step
    1     the same; each updates its part of the weights, and all gather them
    2     the same after every micro-batch: by default as an all-reduce, of which each rank keeps its part
          (use_multi_rank_bucket_allreduce: false makes it a reduction to each owner, half of the volume)
    3     weights are gathered in every forward pass and again in the backward pass, gradients reduce-scattered
    hpZ   of stage 3's gatherings only the first of a step crosses nodes: then each node has a copy of its own

Sequence parallelism (DeepSpeed Ulysses) exchanges q, k, v and attention's output in every block, so that a rank has
all tokens of some heads instead of all heads of some tokens.
"""

from dataclasses import dataclass

from igpt_ds.config.size import parameter_count
from igpt_ds.planner.gathering import gathering
from igpt_ds.planner.layout import Layout


@dataclass(frozen=True)
class Transfer:
    """One kind of message of a step.

    Attributes:
        operation: such as "gather weights".
        size: bytes gathered, reduced or exchanged in a step, whole, before the factor of `sent`.
        ranks: that take part in one.
        messages: in a step.
        factor: 1 for gathering, scattering, exchanging; 2 for an all-reduce.
    """

    operation: str
    size: int
    ranks: int
    messages: int
    factor: int = 1

    @property
    def sent(self) -> int:
        """Bytes that each of the ranks sends in a step."""
        return self.factor * self.size * (self.ranks - 1) // self.ranks


def transfers(layout: Layout) -> list[Transfer]:
    """All large messages of a step; those of norms, flags and losses are some bytes."""
    stage, ranks, accumulation = layout.stage, layout.ranks, layout.division.accumulation
    count = parameter_count(layout.config)
    summed, bucket = layout.sent_width * count, layout.option("reduce_bucket_size", 500_000_000)
    found = []
    if stage == 3:
        found += _gatherings(layout)
        found.append(Transfer("scatter gradients", accumulation * summed, ranks, accumulation * _parts(count, bucket)))
    else:
        # Stages 0 and 1 sum up the micro-batches first.
        times = accumulation if stage == 2 else 1
        to_owner = stage and not layout.option("use_multi_rank_bucket_allreduce", True)
        if stage == 1 and layout.bf16:
            to_owner = False  # an optimiser class of its own, which does not know the option
        messages = times * (_parts(count, bucket) if stage else 1)
        found.append(Transfer("reduce gradients", times * summed, ranks, messages, 1 if to_owner else 2))
        if stage:
            found.append(Transfer("gather weights", layout.width * count, ranks, 1))
    if layout.sequence_parallel > 1:
        found.append(_exchange(layout))
    return [transfer for transfer in found if transfer.sent]


def _parts(count: int, bucket: int) -> int:
    return -(-count // bucket)


def _gatherings(layout: Layout) -> list[Transfer]:
    pass_by_pass = gathering(layout)
    both = layout.division.accumulation * (pass_by_pass.forward + pass_by_pass.backward)
    bucket = max(1, layout.option("stage3_prefetch_bucket_size", 50_000_000))
    # With hpZ all that follows the first forward pass comes from the copy of a node.
    first = pass_by_pass.forward if layout.hpz_group > 1 else both
    found = [Transfer("gather weights", layout.width * first, layout.ranks, _parts(first, bucket))]
    if first < both:
        later = both - first
        found.append(Transfer("gather in node", layout.width * later, layout.hpz_group, _parts(later, bucket)))
    if pass_by_pass.small:
        found.append(Transfer("gather small weights", layout.width * pass_by_pass.small, layout.ranks, 1))
    return found


def _exchange(layout: Layout) -> Transfer:
    """Four all-to-alls a block, there and back, and there again where the block is recomputed."""
    config, share = layout.config, layout.sequence_parallel
    passes = 2 if layout.checkpointing == "none" else 3
    tokens = layout.division.micro_batch * config.sequence_length // share
    messages = 4 * passes * config.model.layers * layout.division.accumulation
    return Transfer("exchange heads", messages * tokens * config.model.width * layout.width, share, messages)
