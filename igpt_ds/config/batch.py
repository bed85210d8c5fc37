"""How a global batch is divided: over the ranks, into micro-batches, and these one after another."""

import math
from dataclasses import dataclass
from typing import Literal

from igpt_ds.errors import UserError


@dataclass(frozen=True)
class Division:
    """How a global batch is spread: replicas * micro_batch * accumulation = batch.

    A replica is one rank, or `sequence_parallel` neighbouring ones that each hold a part of every image's positions.
    """

    world: int
    micro_batch: int
    accumulation: int
    sequence_parallel: int = 1

    @property
    def replicas(self) -> int:
        return self.world // self.sequence_parallel

    @property
    def batch(self) -> int:
        return self.replicas * self.micro_batch * self.accumulation

    def replica(self, rank: int) -> int:
        """The replica that a rank belongs to."""
        return rank // self.sequence_parallel


def divide_batch(batch: int, micro_batch: Literal["auto"] | int, world: int, sequence_parallel: int = 1) -> Division:
    """Micro-batch and accumulation of each replica; where nobody has decided, it holds its whole share at once."""
    if world % sequence_parallel:
        raise UserError(
            f"training.sequence_parallel={sequence_parallel}: does not divide {world} ranks: start a multiple of it"
        )
    replicas = world // sequence_parallel
    if replicas > batch:
        remedy = f"start {batch * sequence_parallel} ranks, set training.batch={replicas}"
        if world % batch == 0:
            remedy += f", or let {world // batch} ranks share each image (training.sequence_parallel={world // batch})"
        raise UserError(f"training.batch={batch}: caps data parallelism at {batch} ranks, not {replicas}: {remedy}")
    if batch % replicas:
        fitting = [n * sequence_parallel for n in divisors(batch)]
        batches = [b for b in (batch // replicas * replicas, (batch // replicas + 1) * replicas) if b > 0]
        ways = f"start {_nearest(world, fitting)} ranks or set training.batch={' or '.join(map(str, batches))}"
        raise UserError(f"training.batch={batch}: {world} ranks cannot share it evenly: {ways}")
    share = batch // replicas
    micro = share if micro_batch == "auto" else micro_batch
    if share % micro:
        nearest = _nearest(micro, divisors(share))
        raise UserError(
            f"training.micro_batch={micro}: does not divide the {share} images of a "
            f"{'rank' if sequence_parallel == 1 else 'replica'} (batch {batch} on {world} ranks): "
            f"set training.micro_batch={nearest}"
        )
    return Division(world, micro, share // micro, sequence_parallel)


def divisors(count: int) -> list[int]:
    """The numbers that divide it, ascending."""
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return small + [count // n for n in reversed(small) if n * n != count]


def _nearest(wanted: int, fitting: list[int]) -> str:
    below = [n for n in fitting if n <= wanted][-1:]
    above = [n for n in fitting if n > wanted][:1]
    return " or ".join(str(n) for n in below + above)
