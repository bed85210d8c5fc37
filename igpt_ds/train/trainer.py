"""Pre-training and fine-tuning: build, resume, train, close; and the one loop."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import igpt_ds
from igpt_ds.atomic import publish_text
from igpt_ds.checkpoint import read as checkpoint
from igpt_ds.checkpoint.write import Saver
from igpt_ds.config.file import to_toml, to_tree
from igpt_ds.config.schema import replace
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.loading.augment import crop_and_flip
from igpt_ds.run.directory import LOGGER, Run, log_to
from igpt_ds.run.metrics import Metrics, require_wandb
from igpt_ds.train.job import Job, summary
from igpt_ds.train.result import conclude
from igpt_ds.train.resume import Progress, check_identity, resume, roll_back
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.signals import StopRequest, tell_job_script
from igpt_ds.train.throughput import Meter, training_line
from igpt_ds.train.watchdog import Watchdog

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import Batch

Batches = Generator["Batch", None, None]


def pretrain(
    job: Job,
    run: Run,
    ranks: Ranks,
    *,
    fresh: bool = False,
    force: bool = False,
    allow_change: tuple[str, ...] = (),
    wandb_project: str | None = None,
) -> None:
    """Train until `training.steps` (or `stop_at`, or a request); go on from the newest whole checkpoint.

    A fine-tuning also ends where its accuracy gets no better, and then writes its result.

    Raises:
        UserError: the run directory, its checkpoints or the device do not fit the job.
        RunError: the loss is lost for good.
    """
    stop = StopRequest()
    if wandb_project:
        require_wandb()
    # Refusals first, on every rank alike; only then the ranks meet, and rank 0 makes the directory for all.
    if fresh:
        run.require_fresh(force)
    else:
        check_identity(job, run, allow_change)
    if ranks.rank == 0:
        run.require_writable()
    from igpt_ds.distributed.engine import Engine, require_precision
    from igpt_ds.loading.loader import shard_labels, train_batches

    require_precision(job.config)
    labels, augment = None, None
    if job.config.finetune is not None:
        labels = [shard_labels(dataset, job.config.classes) for dataset in job.train_sets]
        if job.config.finetune.augmentation == "crop_flip":
            augment = functools.partial(crop_and_flip, seed=job.config.seed)
    ranks.join()
    if ranks.rank == 0:
        if fresh:
            run.clear()
        run.create()
    ranks.any(False)  # all wait for it
    watchdog = Watchdog(run.path, ranks.rank, ranks.world, job.config.health.hang_timeout, log_to(run, ranks.rank))
    engine = Engine(job.config, job.ds, job.division, ranks)
    progress = resume(engine, job, run)
    metrics = None
    if ranks.rank == 0:
        publish_text(run.config, to_toml(replace(job.config, "training", stop_at=None)))
        publish_text(run.ds_config, json.dumps(job.ds, indent=2) + "\n")
        job.train_sets[0].palette.save(run.palette)
        metrics = Metrics(run.path, progress.step, to_tree(job.config), wandb_project)
        LOGGER.info(summary(job))

    def batches_after(progress: Progress) -> Batches:
        return train_batches(
            job.train_sets,
            job.order,
            batch=job.config.training.batch,
            micro_batch=job.division.micro_batch,
            rank=job.division.replica(ranks.rank),
            world=job.division.replicas,
            start_step=progress.step,
            left_out=progress.left_out,
            workers=job.config.data.workers,
            labels=labels,
            augment=augment,
        )

    progress = train(engine, batches_after, job, run, progress, metrics, stop, watchdog)
    ended = progress.step >= job.config.training.steps or progress.ended_early(job.config)
    if job.config.finetune is not None and ended and not engine.ranks.any(stop.reason is not None):
        conclude(engine, job, run, progress)
    if metrics is not None:
        metrics.close()
    stop.end()
    engine.close()
    ranks.leave()


def train(
    engine: "Engine",
    batches_after: Callable[[Progress], Batches],
    job: Job,
    run: Run,
    progress: Progress,
    metrics: Metrics | None,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Progress:
    """The loop: step, judge, log, validate, save, stop. `metrics` is rank 0's; a step counts completed steps."""
    config, recipe, ranks = job.config, job.config.training, engine.ranks
    end = recipe.stop_at or recipe.steps
    if progress.step >= end or progress.ended_early(config):
        LOGGER.info(
            f"already at step {progress.step} of {end}: nothing to do "
            "(a later training.stop_at or more training.steps go on)"
        )
        return progress
    stop.listen()
    watchdog.start()
    saver = Saver(run.checkpoints, ranks.rank, ranks.world, engine.ranks.any, ranks.neighbours)
    meter = Meter(config, engine)
    stream = batches_after(progress)
    save_due = last = False
    while not last:
        micro_batches = itertools.islice(stream, job.division.accumulation)
        watched = watchdog.over(meter.waited(micro_batches), "loading data", "computing a step", progress.step)
        rate = learning_rate(progress.step, recipe)
        means, gradient_norm = engine.train_step(watched, rate)
        progress.step += 1
        meter.count_step()

        watchdog.beat("waiting for the other ranks", progress.step)
        if ranks.rank == 0:
            stop.look(run.path)
        *sums, stops, requeues, saves, writing = engine.ranks.sum(
            [*means.tolist(), stop.reason is not None, stop.by_scheduler, stop.save, saver.busy]
        )
        measured = dict(zip(engine.measures, (total / ranks.world for total in sums), strict=True))
        nats, stopped = measured["loss"], stops > 0
        verdict = progress.stability.judge(nats, gradient_norm)
        if verdict != "good":
            tell_bad_step(progress, verdict, nats, gradient_norm, metrics)
        if progress.stability.lost and not stopped:
            finish_save(saver, job, run, progress)
            stream.close()
            progress = roll_back(engine, job, run, progress, metrics)
            stream = batches_after(progress)
            save_due = False
            meter.restart()
            continue

        last = stopped or progress.step == end
        save_due |= (
            last
            or saves > 0
            or progress.step % config.checkpoint.every == 0
            or progress.step in config.checkpoint.milestones
        )
        if (progress.step % recipe.log_every == 0 or save_due) and verdict != "skipped" and math.isfinite(nats):
            line = {
                "step": progress.step,
                **shown(measured),
                "lr": rate,
                "grad_norm": gradient_norm,
                **meter.read(remaining=end - progress.step),
            }
            if metrics is not None:
                metrics.write(line)
                LOGGER.info(training_line(line, recipe.steps))

        if job.validation_set is not None and (progress.step % recipe.validate_every == 0 or progress.step == end):
            best, ended = validate(engine, job, progress, metrics, watchdog)
            meter.restart()
            save_due, last = save_due or best or ended, last or ended

        draw_samples(engine, job, run, progress, metrics, watchdog, meter)

        if saver.pending is not None and not writing:
            finish_save(saver, job, run, progress)
        # What may turn out to be the beginning of a divergence is not worth keeping.
        if save_due and (last or not progress.stability.bad):
            watchdog.beat("saving", progress.step)
            begin_save(engine, saver, job, run, progress, last)
            save_due = False
            meter.restart()

        if stopped:
            reason = stop.reason or "a signal on another rank"
            LOGGER.info(f"stopped by {reason} after step {progress.step}; the same command goes on from there")
            if requeues and ranks.rank == 0:
                tell_job_script("requeue")
    stream.close()
    watchdog.end()
    return progress


