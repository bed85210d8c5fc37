"""One rank of the sampling checks: `python -m tests.workers.sampling RUN DATA FOLDER`, started by ranks.py.

Draws the same completions from the network of RUN's checkpoint, divided by DeepSpeed in several ways, and takes steps
of a training with and without samples in between. Leaves all of it in FOLDER, where test_sheet.py judges it.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.schema import replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import launched
from igpt_ds.model.sampling import Drawing
from igpt_ds.weights.base import config_of
from tests.helpers.ranks import record_and_end
from tests.igpt_ds.samples.test_sheet import CASES


def main() -> None:
    from igpt_ds.distributed import engine as engines
    from igpt_ds.distributed.engine import Engine

    run, data, folder = (Path(argument) for argument in sys.argv[1:4])
    ranks, checkpoint = launched(), Checkpoint.open(next((run / "checkpoints").glob("step-*")))
    tokens = torch.from_numpy(Dataset.open(data / "val").images(8).astype(np.int64))
    prefix, drawing = tokens[:5, :24], Drawing(3, 1.2, 12, 0.95)
    config = replace(config_of(checkpoint), "training", batch=8, micro_batch=4)
    memory = engines.free_bytes

    def build(stage: int, persistence: int) -> Any:
        tree = load_ds_config(f"zero{stage}")
        if stage == 3:
            # As shipped, ZeRO-3 keeps a network this small whole on every rank.
            tree["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
        division = divide_batch(8, 4, ranks.world)
        engine = Engine(config, resolve(tree, config, division), division, ranks)
        engine.state.load(checkpoint, weights_only=True)
        return engine

    def step(engine: Any) -> list[float]:
        own = tokens[4 * ranks.rank : 4 * ranks.rank + 4]
        loss, norm = engine.train_step([{"tokens": own, "positions": torch.arange(4)}], 0.01)
        return [float(loss), norm]

    def drawn(engine: Any, way: str) -> Any:
        # Memory for the keys and values of two images, but not for the weights as well; on one rank only.
        scarce = 2 * 2 * 2 * 2 * 64 * 32 * 4
        engines.free_bytes = (lambda *_: scarce) if way == "divided" and ranks.rank else memory
        found = engine.sample(prefix, drawing)
        engines.free_bytes = memory
        return None if found is None else found.tolist()

    record: dict[str, Any] = {"cases": {}, "losses": [], "losses with samples": [], "beats": {}}
    for way, stage, persistence in CASES:
        engine = build(stage, persistence)
        record["cases"][f"{way} zero{stage} {persistence}"] = drawn(engine, way)
        engine.close()
    plain = build(3, 0)
    record["losses"] = [step(plain) for _ in range(4)]
    plain.close()
    engine, kept = build(3, 0), []
    for number in range(4):
        record["losses with samples"].append(step(engine))
        before = torch.get_rng_state()
        drawn(engine, ("whole", "divided")[number % 2])
        kept.append(torch.equal(torch.get_rng_state(), before) and engine.module.training)
    record["state kept"] = all(kept)
    weights = sum(p.ds_numel * 4 for p in engine.module.parameters())
    for name, images in (("one at once", 1), ("all at once", 3)):
        beats: list[None] = []
        room = 2 * (weights + images * 2 * 2 * 64 * 32 * 4)
        engines.free_bytes = lambda *_, room=room: room
        engine.sample(prefix, drawing, lambda beats=beats: beats.append(None))
        record["beats"][name] = len(beats)
    engines.free_bytes = lambda *_: 1000
    record["lacking"] = engine.sample(prefix, drawing)
    engine.close()
    record_and_end(folder, ranks, record)


if __name__ == "__main__":
    main()
