"""Where a run stands, and how it comes to stand there: resumed from a checkpoint, or rolled back to one."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.checkpoint.names import list_checkpoints, newest_first, set_aside_newer, step_of, strangers
from igpt_ds.checkpoint.read import Checkpoint, newest_valid
from igpt_ds.config.file import to_tree
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.hashing import stable_hash
from igpt_ds.loading.order import LeftOut
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.run.metrics import Metrics, read_rollbacks
from igpt_ds.train.job import Job
from igpt_ds.train.stability import Stability
from igpt_ds.train.watchdog import Watchdog

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.weights.base import Weights

LOWER_RATE = "lower training.learning_rate"
# What the weights do not fit, whatever a person allows.
FIXED = ("model", "resolution", "palette_size", "finetune")


@dataclass
class Progress:
    """Where a run stands; the same on every rank.

    Attributes:
        step: completed steps, skipped ones among them.
        left_out: batches that are not trained on, because the run rolled back over them.
        stability: the judge of its steps.
        rollbacks: the steps that it went back to so far.
        failed_saves: saves that failed in a row.
        best: a fine-tuning's best validation so far: step and accuracy.
        stale: validations since then.
    """

    step: int
    left_out: LeftOut
    stability: Stability
    rollbacks: list[int] = field(default_factory=list)
    failed_saves: int = 0
    best: tuple[int, float] | None = None
    stale: int = 0

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "updates": self.step - self.stability.skipped,
            "left_out": [list(span) for span in self.left_out.spans],
            "stability": self.stability.state(),
            "rollbacks": self.rollbacks,
            **({"best": list(self.best), "stale": self.stale} if self.best else {}),
        }

    def note_validation(self, accuracy: float) -> bool:
        """Take note of a fine-tuning's validation; whether it is the best so far. Of equals the first is."""
        better = self.best is None or accuracy > self.best[1]
        if better:
            self.best = (self.step, accuracy)
        self.stale = 0 if better else self.stale + 1
        return better

    def ended_early(self, config: Config) -> bool:
        """Whether so many validations brought nothing better that a fine-tuning ends (paper section 4.5)."""
        return config.finetune is not None and 0 < config.finetune.patience <= self.stale

    def done(self, config: Config) -> bool:
        """Whether there is nothing to train for now."""
        recipe = config.training
        return self.step >= min(recipe.stop_at or recipe.steps, recipe.steps) or self.ended_early(config)


def check_identity(job: Job, run: Run, allowed: tuple[str, ...] = ()) -> None:
    """Refuse to go on with the run of another job; all checkpoints of a run are alike in this.

    Args:
        allowed: facts that may differ.

    Raises:
        UserError: model, objective, palette, seed, batch or data order differ; or what a person has made of its
            checkpoints alone is left, and starting over unasked would hide the loss.
    """
    mine = job.identity()
    for name in allowed:
        if name in FIXED or name not in mine:
            choice = ", ".join(key for key in mine if key not in FIXED)
            raise UserError(f"--allow-change {name}: not possible: choose from {choice}")
    if not any(newest_first(run.checkpoints)) and (others := strangers(run.checkpoints)):
        raise UserError(
            f"{run.checkpoints}: no checkpoint of the run's own, but {', '.join(others)}: give one its name back "
            "(a directory step-N of eight digits), or start over with --fresh --force"
        )
    for path in newest_first(run.checkpoints):
        try:
            found = Checkpoint.open(path)
        except UserError:
            continue  # `resume` tells of damaged ones
        if found.progress.get("weights_only"):
            raise UserError(
                f"{run.path}: holds weights without Adam's moments, a training cannot go on from them: "
                "begin another run with --from"
            )
        theirs = found.identity
        for key, value in mine.items():
            if theirs.get(key) != value and key not in allowed:
                remedy = "" if key in FIXED else f", add --allow-change {key}"
                raise UserError(
                    f"{path}: {key} was {theirs.get(key)}, but now is {value}: restore it{remedy}, "
                    "or choose another RUN"
                )
        return