def tell_bad_step(progress: Progress, verdict: str, nats: float, gradient_norm: float, metrics: Metrics | None) -> None:
    """Log and record a step that was skipped or spiked."""
    reason = f"loss {nats:.4f} nats, gradient norm {gradient_norm:.4g}"
    LOGGER.warning(f"step {progress.step:>8}  {verdict}: {reason} ({progress.stability.bad} bad steps in a row)")
    if metrics is not None:
        metrics.write({"step": progress.step, "event": verdict, "reason": reason})


def draw_samples(
    engine: "Engine",
    job: Job,
    run: Run,
    progress: Progress,
    metrics: Metrics | None,
    watchdog: Watchdog,
    meter: Meter,
) -> None:
    """Draw a sheet of samples where one is due; of a pre-training token by token that is doing well."""
    config, every = job.config, job.config.training.sample_every
    able = config.causal and config.finetune is None and not progress.stability.bad
    if able and every and progress.step % every == 0:
        from igpt_ds.train.sheets import draw_sheet

        draw_sheet(engine, job, run, progress.step, metrics, watchdog)
        meter.restart()


def shown(measured: dict[str, float]) -> dict[str, float]:
    """What is recorded of a step or a validation; the loss of a pre-training in bits as well."""
    return measured if "accuracy" in measured else {**measured, "bits": measured["loss"] / math.log(2)}


