"""Pre-training: build, resume, train, close; and the one loop."""

import itertools
import json
import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import igpt_ds
from igpt_ds import checkpoint
from igpt_ds.atomic import publish_text
from igpt_ds.config import replace, to_toml, to_tree
from igpt_ds.errors import UserError
from igpt_ds.health import StopRequest, tell_job_script
from igpt_ds.job import Job, summary
from igpt_ds.metrics import Metrics, require_wandb
from igpt_ds.place import Place
from igpt_ds.progress import Progress, check_identity, resume, roll_back
from igpt_ds.run import LOGGER, Run, log_to
from igpt_ds.saver import Saver
from igpt_ds.schedule import learning_rate
from igpt_ds.throughput import Meter, training_line
from igpt_ds.watchdog import Watchdog

if TYPE_CHECKING:
    from igpt_ds.engine import Engine
    from igpt_ds.loader import Batch

Batches = Generator["Batch", None, None]


def pretrain(
    job: Job,
    run: Run,
    where: Place,
    *,
    fresh: bool = False,
    force: bool = False,
    allow_change: tuple[str, ...] = (),
    wandb_project: str | None = None,
) -> None:
    """Train until `training.steps` (or `stop_at`, or a request); go on from the newest whole checkpoint.

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
    if where.rank == 0:
        run.require_writable()
    from igpt_ds.engine import Engine, barrier, join, leave, require_precision
    from igpt_ds.loader import train_batches

    require_precision(job.config)
    join(where)
    if where.rank == 0:
        if fresh:
            run.clear()
        run.create()
    barrier()
    watchdog = Watchdog(run.path, where.rank, where.world, job.config.health.hang_timeout, log_to(run, where.rank))
    engine = Engine(job.config, job.ds, job.division, where)
    progress = resume(engine, job, run)
    metrics = None
    if where.rank == 0:
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
            rank=where.rank,
            world=where.world,
            start_step=progress.step,
            left_out=progress.left_out,
            workers=job.config.data.workers,
        )

    train(engine, batches_after, job, run, progress, metrics, stop, watchdog)
    if metrics is not None:
        metrics.close()
    stop.end()
    engine.close()
    leave()


def train(
    engine: "Engine",
    batches_after: Callable[[Progress], Batches],
    job: Job,
    run: Run,
    progress: Progress,
    metrics: Metrics | None,
    stop: StopRequest,
    watchdog: Watchdog,
) -> None:
    """The loop: step, judge, log, validate, save, stop. `metrics` is rank 0's; a step counts completed steps."""
    config, recipe, where = job.config, job.config.training, engine.place
    end = recipe.stop_at or recipe.steps
    if progress.step >= end:
        LOGGER.info(
            f"already at step {progress.step} of {end}: nothing to do "
            "(a later training.stop_at or more training.steps go on)"
        )
        return
    stop.listen()
    watchdog.start()
    saver = Saver(run.checkpoints, where.rank, where.world, engine.any_rank, where.neighbours)
    meter = Meter(config, engine)
    stream = batches_after(progress)
    save_due = False
    while progress.step < end:
        micro_batches = itertools.islice(stream, job.division.accumulation)
        watched = watchdog.over(meter.waited(micro_batches), "loading data", "computing a step", progress.step)
        rate = learning_rate(progress.step, recipe)
        loss, gradient_norm = engine.train_step(watched, rate)
        progress.step += 1
        meter.count_step()

        watchdog.beat("waiting for the other ranks", progress.step)
        if where.rank == 0:
            stop.look(run.path)
        total, stops, requeues, saves, writing = engine.sum_over_ranks(
            [float(loss), stop.reason is not None, stop.by_scheduler, stop.save, saver.busy]
        )
        nats, stopped = total / where.world, stops > 0
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
        # What may turn out to be the beginning of a divergence is not worth keeping.
        saving = save_due and (last or not progress.stability.bad)

        if (progress.step % recipe.log_every == 0 or saving) and verdict != "skipped" and math.isfinite(nats):
            line = {
                "step": progress.step,
                "loss": nats,
                "bits": nats / math.log(2),
                "lr": rate,
                "grad_norm": gradient_norm,
                **meter.read(remaining=end - progress.step),
            }
            if metrics is not None:
                metrics.write(line)
                LOGGER.info(training_line(line, recipe.steps))

        if job.validation_set is not None and (progress.step % recipe.validate_every == 0 or progress.step == end):
            validate(engine, job, progress.step, metrics, watchdog)
            meter.restart()

        if saver.pending is not None and not writing:
            finish_save(saver, job, run, progress)
        if saving:
            watchdog.beat("saving", progress.step)
            begin_save(engine, saver, job, run, progress, last)
            save_due = False
            meter.restart()

        if stopped:
            reason = stop.reason or "a signal on another rank"
            LOGGER.info(f"stopped by {reason} after step {progress.step}; the same command goes on from there")
            if requeues and where.rank == 0:
                tell_job_script("requeue")
            break
    stream.close()
    watchdog.end()


def tell_bad_step(progress: Progress, verdict: str, nats: float, gradient_norm: float, metrics: Metrics | None) -> None:
    """Log and record a step that was skipped or spiked."""
    reason = f"loss {nats:.4f} nats, gradient norm {gradient_norm:.4g}"
    LOGGER.warning(f"step {progress.step:>8}  {verdict}: {reason} ({progress.stability.bad} bad steps in a row)")
    if metrics is not None:
        metrics.write({"step": progress.step, "event": verdict, "reason": reason})


def validate(engine: "Engine", job: Job, step: int, metrics: Metrics | None, watchdog: Watchdog) -> None:
    """Mean loss over the whole validation set."""
    from igpt_ds.loader import evaluation_batches

    where = engine.place
    assert job.validation_set is not None
    batches = evaluation_batches(job.validation_set, job.division.micro_batch, where.rank, where.world)
    total, images = engine.evaluate(watchdog.over(batches, "loading validation data", "validating", step))
    nats = total / images
    if metrics is not None:
        metrics.write({"step": step, "val_loss": nats, "val_bits": nats / math.log(2), "val_images": int(images)})
        LOGGER.info(f"step {step:>8}  validation {nats:.4f} nats {nats / math.log(2):.4f} bits ({int(images)} images)")


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
        saver.begin(progress.step, engine.shards(), facts)
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
        checkpoint.prune(run.checkpoints, job.config.checkpoint.keep, job.config.checkpoint.milestones)
        LOGGER.info(f"{'':13}  saved {path}")


def _save_failed(error: UserError, job: Job, progress: Progress, last: bool) -> None:
    progress.failed_saves += 1
    if last or progress.failed_saves >= job.config.checkpoint.max_failures:
        raise UserError(f"{error} ({progress.failed_saves} saves in a row failed; older checkpoints stand)") from error
    LOGGER.warning(f"{error}; going on without this checkpoint")
