"""One rank of the feature checks: `python -m tests.workers.features DATA RUN FOLDER`, started by ranks.py.

Takes the same features with the whole network on every rank and with one that ZeRO-3 divides, and leaves both in
FOLDER.
"""

import json
import os
import sys
from pathlib import Path

from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import launched
from igpt_ds.features.cache import cached
from igpt_ds.features.extract import Network, Recipe
from igpt_ds.weights.base import config_of


def main() -> None:
    data, run, folder = (Path(argument) for argument in sys.argv[1:4])
    ranks, dataset = launched(), Dataset.open(data / "val")
    checkpoint = Checkpoint.open(next((run / "checkpoints").glob("step-*")))
    config = config_of(checkpoint)
    recipe = Recipe(tuple(range(config.model.layers + 1)))
    # As shipped, ZeRO-3 keeps a network this small whole on every rank.
    tree = load_ds_config("zero3")
    tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    divided = folder / f"zero3-{ranks.rank}.json"
    divided.write_text(json.dumps(tree))
    with ranks.meeting():
        for name, ds in (("whole", None), ("divided", str(divided))):
            network = Network(config, checkpoint, recipe, ranks, ds, batch=7)
            for _ in range(2):  # the second time from the cache, which only rank 0 looks at
                found = cached(network, dataset, folder / name, name, images=60, mask_seed=11)
            network.close()
            assert found.layers.shape == (len(recipe.layers), 60, config.model.width)  # every rank gets them
    sys.stdout.flush()
    # DeepSpeed's threads and hooks need seconds to wind up.
    os._exit(0)


if __name__ == "__main__":
    main()
