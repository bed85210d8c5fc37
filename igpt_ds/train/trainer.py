"""The one loop of pre-training and fine-tuning, and what it is built of."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import igpt_ds
from igpt_ds import evals
from igpt_ds.checkpoint.names import prune
from igpt_ds.checkpoint.write import Saver
from igpt_ds.config.file import load_config, to_tree
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.loading.augment import crop_and_flip
from igpt_ds.lock import Lock
from igpt_ds.planner.choose import Here
from igpt_ds.run.directory import LOGGER, Run, log_to
from igpt_ds.run.metrics import Metrics, require_wandb
from igpt_ds.train.job import Job, summary
from igpt_ds.train.result import conclude
from igpt_ds.train.resume import Progress, check_identity, find_start, resume, roll_back
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.signals import StopRequest, tell_job_script
from igpt_ds.train.stability import Verdict
from igpt_ds.train.throughput import Meter, training_line
from igpt_ds.train.watchdog import Watchdog

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import Batch

Batches = Generator["Batch", None, None]


def train(
    job: Job,
    run: Run,
    ranks: Ranks,
    here: Here,
    *,
    fresh: bool = False,
    force: bool = False,
    allow_change: tuple[str, ...] = (),
    wandb_project: str | None = None,
) -> None:
    """Train until `training.steps` (or `stop_at`, or a request); go on from the newest whole checkpoint.

    A fine-tuning also ends where its accuracy gets no better, and then writes its result.

    Args:
        here: the machine as this rank sees it.

    Raises:
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
    from igpt_ds.distributed.device import in_common, require_device
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import train_batches

    require_device(job.config, here)
    labels, augment = None, None
    if job.config.finetune is not None:
        labels = _labels(job)
        if job.config.finetune.augmentation == "crop_flip":
            augment = functools.partial(crop_and_flip, seed=job.config.seed)
    with _owned(run, ranks) as lock:
        ranks.join(job.config.health.hang_timeout)
        job = job.on(in_common(here, ranks), ranks.from_rank_0(job.asked))
        if lock is not None and fresh:
            _clear(run)
        ranks.any(False)  # all wait for it
        watchdog = Watchdog(run.path, ranks.rank, ranks.world, job.config.health.hang_timeout, log_to(run, ranks.rank))
        start = find_start(job, run, ranks)
        engine = Engine(job.config, job.ds, job.division, ranks, start.given)
        progress = resume(engine, job, run, start)
        # Where nothing is trained, the run's configuration stays that of what was trained, and its result tells it.
        trained = _as_trained(job, run, ranks) if progress.done(job.config) else job
        metrics = None
        if lock is not None:
            lock.require()
            if trained is job:
                job.record(run)
            metrics = Metrics(run.path, progress.step, to_tree(trained.config), wandb_project, lock)
            for line in summary(trained).splitlines():
                LOGGER.info(line)

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

        trainer = Trainer(job, run, engine, progress, batches_after, metrics, stop, watchdog, lock)
        trainer.loop()
        if job.config.finetune is not None and trainer.ended and not ranks.any(stop.reason is not None):
            conclude(engine, trained, run, trainer.progress, lock)
        if metrics is not None:
            metrics.close()
        stop.end()
        engine.close()
        ranks.leave()


@contextmanager
def _owned(run: Run, ranks: Ranks) -> Iterator[Lock | None]:
    """On rank 0 the run's lock until the end: who has it alone writes into the run; None on the others.

    Before the ranks meet, as all that is refused, so that a job script learns that another try does not cure it.
    """
    if ranks.rank != 0:
        yield None
        return
    run.create()
    lock = Lock.take(run.path)
    try:
        yield lock
    finally:
        lock.release()


def _clear(run: Run) -> None:
    """Delete the run that was there, and say what else lies in its directory."""
    kept = run.clear([evals.stem(evals.load(name)) for name in evals.names()])
    run.create()
    if kept:
        LOGGER.warning(f"{run.path}: left as it is, since it is no part of a run: {', '.join(kept)}")


def _as_trained(job: Job, run: Run, ranks: Ranks) -> Job:
    """The job by the configuration that the run has; as it is, where that is lost."""
    config = load_config(run.config) if ranks.rank == 0 and run.config.exists() else None
    config = ranks.from_rank_0(config)
    return dataclasses.replace(job, config=config) if config else job


