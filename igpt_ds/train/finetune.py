"""A fine-tuning before it starts: where its configuration comes from, and what its data and its beginning must fit.

The model, objective, batch and Adam's constants are those of the pre-training, the rate is a tenth of its and constant
(paper sections 3.4 and 4.5). The paper gives no length: a fine-tuning lasts at most EPOCHS, is validated once an epoch,
and ends when `finetune.patience` validations in a row bring no better accuracy. From random weights the rate is the
pre-training's. Every one of these is a default that --set changes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.config.file import from_tree, load_config, to_tree
from igpt_ds.config.schema import Config, replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.loading.splits import open_split
from igpt_ds.run.directory import Run

if TYPE_CHECKING:
    from igpt_ds.weights.base import Weights

EPOCHS = 50
SLOWER = 10  # "often an order of magnitude smaller than that for pre-training" (section 4.5)


def choose_config(
    start: Path | None,
    preset: str | None,
    going_on: Run | None,
    data: str | None,
    overrides: Sequence[str],
    scratch: bool = False,
) -> Config:
    """The configuration of the run that is to go on, or of a new fine-tuning.

    Args:
        start: a run, one of its checkpoints, or weights of any other format. With `scratch` it gives the
            model but not its weights.
        preset: a model without weights; only with `scratch`.
        going_on: a run that has begun.

    Raises:
        UserError: what is named does not belong together, or any fault of the configuration.
    """
    if start is not None and preset is not None:
        raise UserError("finetune: --from and --preset: each tells the model: leave one out")
    if preset is not None and not scratch:
        raise UserError(f"finetune: --preset {preset}: has no weights: add --from-scratch, or use --from RUN instead")
    sources = [f"data.sources={json.dumps([str(Path(data).resolve())])}"] if data else []
    if going_on is not None:
        config = load_config(going_on.config, [*overrides, *sources])
        _check_going_on(config, going_on, start, scratch)
        return config
    if start is None and preset is None:
        raise UserError("finetune: where to begin is not told: add --from RUN, or --from-scratch with --preset NAME")
    if data is None:
        raise UserError("data: none is named: add --data DIR with labelled train/ and val/")
    train = open_split(data, "train")
    if start is not None:
        checkpoint = open_start(start)
        base = from_tree(checkpoint.config, str(checkpoint.path))
        origin = "" if scratch else str(checkpoint.path.resolve())
    else:
        assert preset is not None
        base, origin = load_config(preset), ""
    return from_tree(
        _defaults(base, origin, train.rows, train.manifest.resolution),
        f"fine-tuning from {start or preset}",
        [*overrides, *sources],
    )


def _defaults(base: Config, origin: str, images: int, resolution: int) -> dict[str, Any]:
    tree = to_tree(base)
    epoch = max(1, images // base.training.batch)
    tree["finetune"] = {"start": origin}
    tree["training"] |= {
        "steps": EPOCHS * epoch,
        "learning_rate": base.training.learning_rate / (SLOWER if origin else 1),
        "warmup_steps": 0,
        "schedule": "constant",
        "log_every": 10,
        "validate_every": epoch,
    }
    tree["training"].pop("stop_at", None)
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("sources", "weights")}
    if origin:
        tree["data"]["resolution"] = resolution  # the weights follow: weights.at_resolution
    tree["init_from"] = ""  # how the pre-training began stands with the pre-training
    tree["checkpoint"] |= {"every": epoch, "milestones": []}
    return tree


def _check_going_on(config: Config, run: Run, start: Path | None, scratch: bool) -> None:
    """What is named again must be what the run began with, which stands in its config.toml."""
    if config.finetune is None:
        raise UserError(f"{run.path}: is a pre-training: name it with --from, and another directory with --run")
    began = config.finetune.start
    named = start.resolve() if start and not scratch else None
    if (scratch and began) or (named and not (began and named in (Path(began), *Path(began).parents))):
        raise UserError(
            f"{run.path}: began with {began or 'random weights'}, not with {named or 'random ones'}: "
            "restore --from, or choose another --run"
        )


def open_start(start: Path) -> "Weights":
    """The weights that are named, of a run the newest checkpoint; recorded hashes are not compared here.

    Raises:
        UserError: there is none, or it is a fine-tuning's.
    """
    from igpt_ds.weights.formats import open_weights

    checkpoint = open_weights(start, verify=False)
    if "finetune" in checkpoint.config:
        raise UserError(f"{start}: is a fine-tuning: begin with the pre-training that it began with")
    return checkpoint


def resolve_classes(config: Config, datasets: Sequence[Dataset]) -> Config:
    """Fill in the number of classes; all of the data must have the same ones.

    Raises:
        UserError: no labels, fewer than two classes, other ones in another split, or another number than configured.
    """
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


def check_start(config: Config, run: Run | None, palette_sha256: str) -> None:
    """Hold the data against the checkpoint that a new run is to begin with.

    Raises:
        UserError: the checkpoint is gone or damaged, of another palette or another network.
    """
    from igpt_ds.checkpoint.read import list_checkpoints
    from igpt_ds.run.directory import LOGGER
    from igpt_ds.weights.base import check_palette

    assert config.finetune is not None
    if not config.finetune.start or (run is not None and list_checkpoints(run.checkpoints)):
        return
    checkpoint = open_start(Path(config.finetune.start))
    check_palette(checkpoint, palette_sha256, config.data.sources[0], LOGGER.warning)
    trained = from_tree(checkpoint.config, str(checkpoint.path))
    for what in ("model", "objective"):
        if getattr(trained, what) != getattr(config, what):
            raise UserError(
                f"{checkpoint.path}: its {what} was {getattr(trained, what)}, but now is {getattr(config, what)}: "
                f"leave --set {what}. out, or add --from-scratch"
            )
