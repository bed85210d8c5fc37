"""One rank that measures what the planner computes: `python -m tests.workers.plan FOLDER`, started by ranks.py.

For each case of its world size, in one process group: which messages DeepSpeed's log of communication has of a step,
how many bytes of tensors stay from step to step, how many more a step takes at its peak, and the loss. Recorded in
FOLDER, judged by test_ranks.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igpt_ds.config.batch import Division, divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.planner.layout import Layout, laid_out
from igpt_ds.rehearse.watch import tensor_bytes, watch
from tests.helpers.ranks import record_and_end

RESOLUTION, COLOURS = 8, 16
# Every matrix divided, and nothing kept for longer than from a recomputation to its backward pass.
SMALL = {
    "stage3_param_persistence_threshold": 100,
    "stage3_max_reuse_distance": 30_000,
    "stage3_prefetch_bucket_size": 15_000,
    "stage3_max_live_parameters": 45_000,
}
# The same for a network whose memory can be told from that of everything else: its blocks have 442,752 parameters.
LARGER = {
    "reduce_bucket_size": 450_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 900_000,
    "stage3_prefetch_bucket_size": 450_000,
    "stage3_max_live_parameters": 1_350_000,
}


@dataclass(frozen=True)
class Case:
    """A way to train the tiny network on two images a rank and micro-batch."""

    ds: str
    precision: str = "float32"
    accumulation: int = 1
    checkpointing: str = "full"
    small: bool = False
    measured: bool = False  # on a larger network, memory as well
    changes: tuple[tuple[str, Any], ...] = ()
    summed_in: str = ""  # the type of gradients between ranks, chosen

    @property
    def name(self) -> str:
        """Tells the cases of a world size apart."""
        return "-".join(
            [
                self.ds,
                self.precision,
                f"accumulation{self.accumulation}",
                self.checkpointing.replace("/", "of"),
                *(["small"] if self.small else []),
                *(["measured"] if self.measured else []),
                *(f"{key}={value}" for key, value in self.changes),
                *([f"summed-in-{self.summed_in}"] if self.summed_in else []),
            ]
        )

    def config(self, world: int) -> Config:
        """The configuration on so many ranks."""
        shape = ["model.width=32", "model.layers=3", f"data.resolution={RESOLUTION}"]
        if self.measured:
            shape = ["model.width=192", "model.layers=8", "model.heads=4", "data.resolution=16"]
        images = 4 if self.measured else 2
        return load_config(
            "tiny",
            [
                *shape,
                f"data.palette_size={COLOURS}",
                f"training.batch={images * world * self.accumulation}",
                f"training.micro_batch={images}",
                f"training.precision={self.precision}",
                f"training.activation_checkpointing={self.checkpointing}",
                "training.compile=false",
                "seed=3",
            ],
        )

    def resolved(self, world: int) -> tuple[dict[str, Any], Division]:
        """DeepSpeed's configuration, nodes being of 2 ranks, and the division of the batch."""
        config = self.config(world)
        division = divide_batch(config.training.batch, config.training.micro_batch, world)
        tree = load_ds_config(self.ds)
        zero = tree["zero_optimization"]
        if self.small:
            zero.update(SMALL)
        if self.measured:
            zero.update({key: value for key, value in LARGER.items() if key in zero})
        zero.update(self.changes)
        if self.summed_in:
            tree["communication_data_type"] = self.summed_in
        return resolve(tree, config, division, 2), division

    def layout(self, world: int) -> Layout:
        """What the planner is asked about."""
        ds, division = self.resolved(world)
        return laid_out(self.config(world), ds, division, 2)


_BF16 = "bfloat16"
MEASURED = [
    Case("zero3", measured=True),
    Case("zero3", measured=True, checkpointing="none"),
    Case("zero3", measured=True, changes=(("sub_group_size", 500_000),)),
    Case("zero3", measured=True, checkpointing="1/3"),
    Case("zero1", measured=True),
    Case("zero1", measured=True, checkpointing="1/2"),
    Case("zero3", _BF16, measured=True, summed_in="fp32"),
    # What stage 1 in bfloat16 held is let go of late, and would be taken for the next case's.
    *(Case(f"zero{stage}", _BF16, measured=True) for stage in (3, 2, 1)),
]
MESSAGES = [
    *(Case(f"zero{stage}", accumulation=2) for stage in (0, 1, 2, 3)),
    *(Case(f"zero{stage}", _BF16, 2) for stage in (1, 2)),
    *(Case(f"zero{stage}", _BF16, summed_in="fp32") for stage in (1, 2, 3)),
    Case("zero0", summed_in="bf16"),
    *(Case(f"zero{stage}", accumulation=2, changes=(("use_multi_rank_bucket_allreduce", False),)) for stage in (1, 2)),
    Case("zero3", small=True),
    Case("zero3", _BF16, small=True, accumulation=2),
    Case("zero3", small=True, checkpointing="none"),
    Case("zero3", small=True, checkpointing="1/2"),
    Case("zero3", small=True, checkpointing="1/3"),
    # Nothing is gathered ahead; nothing is kept; much of both.
    Case("zero3", small=True, changes=(("stage3_prefetch_bucket_size", 0), ("stage3_max_reuse_distance", 0))),
    Case("zero3", small=True, changes=(("stage3_max_reuse_distance", 0),)),
    Case("zero3", small=True, checkpointing="none", changes=(("stage3_prefetch_bucket_size", 0),)),
    Case("zero3", small=True, changes=(("stage3_prefetch_bucket_size", 4000), ("stage3_max_live_parameters", 30_000))),
]
OFFLOADED = [Case(ds, precision) for ds in ("zero2_offload", "zero3_offload") for precision in ("float32", _BF16)]
# A rank of XL on few GPUs has several groups of parameters, updated one after the other.
GROUPED = [Case("zero3", precision, changes=(("sub_group_size", 5000),)) for precision in ("float32", _BF16)]
_PLAIN = [Case("zero3"), Case("zero3", _BF16)]
CASES = {
    2: [*MEASURED, *MESSAGES, *OFFLOADED, *GROUPED, *_PLAIN],
    4: [Case("zero3", _BF16, 2, small=True), Case("zero3_hpz", _BF16, 2, small=True)],
}
RESUMED = [*OFFLOADED, *GROUPED, CASES[4][1]]