@dataclass(frozen=True)
class Start:
    """What a run resumes from or begins with, found before there is a network.

    Attributes:
        checkpoint: the newest whole one; None where the run begins.
        weights: what it begins with; None where they are random.
        rollbacks: the lines of metrics.jsonl that tell of them.
    """

    checkpoint: Checkpoint | None
    weights: "Weights | None"
    rollbacks: list[dict[str, Any]]

    @property
    def given(self) -> Collection[str]:
        """Names of the parameters that are read, and so need not be drawn."""
        source = self.checkpoint or self.weights
        return source.tensors.keys() if source else ()


def find_start(job: Job, run: Run, ranks: Ranks) -> Start:
    """The newest whole checkpoint, if there is one, else the weights to begin with; the ranks share the reading."""
    # One listing and one reading for all: a network file system may show the ranks different ones, and both take time.
    seen = (list_checkpoints(run.checkpoints), read_rollbacks(run.metrics)) if ranks.rank == 0 else ([], [])
    candidates, rollbacks = ranks.from_rank_0(seen)
    found = newest_valid(candidates, ranks.any, LOGGER.warning, ranks.rank, ranks.world)
    begins = "" if found else ranks.from_rank_0(job.config.init_from)
    return Start(found, open_verified(ranks, Path(begins)) if begins else None, rollbacks)


def resume(engine: "Engine", job: Job, run: Run, start: Start) -> Progress:
    """Load what the run starts from, and remember what was decided after it."""
    found, ranks = start.checkpoint, engine.ranks
    if found is None:
        _begin(engine, job.config, start.weights)
        return Progress(0, LeftOut(), Stability(job.config.health, {}))
    if ranks.rank == 0:
        set_aside_newer(run.checkpoints, found.step)
    progress = _load(engine, job, found)
    # Of each as many as either knows: a line may be damaged, and the checkpoint may be older than the last decision.
    told: Counter[int] = Counter(line["step"] for line in start.rollbacks)
    progress.rollbacks = list((told | Counter(progress.rollbacks)).elements())
    spans = [*progress.left_out.spans, *(line["left_out"] for line in start.rollbacks)]
    progress.left_out = LeftOut.of(spans)
    LOGGER.info(f"resumed from {found.path} at step {found.step}")
    changed = _changes(found.config, to_tree(job.config))
    if changed and not progress.done(job.config):
        LOGGER.info(f"changed since then: {', '.join(changed)}")
    return progress


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What of a configuration is another than before, key by key."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, dict) or isinstance(new, dict):
            found += _changes(old or {}, new or {}, f"{name}.")
        elif old != new and name != "training.stop_at":
            what = " (where the cosine of the learning rate ends)" if name == "training.steps" else ""
            found.append(f"{name} from {'unset' if old is None else old} to {'unset' if new is None else new}{what}")
    return found


