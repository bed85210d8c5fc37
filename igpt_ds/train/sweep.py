"""The search for the learning rate (paper section 3.4): 0.01, 0.003, 0.001, ... until the final result gets worse.

    DIR/lr-0.01/        one run directory a rate
    DIR/sweep.json      the command, what came of each rate, the winner; rewritten after every rate

Each rate is a process of its own (or a launcher's), so that a search survives whatever becomes of one of them. The
result of a pre-training is its final validation loss, that of a fine-tuning its best validation accuracy, since it is
its best checkpoint that is used. A run whose loss is above that of a blind guess, or that is lost for good, has
diverged; it is stopped, and counts as worse than any other.
"""

import contextlib
import json
import math
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from igpt_ds.atomic import no_link, publish_text, writing
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from igpt_ds.reading import read_json
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import read_metrics

RATES = (0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001, 0.000003)
_LOSSES = 10  # recorded losses in a row, whose mean is held against a blind guess's
_LOOK_EVERY = 1.0  # seconds
_TIME_TO_STOP = 600.0  # seconds that a run has to finish a step and save

Status = Literal["done", "diverged", "unfinished"]


@dataclass(frozen=True)
class Trial:
    """What came of one rate. A fine-tuning's accuracy and loss are those of its best validation.

    Attributes:
        step: of the validation that is told, or the last recorded one.
        n: validation images.
    """

    rate: float
    status: Status
    step: int
    val_loss: float | None = None
    val_accuracy: float | None = None
    n: int | None = None

    @property
    def badness(self) -> float:
        """What the search makes small: validation loss, or the share of images told wrong; infinite if diverged."""
        if self.status != "done" or self.val_loss is None:
            return math.inf
        return self.val_loss if self.val_accuracy is None else 1 - self.val_accuracy


def folder(directory: Path, rate: float) -> Path:
    """The run directory of a rate, named as slurm/sweep_lr.sh names it."""
    return directory / f"lr-{Decimal(repr(rate)):f}"


def read_trial(directory: Path, rate: float, end: int) -> Trial:
    """What the run directory of one rate tells.

    Args:
        end: the step whose validation counts; a fine-tuning may end earlier.
    """
    lines = _lines(directory)
    validations = [line for line in lines if "val_loss" in line]
    last = max((line["step"] for line in lines), default=0)
    finished = (directory / "result.json").exists() or any(line["step"] >= end for line in validations)
    if not finished or not validations:
        return Trial(rate, "diverged" if _diverged(directory, lines) else "unfinished", last)
    chosen = validations[-1]
    if "val_accuracy" in chosen:
        chosen = max(validations, key=lambda line: line.get("val_accuracy") or 0)  # the first of equals
    status: Status = "diverged" if chosen["val_loss"] is None else "done"
    images = chosen.get("val_images")
    n = None if images is None else int(images)
    return Trial(rate, status, chosen["step"], chosen["val_loss"], chosen.get("val_accuracy"), n)


