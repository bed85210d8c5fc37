"""One rank of the parity and exchange checks: `python -m tests.workers.parity FOLDER`, started by ranks.py.

Runs all cases of its world size one after another in one process group and records losses, gradient norms and
weights in FOLDER, where test_parity.py judges them. DeepSpeed is imported by `main` only, so
that the tests can take the cases and the batches from here.
"""

import sys
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from tests.helpers.ranks import record_and_end

STEPS, BATCH, RESOLUTION, COLOURS = 20, 16, 8, 16
SEED = 5


@dataclass(frozen=True)
class Case:
    """One way to train the same network on the same batches."""

    stage: int = 3
    accumulation: int = 1
    checkpointing: str = "full"
    sharing: int = 1  # ranks that share an image's positions
    objective: str = "next_pixel"
    precision: str = "float32"
    clip: float = 0.0
    width: int = 32
    heads: int = 2
    # As shipped, ZeRO-3 keeps parameters of up to 100,000 elements whole: all of a network this small. Here every
    # matrix is divided, and the buckets are so small that several are in use.
    persistence: int = 0
    bucket: int = 5000
    summed_in: str = ""  # type in which ranks sum up gradients; empty: as shipped

    @property
    def name(self) -> str:
        """Tells apart all cases of one world size."""
        return (
            f"zero{self.stage}-{self.objective}-{self.precision}-accumulation{self.accumulation}"
            f"-checkpointing-{self.checkpointing}-sharing{self.sharing}-clip{self.clip:g}-width{self.width}x{self.heads}"
            f"-persistence{self.persistence}-bucket{self.bucket}{self.summed_in}"
        )

    def config(self, world: int) -> Config:
        """The configuration on so many ranks; only the micro-batch depends on it."""
        return Config(
            name="parity",
            model=ModelConfig(layers=2, width=self.width, heads=self.heads),
            data=DataConfig(resolution=RESOLUTION, palette_size=COLOURS),
            objective=ObjectiveConfig(name=self.objective),
            training=TrainingConfig(
                steps=STEPS,
                batch=BATCH,
                learning_rate=0.003,
                warmup_steps=5,
                gradient_clip=self.clip,
                precision=self.precision,
                micro_batch=BATCH // (world // self.sharing) // self.accumulation,
                sequence_parallel=self.sharing,
                activation_checkpointing=self.checkpointing,
            ),
            seed=SEED,
        )


_BASE = Case()
_ACCUMULATED = replace(_BASE, accumulation=4, checkpointing="none")
# The gradients' type between ranks, chosen: by stage, as each has code of its own.
SUMMED_IN_BFLOAT16 = [replace(_BASE, stage=s, summed_in="bf16") for s in range(4)]
SUMMED_IN_FLOAT32 = [replace(_BASE, stage=s, precision="bfloat16", summed_in="fp32") for s in (1, 2, 3)]
_SHIPPED = replace(_BASE, persistence=100_000, bucket=120_000_000)
_STAGES = [
    replace(_BASE, stage=0, clip=0.5),
    replace(_BASE, stage=1, accumulation=4),
    replace(_BASE, stage=2, accumulation=4),
]
# Interrupted and resumed; their unbroken runs are among CASES.
RESUMED = {
    2: [_BASE, *_STAGES, *(replace(_BASE, stage=s, precision="bfloat16") for s in (1, 2, 3)), _SHIPPED],
    4: [replace(_BASE, width=30)],  # a gain of 30 elements leaves the last of 4 ranks a short slice
}
CASES = {
    1: [
        _BASE,
        _ACCUMULATED,
        replace(_BASE, objective="masked_pixel"),
        replace(_BASE, stage=0, accumulation=4),
        replace(_BASE, stage=1),
        replace(_BASE, stage=1, accumulation=4, precision="bfloat16"),
    ],
    2: [
        *RESUMED[2],
        replace(_BASE, accumulation=4),
        replace(_BASE, checkpointing="none"),
        replace(_BASE, checkpointing="selective"),
        replace(_BASE, sharing=2),
        replace(_BASE, sharing=2, stage=1, accumulation=4, objective="masked_pixel"),
        _ACCUMULATED,
        replace(_BASE, objective="masked_pixel", accumulation=4),
        replace(_BASE, clip=0.5),
        *SUMMED_IN_BFLOAT16,
        *SUMMED_IN_FLOAT32,
    ],
    4: [
        _BASE,
        _ACCUMULATED,
        *RESUMED[4],
        replace(_BASE, sharing=2, accumulation=2, objective="masked_pixel"),
        replace(_BASE, sharing=4, heads=4, checkpointing="selective"),
    ],
}
# On this many ranks: (saved by 2 ranks as, to be loaded as).
LOADED = {
    1: [(_BASE, _BASE), (_BASE, replace(_BASE, stage=0))],
    2: [(_BASE, replace(_BASE, stage=1)), (_STAGES[1], replace(_BASE, accumulation=4))],
    4: [(_BASE, _BASE), (_BASE, _SHIPPED)],
}


