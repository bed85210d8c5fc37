"""A training before it starts: all that can be read and refused without a GPU."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.checkpoint.read import list_checkpoints
from igpt_ds.config import size as plan
from igpt_ds.config.batch import Division, divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config, identity
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.loading.order import Order
from igpt_ds.loading.splits import open_split, resolve_data
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import bytes_per_rank
from igpt_ds.planner.report import Machine, make_plan
from igpt_ds.planner.text import plan_text
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.train.finetune import resolve_classes


@dataclass(frozen=True)
class Job:
    """A training whose input has been read and found fit.

    Attributes:
        test_set: what a fine-tuning's best checkpoint is to be tested on at the end.
        masks: independent masks whose modal prediction is reported as well then (BERT only); 0: none.
        ranks_per_node: GPUs of a machine.
    """

    config: Config
    ds: dict[str, Any]
    division: Division
    train_sets: list[Dataset]
    validation_set: Dataset | None
    order: Order
    test_set: Dataset | None = None
    masks: int = 0
    ranks_per_node: int = 1

    @property
    def layout(self) -> Layout:
        """The job on its machines, for the planner."""
        return Layout(self.config, self.ds["zero_optimization"], self.division, self.ranks_per_node)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        return {
            **identity(self.config),
            "palette_sha256": self.train_sets[0].palette.sha256,
            "data_order": self.order.fingerprint,
        }


def choose_config(
    preset: str | None,
    run: Run | None,
    data: Sequence[str],
    overrides: Sequence[str],
    init_from: Path | None = None,
    fresh: bool = False,
) -> Config:
    """The configuration of a preset or file, or of the run directory that is to go on.

    Args:
        init_from: weights of any format that a new run begins with; a run that has begun knows its own.

    Raises:
        UserError: neither is named, or any fault of the configuration.
    """
    source = preset or (run.config if run is not None and run.config.exists() else None)
    if source is None:
        raise UserError("pretrain: no --preset, and no --run to go on with: add e.g. --preset tiny")
    # As an override like any other, so that data.weights is held against it; absolute, so that the run directory
    # can be used from anywhere.
    sources = [f"data.sources={json.dumps([str(Path(folder).resolve()) for folder in data])}"] if data else []
    begins = _beginning(run if not fresh else None, init_from)
    config = load_config(source, [*overrides, *sources, *([f"init_from={json.dumps(begins)}"] if begins else [])])
    if config.finetune is not None:
        raise UserError(f"{source}: is a fine-tuning: go on with igpt-ds finetune, or choose another --run")
    return config


def _beginning(run: Run | None, init_from: Path | None) -> str:
    """Path of the weights that a run begins with: as it has recorded them, or as they are named now; "": none.

    Raises:
        UserError: there are none, or others than the run began with.
    """
    from igpt_ds.weights.formats import open_weights

    if run is None or not run.config.exists():
        return str(open_weights(init_from, verify=False).path.resolve()) if init_from else ""
    began = load_config(run.config).init_from
    named = init_from.resolve() if init_from else None
    if named and not (began and named in (Path(began), *Path(began).parents)):
        raise UserError(f"{run.path}: began with {began or 'random weights'}: leave --init-from out, or choose another")
    return began


def check_beginning(job: Job, run: Run | None) -> None:
    """Hold a new pre-training against the weights that it is to begin with.

    Raises:
        UserError: they are gone, or of another network, objective or palette.
    """
    config = job.config
    if not config.init_from or (run is not None and list_checkpoints(run.checkpoints)):
        return
    from igpt_ds.weights.base import check_palette, config_of
    from igpt_ds.weights.formats import open_weights

    weights = open_weights(Path(config.init_from), verify=False)
    trained = config_of(weights)
    palette = job.train_sets[0].palette
    check_palette(weights, palette.sha256, job.train_sets[0].path, LOGGER.warning)
    facts = [
        ("model", trained.model, config.model),
        ("objective", trained.objective.name, config.objective.name),
        ("palette_size", trained.palette_size, config.palette_size),
    ]
    for what, theirs, ours in facts:
        if theirs != ours:
            raise UserError(
                f"--init-from {weights.path}: its {what} is {theirs}, but the run's is {ours}: choose the preset of "
                "this shape, or mend it by --set"
            )


def prepare(
    config: Config, ds_source: str, world: int, *, ranks_per_node: int = 1, test: bool = False, masks: int = 0
) -> Job:
    """Open and check everything that can be checked before any process group exists.

    Args:
        ranks_per_node: of one machine.
        test, masks: of a fine-tuning; see `Job`.

    Raises:
        UserError: see the functions that this calls.
    """
    from igpt_ds.loading.loader import source_rows

    if not config.data.sources:
        raise UserError("data: none is named: add --data DIR (built by igpt-data shards)")
    division = divide_batch(
        config.training.batch, config.training.micro_batch, world, config.training.sequence_parallel
    )
    ds = resolve(load_ds_config(ds_source), config, division, ranks_per_node)
    train_sets = [open_split(source, "train") for source in config.data.sources]
    validation_set = None
    if config.training.validate_every:
        validation_set = open_split(config.data.sources[0], "val", " or set training.validate_every=0")
    test_set = open_split(config.data.sources[0], "test") if test else None
    if config.finetune is not None and config.finetune.fold_validation:
        train_sets += [open_split(source, "val") for source in config.data.sources]
    opened = [*train_sets, *(dataset for dataset in (validation_set, test_set) if dataset)]
    config = resolve_data(config, opened)
    if config.finetune is not None:
        config = resolve_classes(config, opened)
        if config.finetune is not None and config.finetune.fold_validation and not test:
            raise UserError("finetune.fold_validation=true: leaves nothing to report the accuracy of: add --test")
        if masks and config.causal:
            raise UserError(f"--masks {masks}: {config.objective.name} hides nothing: leave it out")
    order = Order(
        config.seed,
        [source_rows(dataset) for dataset in train_sets],
        config.data.weights or None,
        config.data.window,
    )
    return Job(config, ds, division, train_sets, validation_set, order, test_set, masks, ranks_per_node)


def dry_run(job: Job, machine: Machine) -> str:
    """What would be trained, and the plan of it: memory, messages, time and disk."""
    told = ("objective", "begins with", "classes", "data", "length")
    rows = [f"{key:<10}  {text}" for key, text in _rows(job) if key in told]
    images = sum(dataset.rows for dataset in job.train_sets)
    return "\n".join([*rows, plan_text(make_plan(job.layout, machine, images))])


def summary(job: Job) -> str:
    """What is about to be trained, for the log."""
    return "\n".join(f"{key:<10} {text}" for key, text in _rows(job))


def _rows(job: Job) -> list[tuple[str, str]]:
    config, division = job.config, job.division
    stage = job.ds["zero_optimization"]["stage"]
    memory = bytes_per_rank(job.layout)
    flops = plan.flops_per_image(config) * config.training.batch
    share = job.order.weights[0] / sum(job.order.weights)
    epochs = config.training.steps * config.training.batch * share / job.order.epoch_rows(0)
    return [
        (
            "model",
            f"{config.name}: {plan.parameter_count(config):,} parameters, {config.model.layers} layers of "
            f"{config.model.width}, {config.model.heads} heads",
        ),
        (
            "objective",
            f"{config.objective.name}, {config.sequence_length} tokens of {config.palette_size} colours",
        ),
        *([("begins with", config.init_from)] if config.init_from else []),
        *_classification(config),
        ("data", ", ".join(f"{s.path} ({s.rows:,} images)" for s in job.train_sets)),
        (
            "batch",
            f"{division.batch} = {_replicas(division)} x {division.micro_batch} x {division.accumulation} accumulated",
        ),
        (
            "length",
            f"{config.training.steps:,} steps, {epochs:.3g} epochs of the first source",
        ),
        (
            "compute",
            f"{flops:.3g} FLOPs a step, {flops * config.training.steps:.3g} in all "
            f"(6 N and {'causal' if config.causal else 'full'} attention, recomputation not counted)",
        ),
        (
            "memory",
            f"{memory.total / 2**30:.3g} GiB a rank by plan, ZeRO stage {stage}: weights, gradients and Adam's states "
            f"{memory.states / 2**30:.3g}, buffers {memory.buffers / 2**30:.3g}, activations "
            f"{memory.activations / 2**30:.3g}, weights gathered {memory.live / 2**30:.3g}",
        ),
    ]


def _replicas(division: Division) -> str:
    if division.sequence_parallel == 1:
        return f"{division.world} ranks"
    return f"{division.replicas} replicas of {division.sequence_parallel} ranks"


def _classification(config: Config) -> list[tuple[str, str]]:
    finetune = config.finetune
    if finetune is None:
        return []
    return [
        ("begins with", finetune.start or "random weights"),
        (
            "classes",
            f"{finetune.classes} from layer {config.class_layer}, L_CLF + {finetune.generative_weight:g} L_GEN, "
            f"augmentation {finetune.augmentation}, dropout {finetune.dropout:g}, patience {finetune.patience}",
        ),
    ]
