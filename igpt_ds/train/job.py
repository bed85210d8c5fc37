"""A training before it starts: all that can be read and refused without a GPU."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from igpt_ds.atomic import publish_text
from igpt_ds.config.batch import Division, divide_batch
from igpt_ds.config.file import to_toml
from igpt_ds.config.schema import Config, identity, replace
from igpt_ds.config.size import flops_per_image, parameter_count
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.loading.order import Order
from igpt_ds.loading.splits import few_labels, folded_weights, open_held_out, open_split, resolve_data
from igpt_ds.planner.choose import Here
from igpt_ds.planner.report import Machine, make_plan
from igpt_ds.planner.text import plan_text
from igpt_ds.run.directory import Run
from igpt_ds.text import aligned
from igpt_ds.train.finetune import resolve_classes
from igpt_ds.train.machine import Asked, Settled, settle


@dataclass(frozen=True)
class Job(Settled):
    """A training whose input has been read and found fit, on a machine.

    Attributes:
        asked: what the command asks for, its data facts resolved.
        test_set: what a fine-tuning's best checkpoint is to be tested on at the end.
        masks: independent masks whose modal prediction is reported as well then (BERT only); 0: none.
    """

    asked: Asked
    train_sets: list[Dataset]
    validation_set: Dataset | None
    order: Order
    test_set: Dataset | None = None
    masks: int = 0

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        return {
            **identity(self.config),
            "palette_sha256": self.train_sets[0].palette.sha256,
            "data_order": self.order.fingerprint,
        }

    def on(self, here: Here, asked: Asked) -> "Job":
        """The same job as all ranks see the machine, and what is asked of it."""
        return dataclasses.replace(self, **vars(settle(asked, here)), asked=asked)

    def record(self, run: Run) -> None:
        """Write what is trained into the run directory, so that the run can go on by it alone."""
        publish_text(run.config, to_toml(replace(self.config, "training", stop_at=None)))
        publish_text(run.ds_config, json.dumps(self.ds_record(), indent=2) + "\n")
        self.train_sets[0].palette.save(run.palette)


def prepare(asked: Asked, here: Here, *, test: bool = False, masks: int = 0) -> Job:
    """Open and check everything that can be checked before any process group exists.

    Args:
        here: the machine that is to decide.
        test, masks: of a fine-tuning; see `Job`.
    """
    from igpt_ds.loading.loader import source_rows

    config = asked.config
    if not config.data.sources:
        raise UserError("data: none is named: add --data DIR (built by igpt-data shards)")
    recipe = config.training
    divide_batch(recipe.batch, recipe.micro_batch, here.ranks, recipe.sequence_parallel)
    train_sets = [open_split(source, "train") for source in config.data.sources]
    validation_set = None
    if recipe.validate_every and not config.folded:
        validation_set = open_split(config.data.sources[0], "val", " or set training.validate_every=0")
    test_set = open_split(config.data.sources[0], "test") if test else None
    weights = config.data.weights or None
    if config.folded:
        held_out = [open_held_out(source) for source in config.data.sources]
        weights = folded_weights(weights, train_sets, held_out)
        train_sets += filter(None, held_out)
    opened = [*train_sets, *(dataset for dataset in (validation_set, test_set) if dataset)]
    config = resolve_data(config, opened)
    rate, pixels = config.objective.mask_rate, config.sequence_length
    if config.objective.name == "masked_pixel" and rate * pixels < 1:
        # Most images would hide nothing, and have a loss of 0.
        raise UserError(f"objective.mask_rate {rate}: hides less than one of {pixels} pixels: raise it")
    if config.finetune is not None:
        config = resolve_classes(config, opened)
        if config.folded and not test:
            raise UserError("data.fold_validation=true: leaves nothing to report the accuracy of: add --split test")
        if masks and config.causal:
            raise UserError(f"--masks {masks}: {config.objective.name} hides nothing: leave it out")
        if config.finetune is not None and (count := config.finetune.labels):
            train_sets = [few_labels(dataset, count, config.seed) for dataset in train_sets]
    order = Order(config.seed, [source_rows(dataset) for dataset in train_sets], weights, config.data.window)
    asked = dataclasses.replace(asked, config=config)
    return Job(
        **vars(settle(asked, here)),
        asked=asked,
        train_sets=train_sets,
        validation_set=validation_set,
        order=order,
        test_set=test_set,
        masks=masks,
    )


def dry_run(job: Job, machine: Machine) -> str:
    """What would be trained, and the plan of it: memory, messages, time and disk."""
    told = ("objective", "begins with", "classes", "data", "length", "decided")
    images = sum(dataset.rows for dataset in job.train_sets)
    return (
        aligned([row for row in _rows(job) if row[0] in told])
        + "\n"
        + plan_text(make_plan(job.layout, machine, images))
    )


def summary(job: Job) -> str:
    """What is about to be trained, for the log."""
    return aligned(_rows(job))


def _rows(job: Job) -> list[tuple[str, str]]:
    config, division = job.config, job.division
    flops = flops_per_image(config) * config.training.batch
    share = job.order.weights[0] / sum(job.order.weights)
    epochs = config.training.steps * config.training.batch * share / job.order.epoch_rows(0)
    return [
        (
            "model",
            f"{config.name}: {parameter_count(config):,} parameters, {config.model.layers} layers of "
            f"{config.model.width}, {config.model.heads} heads",
        ),
        (
            "objective",
            f"{config.objective.name}, {config.sequence_length} tokens of {config.palette_size} colours",
        ),
        *([("begins with", config.init_from or "random weights")] if config.init_from or config.finetune else []),
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
        ("decided", job.how),
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
        (
            "classes",
            f"{finetune.classes} from layer {config.class_layer}, L_CLF + {finetune.generative_weight:g} L_GEN, "
            f"{f'{finetune.labels} labels each, ' if finetune.labels else ''}"
            f"augmentation {finetune.augmentation}, dropout {finetune.dropout:g}, patience {finetune.patience}",
        ),
    ]