@dataclass
class Trainer:
    """A training under way, on one rank.

    Attributes:
        progress: where it stands; a step counts completed steps.
        batches_after: this rank's micro-batches from there on.
        metrics, lock: rank 0's; None on the others.
    """

    job: Job
    run: Run
    engine: "Engine"
    progress: Progress
    batches_after: Callable[[Progress], Batches]
    metrics: Metrics | None
    stop: StopRequest
    watchdog: Watchdog
    lock: Lock | None = None

    def __post_init__(self) -> None:
        ranks, folder, watchdog = self.engine.ranks, self.run.checkpoints, self.watchdog
        self.meter = Meter(self.job.config, self.engine)
        place = (ranks.rank, ranks.world, ranks.any, ranks.neighbours)
        self.saver = Saver(folder, *place, self.lock, watchdog.beat, watchdog.moves)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to train."""
        config = self.job.config
        return self.progress.step >= config.training.steps or self.progress.ended_early(config)

    def loop(self) -> None:
        """Step, judge, log, validate, draw, save, stop."""
        job, config, recipe = self.job, self.job.config, self.job.config.training
        engine, progress, stop, watchdog = self.engine, self.progress, self.stop, self.watchdog
        ranks = engine.ranks
        end = recipe.stop_at or recipe.steps
        if progress.done(config):
            LOGGER.info(
                f"already at step {progress.step} of {end}: nothing to do "
                "(a later training.stop_at or more training.steps go on)"
            )
            return
        stop.listen()
        watchdog.start()
        ranks.wait_patiently()
        self.meter.restart()
        stream = self.batches_after(progress)
        save_due = last = False
        while not last:
            micro_batches = itertools.islice(stream, job.division.accumulation)
            watched = watchdog.over(self.meter.waited(micro_batches), "loading data", "computing a step", progress.step)
            rate = learning_rate(progress.step, recipe)
            means, gradient_norm = engine.train_step(watched, rate)
            progress.step += 1
            self.meter.count_step()

            watchdog.beat("waiting for the other ranks", progress.step)
            if ranks.rank == 0:
                stop.look(self.run.path)
            *sums, stops, persons, saves, writing = ranks.sum(
                [*means.tolist(), stop.reason is not None, stop.by_person, stop.save, self.saver.busy]
            )
            measured = dict(zip(engine.measures, (total / ranks.world for total in sums), strict=True))
            nats, stopped = measured["loss"], stops > 0
            verdict = progress.stability.judge(nats, gradient_norm)
            if verdict != "good":
                self._tell_bad_step(verdict, nats, gradient_norm)
            if progress.stability.lost and not stopped:
                self._finish_save()
                stream.close()
                progress = self.progress = roll_back(engine, job, self.run, progress, self.metrics, watchdog)
                stream = self.batches_after(progress)
                save_due = False
                self.meter.restart()
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
                    **_shown(measured),
                    "lr": rate,
                    "grad_norm": gradient_norm,
                    **self.meter.read(remaining=end - progress.step),
                }
                if self.metrics is not None:
                    self.metrics.write(line)
                    LOGGER.info(training_line(line, recipe.steps))

            if job.validation_set is not None and (progress.step % recipe.validate_every == 0 or progress.step == end):
                best, ended = self._validate()
                save_due, last = save_due or best or ended, last or ended
            self._draw_samples()

            if self.saver.pending is not None and not writing:
                self._finish_save()
            # What may turn out to be the beginning of a divergence is not worth keeping.
            if save_due and (last or not progress.stability.bad):
                self._begin_save(last)
                save_due = False

            if stopped:
                reason = stop.reason or "a signal on another rank"
                LOGGER.info(f"stopped by {reason} after step {progress.step}; the same command goes on from there")
                if not persons and ranks.rank == 0:
                    tell_job_script("requeue")
        stream.close()
        watchdog.end()

    def _tell_bad_step(self, verdict: Verdict, nats: float, gradient_norm: float) -> None:
        """Log and record a step that was skipped or spiked."""
        step, bad = self.progress.step, self.progress.stability.bad
        reason = f"loss {nats:.4f} nats, gradient norm {gradient_norm:.4g}"
        LOGGER.warning(f"step {step:>8}  {verdict}: {reason} ({bad} bad steps in a row)")
        if self.metrics is not None:
            self.metrics.write({"step": step, "event": verdict, "reason": reason})

    def _draw_samples(self) -> None:
        """Draw a sheet of samples where one is due; of a pre-training token by token that is doing well."""
        config, every = self.job.config, self.job.config.training.sample_every
        able = config.causal and config.finetune is None and not self.progress.stability.bad
        if able and every and self.progress.step % every == 0:
            from igpt_ds.train.sheets import draw_sheet

            step = self.progress.step
            beat = functools.partial(self.watchdog.beat, "drawing samples", step)
            draw_sheet(self.engine, self.job, self.run.samples, self.metrics, step, beat)
            self.meter.restart()

    def _validate(self) -> tuple[bool, bool]:
        """The means over the validation set; in a fine-tuning also whether they are the best, and end the run."""
        from igpt_ds.loading.loader import evaluation_batches

        job, engine, progress, division = self.job, self.engine, self.progress, self.job.division
        assert job.validation_set is not None
        replica = division.replica(engine.ranks.rank)
        labelled = job.config.finetune is not None
        batches = evaluation_batches(job.validation_set, division.micro_batch, replica, division.replicas, labelled)
        watched = self.watchdog.over(batches, "loading validation data", "validating", progress.step)
        try:
            totals, images = engine.evaluate(watched)
        except RunError as error:
            self._finish_save()
            if self.metrics is not None:
                self.metrics.write({"step": progress.step, "event": "no validation", "reason": str(error)})
            if not progress.stability.bad:
                raise RunError(f"step {progress.step}: validation: {error}: the checkpoints before it stand") from None
            # The run is about to be rolled back for it.
            LOGGER.warning(f"step {progress.step:>8}  no validation: {error}")
            return False, False
        measured = dict(zip(engine.measures, (total / images for total in totals), strict=True))
        if self.metrics is not None:
            line = {f"val_{name}": value for name, value in _shown(measured).items()}
            self.metrics.write({"step": progress.step, **line, "val_images": int(images)})
            accuracy = measured.get("accuracy")
            beside = f"{line['val_bits']:.4f} bits" if accuracy is None else f"accuracy {accuracy:.4f}"
            LOGGER.info(
                f"step {progress.step:>8}  validation {measured['loss']:.4f} nats {beside} ({int(images)} images)"
            )
        self.meter.restart()
        # What may be the beginning of a divergence is not saved, and so cannot be the best.
        if job.config.finetune is None or progress.stability.bad:
            return False, False
        better, ended = progress.note_validation(measured["accuracy"]), progress.ended_early(job.config)
        if ended and progress.best:
            LOGGER.info(f"ended early: {progress.stale} validations no better than that of step {progress.best[0]}")
        return better, ended

    def _begin_save(self, last: bool) -> None:
        """Begin to save the state; the last save of a run is waited for.

        Raises:
            UserError: too many saves in a row have failed, or the last one.
        """
        self._finish_save()
        facts = {
            "identity": self.job.identity(),
            "config": to_tree(self.job.config),
            "ds_config": self.job.ds,
            "code_version": igpt_ds.__version__,
            "progress": self.progress.record(),
        }
        try:
            self.saver.begin(self.progress.step, self.engine.state.shards(), facts)
        except UserError as error:
            self._save_failed(error, last)
        else:
            if last:
                self._finish_save(last)
        self.meter.restart()

    def _finish_save(self, last: bool = False) -> None:
        """Publish the checkpoint that was begun, if there is one, and drop the oldest."""
        if self.saver.pending is None:
            return
        try:
            path = self.saver.conclude()
        except UserError as error:
            self._save_failed(error, last)
            return
        self.progress.failed_saves = 0
        if self.saver.rank == 0:
            keep, milestones = self.job.config.checkpoint.keep, self.job.config.checkpoint.milestones
            best = (self.progress.best[0],) if self.progress.best else ()
            prune(self.run.checkpoints, keep, (*milestones, *best))
            LOGGER.info(f"{'':13}  saved {path}")

    def _save_failed(self, error: UserError, last: bool) -> None:
        self.progress.failed_saves += 1
        failed = self.progress.failed_saves
        if last or failed >= self.job.config.checkpoint.max_failures:
            raise UserError(f"{error} ({failed} saves in a row failed; older checkpoints stand)") from error
        LOGGER.warning(f"{error}; going on without this checkpoint")


def _labels(job: Job) -> list[list[np.ndarray]]:
    """The training labels, by source and shard; those held out are refused now, not at the first validation."""
    from igpt_ds.loading.loader import shard_labels

    for held_out in filter(None, (job.validation_set, job.test_set)):
        held_out.labels()
    return [shard_labels(dataset) for dataset in job.train_sets]


def _shown(measured: dict[str, float]) -> dict[str, float]:
    """What is recorded of a step or a validation; the loss of a pre-training in bits as well."""
    return measured if "accuracy" in measured else {**measured, "bits": measured["loss"] / math.log(2)}