class Rank:
    """This process among the ranks."""

    def __init__(self, folder: Path) -> None:
        from igpt_ds.distributed.ranks import launched

        self.folder, self.ranks = folder, launched()

    def play(self, case: Case) -> dict[str, Any]:
        """Four steps: ZeRO-3 learns the order of the modules in two, and what is measured is the last."""
        from deepspeed.comm.comm import comms_logger

        from igpt_ds.distributed.engine import Engine

        config, (ds, division) = case.config(self.ranks.world), case.resolved(self.ranks.world)
        ds["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
        before = tensor_bytes()
        engine = Engine(config, ds, division, self.ranks)
        losses = [self.step(engine, step) for step in range(3)]
        record: dict[str, Any] = {"stays": tensor_bytes() - before}
        comms_logger.comms_dict.clear()
        if case.measured:
            record |= self.peaks(engine)
        else:
            losses.append(self.step(engine, 3))
        record["losses"] = losses
        record["messages"] = {
            operation: {str(size): calls[0] for size, calls in sizes.items()}
            for operation, sizes in comms_logger.comms_dict.items()
        }
        engine.close()
        if case in RESUMED:
            record["resumed"] = self.resumed(case)
        return record

    def resumed(self, case: Case) -> list[float]:
        """Two steps, a checkpoint, an engine that has evaluated other weights and loads it, and two steps."""
        from igpt_ds.checkpoint.read import Checkpoint
        from igpt_ds.distributed.engine import Engine
        from tests.helpers.checkpoints import save

        config, (ds, division) = case.config(self.ranks.world), case.resolved(self.ranks.world)
        path = self.folder / "checkpoints" / f"{self.ranks.world}-{case.name}" / "step-00000002"
        engine = Engine(config, ds, division, self.ranks)
        losses = [self.step(engine, step) for step in range(2)]
        facts = {"identity": {}, "config": {}}
        save(path.parent, 2, engine.state.shards(), facts, self.ranks.rank, self.ranks.world, engine.ranks.any)
        engine.close()
        engine = Engine(config, ds, division, self.ranks)
        tokens = torch.zeros(1, engine.config.sequence_length, dtype=torch.int64)
        engine.evaluate([{"tokens": tokens, "positions": torch.arange(1), "weight": torch.ones(1)}])
        engine.state.load(Checkpoint.open(path))
        losses += [self.step(engine, step) for step in range(2, 4)]
        engine.close()
        return losses

    def step(self, engine: Any, step: int) -> float:
        """One update; the mean loss over all ranks."""
        division, length = engine.division, engine.config.sequence_length
        batches = []
        for a in range(division.accumulation):
            first = (step * division.accumulation + a) * division.world + self.ranks.rank
            drawn = torch.Generator().manual_seed(first)
            tokens = torch.randint(0, COLOURS, (division.micro_batch, length), generator=drawn)
            batches.append({"tokens": tokens, "positions": torch.arange(division.micro_batch)})
        loss, _ = engine.train_step(batches, 1e-3)
        return float(engine.ranks.sum([float(loss)])[0] / division.world)

    def peaks(self, engine: Any) -> dict[str, int]:
        """Bytes beyond those that stay: at the peak of both passes, of the optimiser's step; what is left to it."""
        phases = watch(engine, lambda: self.step(engine, 3)).phases
        passes = max(phases["forward"].peak, phases["backward"].peak)
        return {"passes": passes, "step": phases["optimizer"].peak, "left": phases["backward"].end}


def main() -> None:
    """All cases of this world size, or those alone that were named."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank = Rank(folder)
    records = {case.name: rank.play(case) for case in CASES[rank.ranks.world] if not names or case.name in names}
    record_and_end(folder, rank.ranks, records)


if __name__ == "__main__":
    main()
