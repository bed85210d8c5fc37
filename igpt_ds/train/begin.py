"""What a training begins with: its configuration, the machine's, and the weights that are named.

Pre-training and fine-tuning alike. A run that has begun knows all of them: config.toml holds the configuration, and in
it `init_from` the weights, by their path ("": random ones); ds.json holds DeepSpeed's.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds import hub
from igpt_ds.checkpoint.names import newest_first
from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import Override, from_tree, load_config
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.loading.splits import open_split
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.train.finetune import defaults
from igpt_ds.train.job import Job
from igpt_ds.train.machine import VALUES, Asked, read_kept


def pretraining(
    preset: str | None,
    run: Run | None,
    data: Sequence[str],
    overrides: Sequence[Override],
    ds: str | None = None,
    weights: Path | None = None,
    fresh: bool = False,
) -> Asked:
    """What a preset or file asks for, or the run directory that is to go on.

    Args:
        ds: the name of a DeepSpeed configuration, or "auto"; None: as the run has it, and "auto" for a new one.
        weights: of any format, that a new run begins with.
    """
    source = preset or (run.config if run is not None and run.config.exists() else None)
    if source is None:
        raise UserError("pretrain: no --preset, and no RUN to go on with: add e.g. --preset tiny")
    begins = _weights(None if fresh else run, weights)
    facts = [*overrides, *_sources(data), *([("init_from", begins)] if begins else [])]
    asked = _asked(source, facts, run, ds, fresh)
    if asked.config.finetune is not None:
        raise UserError(f"{source}: is a fine-tuning: go on with igpt-ds finetune, or choose another RUN")
    return asked


def finetuning(
    weights: Path | None,
    preset: str | None,
    run: Run | None,
    data: str | None,
    overrides: Sequence[str],
    ds: str | None = None,
    scratch: bool = False,
    fresh: bool = False,
) -> Asked:
    """What the run that is to go on asks for, or a new fine-tuning.

    Args:
        weights: a run, one of its checkpoints, or weights of any other format. With `scratch` it gives the model but
            not its weights.
        preset: a model without weights; only with `scratch`.
        ds: as for `pretraining`.
    """
    from igpt_ds.weights.formats import open_weights

    if weights is not None and preset is not None:
        raise UserError("finetune: --from and --preset: each names the model: leave one out")
    if preset is not None and not scratch:
        raise UserError(f"finetune: --preset {preset}: has no weights: add --from-scratch, or use --from RUN instead")
    settings = [*overrides, *_sources([data] if data else [])]
    if run is not None and run.config.exists() and not fresh:
        asked = _asked(run.config, settings, run, ds)
        if asked.config.finetune is None:
            raise UserError(f"{run.path}: is a pre-training: name it with --from, and another RUN")
        _weights(run, None if scratch else weights, scratch)
        return asked
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

    def of_images(images: int, few: bool = False) -> Config:
        tree = defaults(base, begins, images, train.manifest.resolution, few)
        return from_tree(tree, f"fine-tuning from {weights or preset}", settings)

    config = of_images(train.rows)
    if config.finetune is not None and config.finetune.labels:
        config = of_images(config.finetune.labels * len(train.manifest.classes or ()), few=True)
    return Asked(config, _named(ds))


def _asked(
    source: str | Path, facts: Sequence[Override], run: Run | None, ds: str | None, fresh: bool = False
) -> Asked:
    """What a preset or file asks for; or the run's own, in which what the machine has decided is "auto" again."""
    own = run is not None and source == run.config
    kept = read_kept(run) if run is not None and (own or not fresh) else None
    again = [(f"training.{name}", "auto") for name in VALUES if own and kept and name in kept.decided]
    config = load_config(source, [*again, *facts])
    if kept is None or fresh:
        return Asked(config, _named(ds))
    keys = {fact.partition("=")[0].strip() for fact in facts if isinstance(fact, str)}
    anew = [name for name in VALUES if f"training.{name}" in keys and getattr(config.training, name) == "auto"]
    return Asked(config, _named(ds), kept.without([*anew, *(["ds"] if ds == "auto" else [])]))


def _named(ds: str | None) -> dict[str, Any] | None:
    return None if ds in (None, "auto") else load_ds_config(ds)


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
    named, began = named and hub.local(named), load_config(run.config).init_from
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
    if not config.init_from or (run is not None and any(newest_first(run.checkpoints))):
        return
    from igpt_ds.weights.base import check_palette, config_of, require_head
    from igpt_ds.weights.formats import open_weights

    weights = open_weights(Path(config.init_from), verify=False)
    require_head(weights)
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
