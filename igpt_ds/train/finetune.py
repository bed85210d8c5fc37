"""What a fine-tuning takes from its pre-training, and what its data must be.

The model, objective, batch and Adam's constants are those of the pre-training, the rate is a tenth of its and constant
(paper sections 3.4 and 4.5); the machine decides its part anew (machine.py). The paper gives no length: a fine-tuning
lasts at most EPOCHS, is validated once an epoch, and ends when `finetune.patience` validations in a row bring no better
accuracy. From random weights the classification objective is trained alone, which is the paper's baseline, at the
pre-training's rate; from others L_GEN + L_CLF. Every one of these is a default that --set changes.
"""

from collections.abc import Sequence
from typing import Any

from igpt_ds.config.file import to_tree
from igpt_ds.config.schema import Config, replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.train.machine import VALUES

EPOCHS = 50
FEW_STEPS = 20  # between validations at least, where an epoch of few labels is shorter than a batch
SLOWER = 10  # "often an order of magnitude smaller than that for pre-training" (section 4.5)

_OF_PRETRAINING = ("sources", "weights", "fold_validation")  # in [data]


def defaults(base: Config, begins: str, images: int, resolution: int, few: bool = False) -> dict[str, Any]:
    """The tree of a fine-tuning's configuration before --set.

    Args:
        base: of the pre-training, or of a preset.
        begins: path of the weights; "": random ones.
        images, resolution: of the training data.
        few: whether these are `finetune.labels` of each class.
    """
    tree = to_tree(base)
    epoch = max(FEW_STEPS if few else 1, images // base.training.batch)
    tree["finetune"] = {} if begins else {"generative_weight": 0.0}
    tree["training"] |= {
        **dict.fromkeys(VALUES, "auto"),
        "steps": EPOCHS * epoch,
        "learning_rate": base.training.learning_rate / (SLOWER if begins else 1),
        "warmup_steps": 0,
        "schedule": "constant",
        "log_every": 10,
        "validate_every": epoch,
    }
    tree["training"].pop("stop_at", None)
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in _OF_PRETRAINING}
    if begins:
        tree["data"]["resolution"] = resolution  # the weights follow: weights.at_resolution
    tree["init_from"] = begins
    tree["checkpoint"] |= {"every": epoch, "milestones": []}
    return tree


def resolve_classes(config: Config, datasets: Sequence[Dataset]) -> Config:
    """Fill in the number of classes; all of the data must have the same ones."""
    first = datasets[0].manifest.classes
    for dataset in datasets:
        classes = dataset.manifest.classes
        if classes is None:
            raise UserError(f"{dataset.path}: has no labels: build it from class folders with igpt-data shards")
        if classes != first:
            raise UserError(
                f"{dataset.path}: its classes are not those of {datasets[0].path}: build all splits in one go"
            )
    assert first is not None and config.finetune is not None
    stated = config.finetune.classes
    if len(first) < 2 or stated not in (None, len(first)):
        raise UserError(
            f"{datasets[0].path}: has {len(first)} classes, {stated or 'but at least 2'} are needed: "
            "build the data anew, or leave finetune.classes out"
        )
    return replace(config, "finetune", classes=len(first))
