"""One rank of the fine-tuning checks: `python -m tests.workers.finetune FOLDER`, started by ranks.py.

Trains all cases of its world size, each from a checkpoint in FOLDER, and records what each step measured there, where
test_finetune_parity.py judges it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.schema import Config, DataConfig, FinetuneConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from tests.helpers.ranks import record_and_end
from tests.workers.parity import COLOURS, RESOLUTION, SEED, images

STEPS, BATCH, CLASSES, RATE, LAYERS = 6, 8, 4, 0.003, 3


@dataclass(frozen=True)
class Case:
    """One way to fine-tune the same network on the same batches."""

    stage: int
    weight: float
    layer: int | None = None
    objective: str = "next_pixel"
    accumulation: int = 1

    @property
    def name(self) -> str:
        return f"zero{self.stage}-weight{self.weight:g}-layer{self.layer}-{self.objective}-{self.accumulation}"

    def config(self, world: int, finetune: bool = True) -> Config:
        """The configuration; without `finetune` that of the pre-training before."""
        section = FinetuneConfig(classes=CLASSES, layer=self.layer, generative_weight=self.weight)
        return Config(
            name="finetune",
            model=ModelConfig(layers=LAYERS, width=32, heads=2),
            data=DataConfig(resolution=RESOLUTION, palette_size=COLOURS),
            objective=ObjectiveConfig(name=self.objective),
            training=TrainingConfig(
                steps=STEPS,
                batch=BATCH,
                learning_rate=RATE,
                warmup_steps=0,
                micro_batch=BATCH // world // self.accumulation,
            ),
            finetune=section if finetune else None,
            seed=SEED,
        )


CASES = {
    1: [Case(0, 0, layer=1), Case(1, 0), Case(2, 1, accumulation=2), Case(3, 0, layer=0)],
    2: [Case(3, 0.5, objective="masked_pixel"), Case(3, 1, layer=2, accumulation=2), Case(3, 0)],
}


def labels(positions: np.ndarray) -> np.ndarray:
    """A class that can be read off the image: the quarter of the palette that it begins in."""
    return images(positions)[:, 0] * CLASSES // COLOURS


def start(folder: Path, objective: str) -> Path:
    """Where the checkpoint lies that the cases of an objective begin with."""
    return folder / objective / "checkpoints" / "step-00000007"


def main() -> None:
    """All that this world size has to show."""
    from igpt_ds.checkpoint.read import Checkpoint
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.distributed.ranks import launched

    folder, ranks = Path(sys.argv[1]), launched()
    results = {}
    for case in CASES[ranks.world]:
        config = case.config(ranks.world)
        division = divide_batch(BATCH, config.training.micro_batch, ranks.world)
        tree = load_ds_config(f"zero{case.stage}")
        if case.stage == 3:
            tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every matrix is divided
        engine = Engine(config, resolve(tree, config, division), division, ranks)
        engine.state.load(Checkpoint.open(start(folder, case.objective)), weights_only=True)
        measured, norms = [], []
        for step in range(STEPS):
            batches = []
            for a in range(division.accumulation):
                begin = step * BATCH + (a * ranks.world + ranks.rank) * division.micro_batch
                positions = np.arange(begin, begin + division.micro_batch)
                arrays = {"tokens": images(positions), "positions": positions, "labels": labels(positions)}
                batches.append({name: torch.from_numpy(array) for name, array in arrays.items()})
            means, norm = engine.train_step(batches, RATE)
            measured.append([total / ranks.world for total in engine.ranks.sum(means.tolist())])
            norms.append(norm)
        positions = np.arange(1000 + 4 * ranks.rank, 1004 + 4 * ranks.rank)
        arrays = {"tokens": images(positions), "positions": positions, "labels": labels(positions)}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        totals, count = engine.evaluate([{**batch, "weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}])
        predictions = engine.predict(batch, [SEED, 77]).tolist()
        results[case.name] = {
            "names": engine.measures,
            "measured": measured,
            "norms": norms,
            "totals": totals,
            "count": count,
            "predictions": predictions,
        }
        engine.close()
    record_and_end(folder, ranks, results)


if __name__ == "__main__":
    main()