def images(positions: np.ndarray) -> np.ndarray:
    """Images that can be learned, as a pure function of their place in the order: int64 [len(positions), n].

    Each counts up through the colours from a start and by a stride of its own.
    """
    start, stride = positions * 7919 % COLOURS, 1 + positions * 104_729 % 3
    return (start[:, None] + stride[:, None] * np.arange(RESOLUTION**2)) % COLOURS


def rate(step: int) -> float:
    """The learning rate of an update: warm-up over 5 steps to 0.003, then half a cosine."""
    return 0.003 * (step + 1) / 5 if step < 5 else 0.0015 * (1 + float(np.cos(np.pi * (step - 5) / (STEPS - 5))))


def saved(folder: Path, case: Case, world: int) -> Path:
    """Where a case's checkpoint of step 10 lies."""
    return folder / "checkpoints" / f"{world}-{case.name}" / "step-00000010"


@contextmanager
def elements_summed() -> Iterator[list[int]]:
    """The size of each tensor that DeepSpeed has all ranks sum up meanwhile."""
    from deepspeed import comm

    real, sizes = comm.all_reduce, list[int]()

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **options)

    comm.all_reduce = counted
    try:
        yield sizes
    finally:
        comm.all_reduce = real


def shortest_wait() -> float:
    """Seconds after which torch gives up waiting in one of the groups of this process."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups if not isinstance(group, int)]
    return min(float(backend.options._timeout.total_seconds()) for backend in backends)


class Rank:
    """This process among the ranks."""

    def __init__(self, folder: Path):
        from igpt_ds.distributed.ranks import launched

        self.folder, self.ranks = folder, launched()
        self.results: dict[str, Any] = {
            name: {} for name in ("parity", "summed", "left_open", "waits", "in_place", "resumed", "loaded")
        }

    def build(self, case: Case, given: Collection[str] = ()) -> Any:
        """A new engine."""
        from igpt_ds.distributed.engine import Engine

        config = case.config(self.ranks.world)
        division = divide_batch(BATCH, config.training.micro_batch, self.ranks.world, case.sharing)
        tree = load_ds_config(f"zero{case.stage}")
        zero = tree["zero_optimization"]
        if case.summed_in:
            tree["communication_data_type"] = case.summed_in
        if case.stage == 3:
            zero["stage3_param_persistence_threshold"] = case.persistence
            zero["stage3_prefetch_bucket_size"] = case.bucket
        if case.stage:
            zero["reduce_bucket_size"] = case.bucket
        return Engine(config, resolve(tree, config, division), division, self.ranks, given)

    def train(self, engine: Any, first: int, last: int) -> dict[str, list[float]]:
        """The losses and gradient norms of the updates first..last, over all ranks."""
        division = engine.division
        losses, norms = [], []
        for step in range(first, last):
            batches = []
            for a in range(division.accumulation):
                begin = (
                    step * BATCH + (a * division.replicas + division.replica(self.ranks.rank)) * division.micro_batch
                )
                positions = np.arange(begin, begin + division.micro_batch)
                tokens = torch.from_numpy(images(positions))
                batches.append({"tokens": tokens, "positions": torch.from_numpy(positions)})
            loss, norm = engine.train_step(batches, rate(step))
            losses.append(engine.ranks.sum([float(loss)])[0] / division.world)
            norms.append(norm)
        return {"losses": losses, "norms": norms}

    def parity(self, case: Case) -> None:
        """20 steps in one go."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        engine = self.build(case)
        before = len(FWD_MODULE_STACK)
        with elements_summed() as summed:
            self.results["parity"][case.name] = self.train(engine, 0, STEPS)
        self.results["summed"][case.name] = sum(summed)
        self.results["left_open"][case.name] = len(FWD_MODULE_STACK) - before
        self.results["waits"][case.name] = shortest_wait()
        engine.close()

    def resumed(self, case: Case) -> None:
        """10 steps, a checkpoint, a new engine that loads it, 10 steps."""
        from igpt_ds.checkpoint.read import KINDS
        from tests.helpers.checkpoints import save

        engine = self.build(case)
        before = self.train(engine, 0, 10)
        path = saved(self.folder, case, self.ranks.world)
        facts = {"identity": {}, "config": {}}
        shards = list(engine.state.shards())
        both = [(s.values(kind).data_ptr(), s.values(kind).data_ptr()) for s in shards for kind in KINDS]
        self.results["in_place"][case.name] = all(first == second for first, second in both)
        save(path.parent, 10, shards, facts, self.ranks.rank, self.ranks.world, engine.ranks.any)
        engine.close()
        after = self.load(path, case)
        self.results["resumed"][case.name] = {key: before[key] + after[key] for key in before}

    def load(self, path: Path, case: Case) -> dict[str, list[float]]:
        """A new engine that loads a checkpoint; the 10 steps after it."""
        from igpt_ds.checkpoint.read import Checkpoint

        checkpoint = Checkpoint.open(path)
        engine = self.build(case, given=checkpoint.tensors)
        engine.state.load(checkpoint)
        after = self.train(engine, 10, STEPS)
        engine.close()
        return after

    def construction(self, case: Case) -> None:
        """How many elements are whole at once while the network is built, and how it is divided thereafter."""
        import deepspeed

        built: list[weakref.ref[torch.nn.Parameter]] = []
        peaks = {"building": 0, "drawing": 0}

        def whole() -> int:
            return sum(p.numel() for p in (ref() for ref in built) if p is not None)

        register, gathered = torch.nn.Module.register_parameter, deepspeed.zero.GatheredParameters

        def counting_register(module: torch.nn.Module, name: str, p: Any) -> None:
            register(module, name, p)
            built.append(weakref.ref(p))
            peaks["building"] = max(peaks["building"], whole())

        class Counting(gathered):  # type: ignore[misc, valid-type]
            def __enter__(self) -> None:
                super().__enter__()
                peaks["drawing"] = max(peaks["drawing"], whole())

        torch.nn.Module.register_parameter = counting_register  # type: ignore[assignment]
        deepspeed.zero.GatheredParameters = Counting
        try:
            engine = self.build(case)
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
            deepspeed.zero.GatheredParameters = gathered
        parameters = dict(engine.module.named_parameters())
        self.results["construction"] = {
            **peaks,
            "parameters": {
                name: {"elements": p.ds_numel, "here": p.ds_tensor.numel(), "whole": p.numel()}
                for name, p in parameters.items()
            },
        }
        weights = {name: p.ds_tensor.detach().numpy() for name, p in parameters.items()}
        np.savez(self.folder / f"weights-{self.ranks.world}-{self.ranks.rank}.npz", **weights)
        engine.close()


def main() -> None:
    """All that this world size has to show."""
    rank = Rank(Path(sys.argv[1]))
    world = rank.ranks.world
    rank.construction(replace(_BASE, width=30))
    for case in CASES[world]:
        rank.parity(case)
    for case in RESUMED.get(world, []):
        rank.resumed(case)
    for source, case in LOADED[world]:
        rank.results["loaded"][f"{source.name} as {case.name}"] = rank.load(saved(rank.folder, source, 2), case)
    record_and_end(rank.folder, rank.ranks, rank.results)


if __name__ == "__main__":
    main()
