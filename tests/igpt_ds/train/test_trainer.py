"""The loop itself, with an engine that is played: what it logs, saves and refuses, and when it stops."""

import itertools
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_ds.config.file import load_config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.loading.order import LeftOut
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import Metrics, read_metrics
from igpt_ds.text import clock
from igpt_ds.train.begin import pretraining
from igpt_ds.train.job import prepare, summary
from igpt_ds.train.resume import Progress
from igpt_ds.train.schedule import learning_rate
from igpt_ds.train.signals import StopRequest
from igpt_ds.train.stability import Stability
from igpt_ds.train.trainer import Trainer
from igpt_ds.train.watchdog import Watchdog
from tests.helpers.machines import CPU


class PlayedEngine:
    """One rank whose losses and gradient norms are given."""

    device = torch.device("cpu")
    division = SimpleNamespace(world=1, micro_batch=16, accumulation=1)
    ranks = Ranks()
    measures = ("loss",)
    damaged = False

    def __init__(self, norm: Callable[[int], float], loss: Callable[[int], float]):
        self.norm, self.loss = norm, loss
        self.rates: list[float] = []

    def train_step(self, batches: Any, rate: float) -> tuple[torch.Tensor, float]:
        list(batches)
        self.rates.append(rate)
        return torch.tensor([self.loss(len(self.rates))]), self.norm(len(self.rates))

    def evaluate(self, batches: Any) -> tuple[list[float], float]:
        if self.damaged:
            raise RunError("the loss of a held-out image is not finite, first that of image 7")
        return [6.0], 3.0


@pytest.fixture
def play(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Callable[..., tuple[list[int], list[dict[str, Any]], PlayedEngine]]":
    """Run the loop on the digits; the steps at which it saved, its metrics, and the engine."""

    def run_loop(
        *sets: str,
        norm: Callable[[int], float] = lambda step: 1.0,
        loss: Callable[[int], float] = lambda step: 2.0,
        stop: StopRequest | None = None,
    ) -> tuple[list[int], list[dict[str, Any]], PlayedEngine]:
        asked = pretraining("tiny", None, [str(digits)], ["training.steps=10", "training.validate_every=0", *sets])
        job, run, engine = prepare(asked, CPU), Run(tmp_path), PlayedEngine(norm, loss)
        saved: list[int] = []
        monkeypatch.setattr(Trainer, "_begin_save", lambda self, last: saved.append(self.progress.step))
        metrics = Metrics(tmp_path, 0, {})
        try:
            Trainer(
                job,
                run,
                engine,  # type: ignore[arg-type]
                Progress(0, LeftOut(), Stability(job.config.health, {})),
                lambda progress: ({} for _ in itertools.count()),
                metrics,
                stop or StopRequest(),
                Watchdog(tmp_path, 0, 1, 0, sys.stderr),
            ).loop()
        finally:
            metrics.close()
        return saved, read_metrics(run.metrics), engine

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield run_loop
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_each_step_has_its_rate_and_its_line(play: Any) -> None:
    saved, lines, engine = play("checkpoint.every=4", "training.log_every=1")
    recipe = load_config("tiny", ["training.steps=10"]).training
    assert engine.rates == [learning_rate(step, recipe) for step in range(10)]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["bits"] == pytest.approx(line["loss"] / math.log(2)) for line in lines)
    assert saved == [4, 8, 10]


def test_validation_comes_at_its_intervals_and_at_the_end(play: Any) -> None:
    _, lines, _ = play("training.validate_every=4", "training.log_every=10")
    validations = [line for line in lines if "val_loss" in line]
    assert [(line["step"], line["val_loss"], line["val_images"]) for line in validations] == [
        (step, 2.0, 3) for step in (4, 8, 10)
    ]