def roll_back(
    engine: "Engine",
    job: Job,
    run: Run,
    progress: Progress,
    metrics: Metrics | None,
    watchdog: Watchdog,
) -> Progress:
    """Go back to the newest whole checkpoint from before the bad steps, and leave their batches out from now on.

    Raises:
        RunError: there is no such checkpoint, or the run has been there too often.
    """
    patience = job.config.health.patience
    good = progress.step - progress.stability.bad  # the last step before the first bad one
    what = f"step {progress.step}: {progress.stability.bad} bad steps in a row (loss spikes or non-finite gradients)"
    ranks = engine.ranks
    candidates = ranks.from_rank_0(list_checkpoints(run.checkpoints) if ranks.rank == 0 else [])
    candidates = [path for path in candidates if step_of(path) <= good]

    def any_rank(fault: bool) -> bool:
        watchdog.beat("waiting for the other ranks", progress.step)
        return ranks.any(fault)

    def moves(read: int = 0) -> None:
        watchdog.moves()

    watchdog.beat("verifying a checkpoint", progress.step)
    found = newest_valid(candidates, any_rank, LOGGER.warning, ranks.rank, ranks.world, moves)
    if found is None:
        begun = job.config.init_from
        damaged = f", or begin with other weights than {begun}, which may be damaged" if begun else ""
        raise RunError(f"{what} and no checkpoint from before them to go back to: {LOWER_RATE}{damaged}")
    before = sum(step >= found.step for step in progress.rollbacks)
    if before >= job.config.health.max_rollbacks:
        raise RunError(f"{what} after {before} rollbacks to step {found.step}: {LOWER_RATE} (the checkpoint stands)")
    # The update that did the harm may have been made some steps before it showed.
    first = progress.left_out.batch(max(found.step, good - patience))
    last = progress.left_out.batch(progress.step - 1)
    decision = {"step": found.step, "event": "rollback", "reason": what, "left_out": [first, last + 1]}
    rollbacks = [*progress.rollbacks, found.step]
    spans = [*progress.left_out.spans, (first, last + 1)]
    if metrics is not None:
        # In this order: killed in between, the run finds the spike again and decides the same.
        metrics.rewind(found.step)
        metrics.write(decision)
        set_aside_newer(run.checkpoints, found.step, "abandoned")
    LOGGER.warning(f"{what}: back to step {found.step}, leaving out batches {first} to {last}")
    watchdog.beat("loading a checkpoint", progress.step)
    progress = _load(engine, job, found, moves)
    progress.left_out, progress.rollbacks = LeftOut.of([*progress.left_out.spans, *spans]), rollbacks
    return progress


def _load(engine: "Engine", job: Job, found: Checkpoint, moves: Callable[[], object] = lambda: None) -> Progress:
    import torch

    engine.state.load(found, tick=moves)
    random_state = found.random_state(engine.ranks.rank)
    if random_state is not None:
        torch.set_rng_state(random_state)
    elif job.config.finetune is not None:
        _seed_dropout(job.config, engine.ranks.rank, found.step)
    device_random_state = found.device_random_state(engine.ranks.rank)
    if device_random_state is not None and engine.device.type == "cuda":
        torch.cuda.set_rng_state(device_random_state)
    kept = found.progress
    stability = Stability(job.config.health, kept.get("stability", {}))
    progress = Progress(found.step, LeftOut.of(kept.get("left_out", ())), stability, list(kept.get("rollbacks", ())))
    if "best" in kept:
        progress.best, progress.stale = (kept["best"][0], kept["best"][1]), kept["stale"]
    return progress


def _begin(engine: "Engine", config: Config, weights: "Weights | None") -> None:
    """Take the weights that a training begins with, if it does not begin with random ones."""
    from igpt_ds.weights.base import at_resolution

    if config.finetune is not None:
        _seed_dropout(config, engine.ranks.rank, 0)
    if weights is not None:
        assert config.data.resolution is not None
        engine.state.load(at_resolution(weights, config.data.resolution, LOGGER.info), weights_only=True)
        LOGGER.info(f"begun with the weights of {weights.path}")


def open_verified(ranks: Ranks, path: Path) -> "Weights":
    """Weights whose bytes are as they were written, where hashes are recorded; the ranks share the reading.

    Raises:
        UserError: on every rank, if it is damaged.
    """
    from igpt_ds.weights.formats import open_weights

    fault = ""
    try:
        found = open_weights(path, verify=False)
        found.verify(ranks.rank, ranks.world)
    except UserError as error:
        fault = str(error)
    if ranks.any(bool(fault)):
        raise UserError(fault or f"{path}: found damaged by another rank: see its message")
    return found


def _seed_dropout(config: Config, rank: int, step: int) -> None:
    """Every rank drops others; the state is a part of each checkpoint."""
    import torch

    torch.manual_seed(stable_hash(config.seed, rank, step) & 0xFFFFFFFF)  # 32 bits are all that the CPU's looks at
