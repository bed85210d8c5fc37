"""What a training begins with: its configuration, the machine's, and the weights that are named.

Pre-training and fine-tuning alike. A run that has begun knows all of them: config.toml holds the configuration, and in
it `init_from` the weights, by their path ("": random ones); ds.json holds DeepSpeed's.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import Override, from_tree, load_config
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.loading.splits import open_split
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.train.finetune import defaults
from igpt_ds.train.job import Job


def pretraining(
    preset: str | None,
    run: Run | None,
    data: Sequence[str],
    overrides: Sequence[str],
    weights: Path | None = None,
    fresh: bool = False,
) -> Config:
    """The configuration of a preset or file, or of the run directory that is to go on.

    Args:
        weights: of any format, that a new run begins with.
    """
    source = preset or (run.config if run is not None and run.config.exists() else None)
    if source is None:
        raise UserError("pretrain: no --preset, and no RUN to go on with: add e.g. --preset tiny")
    begins = _weights(None if fresh else run, weights)
    config = load_config(source, [*overrides, *_sources(data), *([("init_from", begins)] if begins else [])])
    if config.finetune is not None:
        raise UserError(f"{source}: is a fine-tuning: go on with igpt-ds finetune, or choose another RUN")
    return config


def finetuning(
    weights: Path | None,
    preset: str | None,
    run: Run | None,
    data: str | None,
    overrides: Sequence[str],
    scratch: bool = False,
    fresh: bool = False,
) -> Config:
    """The configuration of the run that is to go on, or of a new fine-tuning.

    Args:
        weights: a run, one of its checkpoints, or weights of any other format. With `scratch` it gives the model but
            not its weights.
        preset: a model without weights; only with `scratch`.
    """
    from igpt_ds.weights.formats import open_weights

    if weights is not None and preset is not None:
        raise UserError("finetune: --from and --preset: each names the model: leave one out")
    if preset is not None and not scratch:
        raise UserError(f"finetune: --preset {preset}: has no weights: add --from-scratch, or use --from RUN instead")
    settings = [*overrides, *_sources([data] if data else [])]
    if run is not None and run.config.exists() and not fresh:
        config = load_config(run.config, settings)
        if config.finetune is None:
            raise UserError(f"{run.path}: is a pre-training: name it with --from, and another RUN")
        _weights(run, None if scratch else weights, scratch)
        return config
    if weights is None and preset is None:
        raise UserError("finetune: neither weights nor a model: add --from RUN, or --from-scratch with --preset NAME")
    if data is None:
        raise UserError("data: none is named: add --data DIR with labelled train/ and val/")
    train = open_split(data, "train")
    if preset is not None:
        base, begins = load_config(preset), ""
    else:
        assert weights is not None
        found = open_weights(weights, verify=False)
        if "finetune" in found.config:
            raise UserError(f"{weights}: is a fine-tuning: begin with the pre-training that it began with")
        base, begins = from_tree(found.config, str(found.path)), "" if scratch else _absolute(found.path)
    tree = defaults(base, begins, train.rows, train.manifest.resolution)
    return from_tree(tree, f"fine-tuning from {weights or preset}", settings)


def machine(named: str | None, run: Run | None) -> dict[str, Any]:
    """The DeepSpeed configuration that is named, else that of the run that is to go on, else zero3."""
    begun = run is not None and run.ds_config.exists()
    return load_ds_config(named or (str(run.ds_config) if run is not None and begun else "zero3"))


def _sources(data: Sequence[str]) -> list[Override]:
    # As an override like any other, so that data.weights is held against it.
    return [("data.sources", [_absolute(Path(folder)) for folder in data])] if data else []


def _absolute(path: Path) -> str:
    """As config.toml holds it, so that the run directory can be used from anywhere."""
    text = os.path.realpath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: a name in its path is not UTF-8, which config.toml cannot hold: rename it") from None
    return text


def _weights(run: Run | None, named: Path | None, scratch: bool = False) -> str:
    """Path of the weights that a run begins with: as it has recorded them, or as they are named now; "": none."""
    from igpt_ds.weights.formats import open_weights

    if run is None or not run.config.exists():
        return _absolute(open_weights(named, verify=False).path) if named else ""
    began = load_config(run.config).init_from
    # A run is meant by its checkpoint, and links may lead from where it was to where it is.
    places = [path for place in (Path(began), Path(os.path.realpath(began))) for path in (place, *place.parents[:2])]
    same = not named or (began and not {named.absolute(), Path(os.path.realpath(named))}.isdisjoint(places))
    if not same or (scratch and began):
        raise UserError(
            f"{run.path}: began with {began or 'random weights'}, not with {named or 'random ones'}: leave --from out, "
            "or choose another RUN"
        )
    return began


def check_weights(job: Job, run: Run | None) -> None:
    """Hold a training that has no checkpoint yet against the weights that it is to begin with."""
    config = job.config
    if not config.init_from or (run is not None and list_checkpoints(run.checkpoints)):
        return
    from igpt_ds.weights.base import check_palette, config_of
    from igpt_ds.weights.formats import open_weights

    weights = open_weights(Path(config.init_from), verify=False)
    trained = config_of(weights)
    check_palette(weights, job.train_sets[0].palette.sha256, job.train_sets[0].path, LOGGER.warning)
    facts = [
        ("model", trained.model, config.model),
        ("objective", trained.objective.name, config.objective.name),
        ("palette_size", trained.palette_size, config.palette_size),
    ]
    for what, theirs, ours in facts:
        if theirs != ours:
            raise UserError(
                f"--from {weights.path}: its {what} is {theirs}, but the run's is {ours}: choose the preset of this "
                "shape, or mend it by --set"
            )
