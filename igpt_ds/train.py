"""Pre-training: build, resume, train, close; and the one loop."""

import itertools
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import igpt_ds
from igpt_ds import checkpoint
from igpt_ds.atomic import publish_text
from igpt_ds.config import replace, to_toml, to_tree
from igpt_ds.ds_config import Division
from igpt_ds.errors import RunError, UserError
from igpt_ds.health import StopRequest
from igpt_ds.job import Job, summary
from igpt_ds.metrics import Metrics, require_wandb
from igpt_ds.place import Place
from igpt_ds.run import LOGGER, Run, log_to
from igpt_ds.schedule import learning_rate
from igpt_ds.shards import Dataset
from igpt_ds.throughput import Meter, training_line

if TYPE_CHECKING:
    from igpt_ds.engine import Engine
    from igpt_ds.loader import Batch


LOWER_RATE = "lower training.learning_rate (the last checkpoint stands)"


def pretrain(job: Job, run: Run, where: Place, fresh: bool, force: bool, wandb_project: str | None) -> None:
    """Train until `training.steps` (or `stop_at`, or a signal); go on from the newest whole checkpoint.

    Raises:
        UserError: the run directory, its checkpoints or the device do not fit the job.
        RunError: the loss is no longer finite.
    """
    stop = StopRequest()
    if wandb_project:
        require_wandb()
    # Refusals first, on every rank alike; only then the ranks meet, and rank 0 makes the directory for all.
    if fresh:
        run.require_fresh(force)
    else:
        check_identity(job, run)
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
    log_to(run, where.rank)
    engine = Engine(job.config, job.ds, job.division, where)
    step = resume(engine, job, run)
    metrics = None
    if where.rank == 0:
        publish_text(run.config, to_toml(replace(job.config, "training", stop_at=None)))
        publish_text(run.ds_config, json.dumps(job.ds, indent=2) + "\n")
        job.train_sets[0].palette.save(run.palette)
        metrics = Metrics(run.path, step, to_tree(job.config), wandb_project)
        LOGGER.info(summary(job))
    batches = train_batches(
        job.train_sets,
        job.order,
        batch=job.config.training.batch,
        micro_batch=job.division.micro_batch,
        rank=where.rank,
        world=where.world,
        start_step=step,
        workers=job.config.data.workers,
    )
    train(engine, batches, job, run, step, metrics, stop)
    if metrics is not None:
        metrics.close()
    stop.end()
    engine.close()
    leave()


def check_identity(job: Job, run: Run) -> None:
    """Refuse to go on with the run of another job; all checkpoints of a run are alike in this.

    Raises:
        UserError: model, objective, palette, seed, batch or data order differ.
    """
    for path in reversed(checkpoint.list_checkpoints(run.checkpoints)):
        try:
            theirs = checkpoint.Checkpoint.open(path).identity
        except UserError:
            continue  # `resume` tells of damaged ones
        for key, value in job.identity().items():
            if theirs.get(key) != value:
                raise UserError(
                    f"{path}: {key} was {theirs.get(key)}, but now is {value}: restore it, or choose another --run"
                )
        return


def resume(engine: "Engine", job: Job, run: Run) -> int:
    """Load the newest whole checkpoint, if there is one; return the step to go on from."""
    import torch

    where = engine.place
    # One listing for all: a network file system may show them different ones.
    candidates = engine.from_rank_0(checkpoint.list_checkpoints(run.checkpoints))
    found = checkpoint.newest_valid(candidates, engine.any_rank, LOGGER.warning, where.rank, where.world)
    if found is None:
        return 0
    if where.rank == 0:
        checkpoint.set_aside_newer(run.checkpoints, found.step)
    engine.load(found)
    random_state = found.random_state(where.rank)
    if random_state is not None:
        torch.set_rng_state(random_state)
    LOGGER.info(f"resumed from {found.path} at step {found.step}")
    return found.step


def train(
    engine: "Engine",
    batches: "Iterable[Batch]",
    job: Job,
    run: Run,
    step: int,
    metrics: Metrics | None,
    stop: StopRequest,
) -> None:
    """The loop: step, log, validate, save, stop. `metrics` is rank 0's; a step counts completed updates."""
    config, recipe, division = job.config, job.config.training, job.division
    end = recipe.stop_at or recipe.steps
    if step >= end:
        LOGGER.info(
            f"already at step {step} of {end}: nothing to do (a later training.stop_at or more training.steps go on)"
        )
        return
    stop.listen()
    meter = Meter(config, engine)
    stream = iter(batches)
    while step < end:
        micro_batches = meter.waited(itertools.islice(stream, division.accumulation))
        rate = learning_rate(step, recipe)
        loss, gradient_norm = engine.train_step(micro_batches, rate)
        step += 1
        meter.count_step()
        if not 0 <= gradient_norm < math.inf:
            # DeepSpeed would skip such updates in silence, for ever.
            raise RunError(f"step {step}: the gradient is not finite: {LOWER_RATE}")

        stopped = engine.any_rank(stop.reason is not None)
        last = stopped or step == end
        saving = step % config.checkpoint.every == 0 or last

        if step % recipe.log_every == 0 or saving:
            # Looked at before every save too: what is not finite must not be published.
            nats = engine.sum_over_ranks([float(loss)])[0] / division.world
            if not math.isfinite(nats):
                raise RunError(f"step {step}: the loss is {nats}: {LOWER_RATE}")
            line = {
                "step": step,
                "loss": nats,
                "bits": nats / math.log(2),
                "lr": rate,
                "grad_norm": gradient_norm,
                **meter.read(remaining=end - step),
            }
            if metrics is not None:
                metrics.write(line)
                LOGGER.info(training_line(line, recipe.steps))

        if job.validation_set is not None and (step % recipe.validate_every == 0 or step == end):
            validate(engine, job.validation_set, division, step, metrics)
            meter.restart()

        if saving:
            save(engine, job, run, step)
            meter.restart()

        if stopped:
            reason = stop.reason or "a signal on another rank"
            LOGGER.info(f"stopped by {reason} after step {step}; the same command goes on from there")
            break


def validate(engine: "Engine", dataset: Dataset, division: Division, step: int, metrics: Metrics | None) -> None:
    """Mean loss over the whole validation set."""
    from igpt_ds.loader import evaluation_batches

    where = engine.place
    total, images = engine.evaluate(evaluation_batches(dataset, division.micro_batch, where.rank, where.world))
    nats = total / images
    if metrics is not None:
        metrics.write({"step": step, "val_loss": nats, "val_bits": nats / math.log(2), "val_images": int(images)})
        LOGGER.info(f"step {step:>8}  validation {nats:.4f} nats {nats / math.log(2):.4f} bits ({int(images)} images)")


def save(engine: "Engine", job: Job, run: Run, step: int) -> None:
    """Publish a checkpoint and drop the oldest."""
    where = engine.place
    facts = {
        "identity": job.identity(),
        "config": to_tree(job.config),
        "ds_config": job.ds,
        "code_version": igpt_ds.__version__,
    }
    path = checkpoint.save(run.checkpoints, step, engine.shards(), facts, where.rank, where.world, engine.any_rank)
    if where.rank == 0:
        checkpoint.prune(run.checkpoints, job.config.checkpoint.keep)
        LOGGER.info(f"step {step:>8}  saved {path}")
