"""The end of a fine-tuning: the checkpoint of the best validation, tested once (paper sections 3.1, 4.5 and 4.6)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from igpt_ds.atomic import publish_text
from igpt_ds.checkpoint.names import step_directory
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import RunError
from igpt_ds.lock import Lock
from igpt_ds.reading import read_json
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.train.job import Job
from igpt_ds.train.resume import Progress, open_verified

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import Batch


def conclude(engine: "Engine", job: Job, run: Run, progress: Progress, lock: Lock | None = None) -> None:
    """Write RUN/result.json: the accuracy on test/ where it was asked for, else the best one on val/. A collective.

    A result that is there already and tells the same is left: a test split is looked at once.

    Args:
        lock: that of the run, on rank 0.

    Raises:
        RunError: the best checkpoint could not be saved when it was due.
    """
    split = "test" if job.test_set else "val"
    path = run.path / "result.json"
    best = progress.best[0] if progress.best else progress.step
    facts = {**_facts(job, best), "split": split, "steps": progress.step}
    recorded = engine.ranks.from_rank_0(_recorded(path))
    masks_recorded = recorded.get("masks")
    count = masks_recorded.get("count") if isinstance(masks_recorded, dict) else 0
    if all(recorded.get(key) == value for key, value in facts.items()) and count == job.masks:
        return
    dataset = job.test_set or job.validation_set
    assert dataset is not None, "prepare lets nothing else pass"
    if best != progress.step and (job.test_set or job.masks):
        directory = step_directory(run.checkpoints, best)
        if not engine.ranks.from_rank_0(directory.exists()):
            raise RunError(f"{directory}: the best checkpoint was not saved, the disk being full, say: --fresh --force")
        engine.state.load(open_verified(engine.ranks, directory), weights_only=True)
    measured = {"accuracy": progress.best[1]} if progress.best else {}
    if job.test_set or not progress.best:
        try:
            totals, images = engine.evaluate(_batches(engine, job, dataset, "test"))
        except RunError as error:
            raise RunError(f"{dataset.path}: {error}: no result is written") from None
        measured = {name: total / images for name, total in zip(engine.measures, totals, strict=True)}
    masks = {"count": job.masks, "accuracy": _ensemble(engine, job, dataset)} if job.masks else None
    if engine.ranks.rank == 0:
        validation = None
        if progress.best and job.validation_set:
            validation = {"accuracy": progress.best[1], "n": job.validation_set.rows}
        from igpt_ds.features.splits import chance

        alone = chance(job.train_sets[0], dataset)
        result = {**facts, **measured, "n": dataset.rows, "chance": alone, "validation": validation, "masks": masks}
        if lock is not None:
            lock.require()
        publish_text(path, json.dumps(result, indent=2) + "\n")
        with_masks = f", {masks['accuracy']:.4f} with {job.masks} masks" if masks else ""
        LOGGER.info(
            f"best checkpoint: step {best}: accuracy on {split} {measured['accuracy']:.4f}{with_masks} "
            f"(n = {dataset.rows}); written: {path}"
        )


def _recorded(path: Path) -> dict[str, Any]:
    """The result that is there; {} if it is none."""
    try:
        result = read_json(path)
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _facts(job: Job, best: int) -> dict[str, Any]:
    """What tells one result from another."""
    config = job.config
    finetune = config.finetune
    assert finetune is not None
    step = config.init_from.rpartition("step-")[2]
    return {
        "kind": "finetune",
        "model": config.name,
        "objective": config.objective.name,
        "from": {"checkpoint": config.init_from, "step": int(step) if step.isdecimal() else None}
        if config.init_from
        else None,
        "best_step": best,
        "classes": finetune.classes,
        "layer": config.class_layer,
        "generative_weight": finetune.generative_weight,
        "augmentation": finetune.augmentation,
        "dropout": finetune.dropout,
        "fold_validation": config.folded,
        "labels": finetune.labels,
        "learning_rate": config.training.learning_rate,
        "batch": config.training.batch,
        "seed": config.seed,
        "train_images": sum(dataset.rows for dataset in job.train_sets),
    }


def _batches(engine: "Engine", job: Job, dataset: Dataset, title: str) -> "Iterator[Batch]":
    """The dataset's batches of this rank, with a progress bar on rank 0."""
    from igpt_ds.loading.loader import evaluation_batches

    ranks, size = engine.ranks, job.division.micro_batch
    total = -(-dataset.rows // (size * ranks.world))
    batches = evaluation_batches(dataset, size, ranks.rank, ranks.world, labelled=True)
    quiet = True if ranks.rank else None
    return iter(tqdm(batches, desc=title, total=total, unit=" batches", leave=False, disable=quiet))


def _ensemble(engine: "Engine", job: Job, dataset: Dataset) -> float:
    """Accuracy of the modal prediction under independent masks."""
    from igpt_ds.features.masks import mask_seed, vote

    split = "test" if job.test_set else "val"
    seeds = [mask_seed(job.config.seed, split, number) for number in range(job.masks)]
    right = bad = 0.0
    for batch in _batches(engine, job, dataset, f"{job.masks} masks"):
        found_MB = engine.predict(batch, seeds)
        modal_B = vote(found_MB, batch["positions"], job.config)
        right += float(((modal_B == batch["labels"]) * batch["weight"]).sum())
        bad += float(((found_MB < 0).any(dim=0) * batch["weight"]).sum())
    right, bad = engine.ranks.sum([right, bad])
    if bad:
        raise RunError(f"{dataset.path}: the scores of {bad:.0f} of {dataset.rows} images are not finite: no result")
    return right / dataset.rows
