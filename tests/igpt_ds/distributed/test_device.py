"""What all ranks have of their machines, which is what is decided by."""

import dataclasses

from igpt_ds.distributed.device import at_hand, in_common
from igpt_ds.distributed.ranks import Ranks
from tests.helpers.machines import GIB, H100


class Poorer(Ranks):
    """Ranks of which another has half as much of everything."""

    def least(self, value: int) -> int:
        return value // 2


def test_a_rank_has_its_share_of_the_processors_memory() -> None:
    alone, shared = at_hand(Ranks()), at_hand(Ranks(0, 4, 0, 4))
    assert 0.2 < shared.host / alone.host < 0.3  # what is free changes
    assert alone.gpu or abs(alone.host - alone.memory) < alone.memory / 10


def test_the_least_of_all_ranks_counts() -> None:
    mine = dataclasses.replace(H100, host=200 * GIB)
    common = in_common(mine, Poorer())
    assert common == dataclasses.replace(mine, memory=39 * GIB, host=100 * GIB, bf16=False, compiles=False)