def validate(
    engine: "Engine", job: Job, progress: Progress, metrics: Metrics | None, watchdog: Watchdog
) -> tuple[bool, bool]:
    """The means over the whole validation set; in a fine-tuning also whether they are the best, and end the run."""
    from igpt_ds.loading.loader import evaluation_batches

    ranks, step = engine.ranks, progress.step
    assert job.validation_set is not None
    batches = evaluation_batches(
        job.validation_set, job.division.micro_batch, job.division.replica(ranks.rank), job.division.replicas
    )
    totals, images = engine.evaluate(watchdog.over(batches, "loading validation data", "validating", step))
    measured = dict(zip(engine.measures, (total / images for total in totals), strict=True))
    if metrics is not None:
        line = {f"val_{name}": value for name, value in shown(measured).items()}
        metrics.write({"step": step, **line, "val_images": int(images)})
        beside = f"accuracy {measured['accuracy']:.4f}" if "accuracy" in measured else f"{line['val_bits']:.4f} bits"
        LOGGER.info(f"step {step:>8}  validation {measured['loss']:.4f} nats {beside} ({int(images)} images)")
    # What may be the beginning of a divergence is not saved, and so cannot be the best.
    if job.config.finetune is None or progress.stability.bad:
        return False, False
    better, ended = progress.note_validation(measured["accuracy"]), progress.ended_early(job.config)
    if ended and progress.best:
        LOGGER.info(f"ended early: {progress.stale} validations no better than that of step {progress.best[0]}")
    return better, ended


def begin_save(engine: "Engine", saver: Saver, job: Job, run: Run, progress: Progress, last: bool) -> None:
    """Begin to save the state; the last save of a run is waited for.

    Raises:
        UserError: too many saves in a row have failed, or the last one.
    """
    if saver.pending is not None:
        finish_save(saver, job, run, progress)
    facts = {
        "identity": job.identity(),
        "config": to_tree(job.config),
        "ds_config": job.ds,
        "code_version": igpt_ds.__version__,
        "progress": progress.record(),
    }
    try:
        saver.begin(progress.step, engine.state.shards(), facts)
    except UserError as error:
        _save_failed(error, job, progress, last)
    else:
        if last:
            finish_save(saver, job, run, progress, last)


def finish_save(saver: Saver, job: Job, run: Run, progress: Progress, last: bool = False) -> None:
    """Publish the checkpoint that was begun, if there is one, and drop the oldest.

    Raises:
        UserError: too many saves in a row have failed, or the last one.
    """
    if saver.pending is None:
        return
    try:
        path = saver.conclude()
    except UserError as error:
        _save_failed(error, job, progress, last)
        return
    progress.failed_saves = 0
    if saver.rank == 0:
        best = (progress.best[0],) if progress.best else ()
        checkpoint.prune(run.checkpoints, job.config.checkpoint.keep, (*job.config.checkpoint.milestones, *best))
        LOGGER.info(f"{'':13}  saved {path}")


def _save_failed(error: UserError, job: Job, progress: Progress, last: bool) -> None:
    progress.failed_saves += 1
    if last or progress.failed_saves >= job.config.checkpoint.max_failures:
        raise UserError(f"{error} ({progress.failed_saves} saves in a row failed; older checkpoints stand)") from error
    LOGGER.warning(f"{error}; going on without this checkpoint")