def _lines(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run, looked at often: the run itself warns of damaged lines."""
    return read_metrics(directory / "metrics.jsonl", lambda text: None)


def _diverged(directory: Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Whether the last losses after the warm-up are, in the mean, above a blind guess's."""
    run = Run(directory)
    if not run.config.exists():
        return False
    config = load_config(run.config)
    after = (line for line in lines if line["step"] > config.training.warmup_steps)
    losses = [line["loss"] for line in after if line.get("loss") is not None]
    return len(losses) >= _LOSSES and sum(losses[-_LOSSES:]) / _LOSSES > blind_guess(config)


def blind_guess(config: Config) -> float:
    """The loss of a network that takes all colours, and all classes, to be equally likely, in nats."""
    generative = math.log(config.palette_size)
    if config.finetune is None:
        return generative
    return config.finetune.generative_weight * generative + math.log(config.classes)


def rose(trials: Sequence[Trial]) -> bool:
    """Whether the search is over: the last rate did worse than the one before it."""
    return len(trials) > 1 and trials[-1].badness > trials[-2].badness


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The best rate, the largest of equals; None if all diverged."""
    best = min(trials, key=lambda trial: trial.badness, default=None)
    return best if best is not None and best.badness < math.inf else None


def edge(trials: Sequence[Trial]) -> str | None:
    """At which end of the rates that were tried the best one lies: "largest", "smallest", "only"; None: at neither."""
    best = winner(trials)
    rates = [trial.rate for trial in trials if trial.status != "unfinished"]
    if best is None or best.rate not in (max(rates), min(rates)):
        return None
    return "only" if len(rates) == 1 else "largest" if best.rate == max(rates) else "smallest"


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """What DIR/sweep.json tells of the trials."""
    best = winner(trials)
    by_accuracy = any(trial.val_accuracy is not None for trial in trials)
    return {
        "criterion": "val_accuracy" if by_accuracy else "val_loss",
        "rates": [asdict(trial) for trial in trials],
        "winner": best.rate if best else None,
        "edge": edge(trials),
    }


def record(directory: Path, trials: Sequence[Trial], facts: dict[str, Any]) -> None:
    """Write DIR/sweep.json."""
    content = {"kind": "sweep", **facts, **summary(trials)}
    publish_text(directory / "sweep.json", json.dumps(content, indent=2) + "\n")


def collect(directory: Path) -> list[Trial]:
    """What is there of runs that were started otherwise, as Slurm jobs say, largest rate first.

    The runs must have been validated at the same step to be compared; those that are behind are unfinished.
    """
    found = {load_config(path).training.learning_rate: path.parent for path in directory.glob("lr-*/config.toml")}
    if not found:
        raise UserError(f"{directory}: no run in it: name the folder of the runs lr-0.01, lr-0.003, ...")
    validated = [
        max((line["step"] for line in _lines(path) if "val_loss" in line), default=0) for path in found.values()
    ]
    return [read_trial(found[rate], rate, max(validated)) for rate in sorted(found, reverse=True)]


def search(
    directory: Path,
    rates: Sequence[float],
    command: Sequence[str],
    launcher: Sequence[str],
    config: Config,
    share: float,
) -> Iterator[list[Trial]]:
    """Run rate after rate; yields the trials so far after each. Finished ones are not run again.

    The directory has one search at a time, and each run in it, which is a process of its own, one owner.

    Args:
        command: a verb of igpt-ds and its options, without the rate and without RUN.
        launcher: what `command` is appended to.
        config: what `command` trains by.
        share: what part of its steps is run.

    Raises:
        RunError: a run failed without having diverged, or the search was stopped.
    """
    training = config.training
    if config.folded:
        raise UserError(
            "data.fold_validation=true: without validation images no rate is better: search before you fold"
        )
    if not training.validate_every:
        raise UserError("training.validate_every=0: without validation no rate is better: set an interval")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(directory)
    try:
        yield from _search(directory, rates, command, launcher, max(1, round(share * training.steps)), share)
    finally:
        lock.release()


def _search(
    directory: Path, rates: Sequence[float], command: Sequence[str], launcher: Sequence[str], end: int, share: float
) -> Iterator[list[Trial]]:
    facts = {"command": list(command), "share": share}
    path = directory / "sweep.json"
    try:
        before: dict[str, Any] = read_json(path) if path.exists() else {**facts, "rates": []}
        known = {trial["rate"]: Trial(**trial) for trial in before["rates"] if trial["status"] != "unfinished"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of a search ({error}): restore it, or choose another --out") from error
    for key, value in facts.items():
        if before.get(key) != value:
            raise UserError(
                f"{path}: {key} was {before.get(key)}, but now is {value}: restore it, or choose another --out"
            )
    trials: list[Trial] = []
    for rate in rates:
        if rate in known:
            trials.append(known[rate])
        else:
            stop_at = [] if share == 1 else ["--set", f"training.stop_at={end}"]
            options = [str(folder(directory, rate)), "--set", f"training.learning_rate={rate!r}", *stop_at]
            trials.append(_run(folder(directory, rate), rate, [*launcher, *command, *options], end))
            record(directory, trials, facts)
        yield trials
        if rose(trials):
            return


def _run(directory: Path, rate: float, command: Sequence[str], end: int) -> Trial:
    """Run one rate to its end, or until it is seen to diverge."""
    stop = directory / "STOP"
    with writing(stop):
        stop.unlink(missing_ok=True)
    with _asked_to_stop() as asked, _started(command) as process:
        stopped_at, told = None, False
        while process.poll() is None:
            time.sleep(_LOOK_EVERY)
            diverged = _diverged(directory, _lines(directory))
            if stopped_at is None and (asked or diverged):
                stopped_at = time.monotonic()
            if stopped_at is not None and not told and directory.exists():
                # Not by a signal: a launcher would end its ranks before they have saved.
                with contextlib.suppress(OSError):  # a full disk: it is ended below
                    open(stop, "a", opener=no_link).close()
                told = True
            if stopped_at is not None and time.monotonic() - stopped_at > _TIME_TO_STOP:
                process.terminate()
    with writing(stop):
        stop.unlink(missing_ok=True)
    if process.returncode == 2:
        raise UserError(f"sweep: rate {rate:g} was refused: see the line above: mend it and give the same command")
    lines = _lines(directory)
    lost = process.returncode != 0 and bool(lines) and lines[-1].get("event") in ("spike", "skipped", "no validation")
    trial = read_trial(directory, rate, end)
    if lost:
        return Trial(rate, "diverged", lines[-1]["step"])
    if trial.status == "unfinished":
        raise RunError(
            f"sweep: rate {rate:g} ended at step {trial.step} of {end} (exit status {process.returncode}); "
            "the same command goes on from there"
        )
    return trial


def _started(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"sweep: {command[0]}: cannot be started: {error.strerror}: mend --launcher") from error


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that asked this process to stop meanwhile, in a list that grows."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