def test_a_validation_that_is_not_finite_ends_the_run_unrecorded(
    play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlayedEngine, "damaged", True)
    with pytest.raises(
        RunError, match=r"step 4: validation: .* first that of image 7: the checkpoints before it stand"
    ):
        play("training.validate_every=4", "training.log_every=10")
    (line,) = read_metrics(tmp_path / "metrics.jsonl")  # a search for the rate goes on then
    assert (line["step"], line["event"]) == (4, "no validation")
    # In the midst of bad steps, for which the run may soon be rolled back, it is told only.
    saved, lines, _ = play(
        "training.validate_every=5", "training.steps=9", loss=lambda step: math.nan if step in (4, 5, 9) else 2.0
    )
    assert saved == [9] and not any("val_loss" in line for line in lines)


def test_an_evaluation_names_the_first_image_that_is_not_finite() -> None:
    from igpt_ds.distributed.engine import Engine

    quiet = SimpleNamespace(eval=lambda: None, train=lambda: None)
    losses = {0: [2.0, 3.0, 1.0], 3: [math.inf, 2.0, math.nan]}
    engine: Any = SimpleNamespace(
        deepspeed=quiet,
        measures=("loss",),
        device=torch.device("cpu"),
        ranks=Ranks(),
        division=SimpleNamespace(sequence_parallel=1),
        _measure=lambda batch: [torch.tensor(losses[int(batch["positions"][0])])],
    )

    def batch(first: int) -> dict[str, torch.Tensor]:
        return {"positions": torch.arange(first, first + 3), "weight": torch.tensor([1.0, 1.0, 0.0])}

    assert Engine.evaluate(engine, [batch(0)]) == ([5.0], 2.0)
    with pytest.raises(RunError, match="first that of image 3"):
        Engine.evaluate(engine, [batch(0), batch(3)])


def test_stop_at_ends_with_a_checkpoint(play: Any) -> None:
    saved, lines, _ = play("training.stop_at=3", "training.log_every=1")
    assert saved == [3]
    assert lines[-1]["step"] == 3


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(play: Any, bad: float) -> None:
    saved, lines, _ = play("training.log_every=1", norm=lambda step: bad if step in (3, 5, 6) else 1.0)
    assert saved == [10]
    events = [line for line in lines if "event" in line]
    assert [(line["step"], line["event"]) for line in events] == [(3, "skipped"), (5, "skipped"), (6, "skipped")]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 7, 8, 9, 10]


def test_bad_steps_in_a_row_without_a_checkpoint_end_the_run_unsaved(play: Any) -> None:
    with pytest.raises(RunError, match=r"step 5: 3 bad steps in a row .* no checkpoint from before them"):
        play("training.log_every=10", "checkpoint.every=5", norm=lambda step: math.nan if step > 2 else 1.0)


def test_what_may_be_a_divergence_is_not_saved_before_it_is_over(play: Any) -> None:
    saved, _, _ = play("checkpoint.every=5", loss=lambda step: math.nan if step in (5, 6) else 2.0)
    assert saved == [7, 10]


def test_a_signal_finishes_the_step_and_saves(play: Any) -> None:
    stop = StopRequest()

    def at_step_3(step: int) -> float:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    saved, lines, _ = play("training.log_every=1", norm=at_step_3, stop=stop)
    assert saved == [3] and lines[-1]["step"] == 3
    assert stop.reason == "SIGTERM"


def test_before_the_first_step_only_the_schedulers_notice_is_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        stop = StopRequest()
        assert signal.getsignal(signal.SIGTERM) == before[0]
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before[1])


def test_mixture_is_counted_by_its_quotas(digits: Path, tmp_path: Path) -> None:
    sources = [str(digits), str(digits)]
    asked = pretraining("tiny", None, sources, ["data.weights=[1,3]", "training.steps=1000"])
    assert asked.config.data.sources == tuple(sources)
    job = prepare(asked, CPU)
    epochs = 1000 * 16 / 4 / job.order.epoch_rows(0)
    assert f"{epochs:.3g} epochs of the first source" in summary(job)


def test_durations_are_read_by_people() -> None:
    assert clock(59.6) == "00:01:00"
    assert clock(3 * 86400 + 4 * 3600 + 5 * 60 + 6) == "3d 04:05:06"


def test_metrics_are_valid_json(play: Any, tmp_path: Path) -> None:
    play("training.log_every=1")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
