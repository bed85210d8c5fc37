"""One rank of the checks of activation checkpointing: `python -m tests.workers.recomputed FOLDER`, see ranks.py.

Each way is trained for some steps under ZeRO-3, its blocks as they are and compiled: traced and differentiated by
torch's compiler, whose code is then run by torch itself, which needs no C++ compiler and is quick.
"""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo

from igpt_ds.config import schema
from igpt_ds.config.schema import Config
from tests.helpers.ranks import record_and_end
from tests.workers.parity import Case, Rank

WAYS = ("none", "1/2", "1/3", "selective", "full")
STEPS = 4


@dataclass(frozen=True)
class Recomputed(Case):
    """A case of four blocks, perhaps compiled."""

    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.checkpointing}, {'compiled' if self.compiled else 'eager'}"

    def config(self, world: int) -> Config:
        deeper = schema.replace(super().config(world), "model", layers=4)
        return schema.replace(deeper, "training", compile=self.compiled)


CASES = [Recomputed(checkpointing=way, compiled=compiled) for compiled in (False, True) for way in WAYS]


def main() -> None:
    """Losses and norms of the steps; and how often the block's code was compiled."""
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    rank, found = Rank(Path(sys.argv[1])), {}
    with torch._dynamo.config.patch(disable=False):
        for case in CASES:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            engine = rank.build(case)
            found[case.name] = rank.train(engine, 0, STEPS)
            engine.close()
            counters = torch._dynamo.utils.counters
            found[case.name]["compilations"] = counters["frames"]["ok"]
            found[case.name]["gaps"] = sum(counters["graph_break"].values())
    record_and_end(rank.folder, rank.ranks, found)


if __name__ == "__main__":
    main()
