"""The learning rate in closed form."""

import dataclasses
import itertools
import math

import pytest

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import TrainingConfig
from igpt_ds.train.schedule import learning_rate

RECIPE = TrainingConfig(steps=1000, batch=1, learning_rate=0.008, warmup_steps=100)


def recipe(**changes: int) -> TrainingConfig:
    return dataclasses.replace(RECIPE, **changes)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert learning_rate(0, RECIPE) == pytest.approx(0.008 / 100)
    assert learning_rate(49, RECIPE) == pytest.approx(0.004)
    assert learning_rate(99, RECIPE) == 0.008
    for step in range(99):
        assert learning_rate(step + 1, RECIPE) - learning_rate(step, RECIPE) == pytest.approx(0.00008)


def test_the_cosine_falls_from_the_peak_to_zero() -> None:
    assert learning_rate(100, RECIPE) == 0.008
    assert learning_rate(100 + 300, RECIPE) == pytest.approx(0.008 * 0.75)  # cos 60° = 1/2
    assert learning_rate(100 + 450, RECIPE) == pytest.approx(0.004)  # half-way
    assert learning_rate(100 + 600, RECIPE) == pytest.approx(0.008 * 0.25)
    # 1 - cos x = 2 sin²(x/2): the last update, and the one that is never made.
    assert learning_rate(999, RECIPE) == pytest.approx(0.008 * math.sin(math.pi / 1800) ** 2)
    assert learning_rate(999, RECIPE) > 0
    assert learning_rate(1000, RECIPE) == 0
    assert learning_rate(2000, RECIPE) == 0
    rates = [learning_rate(step, RECIPE) for step in range(100, 1001)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_without_warm_up_the_first_update_is_at_the_peak() -> None:
    assert learning_rate(0, recipe(warmup_steps=0)) == 0.008
    assert learning_rate(500, recipe(warmup_steps=0)) == pytest.approx(0.004)


@pytest.mark.parametrize("warmup", [1000, 4000])
def test_a_warm_up_as_long_as_the_run_never_falls(warmup: int) -> None:
    long = recipe(warmup_steps=warmup)
    assert [learning_rate(step, long) for step in (0, 499, 999)] == pytest.approx(
        [0.008 * updates / warmup for updates in (1, 500, 1000)]
    )


def test_a_run_of_one_step() -> None:
    assert learning_rate(0, recipe(steps=1, warmup_steps=0)) == 0.008
    assert learning_rate(0, recipe(steps=1, warmup_steps=1)) == 0.008


def test_stopping_early_leaves_the_schedule_as_it_is() -> None:
    assert learning_rate(10, recipe(stop_at=12)) == learning_rate(10, RECIPE)


def test_the_xl_preset_peaks_after_an_epoch_and_ends_at_zero() -> None:
    xl = load_config("xl").training
    assert learning_rate(xl.warmup_steps - 1, xl) == xl.learning_rate == 0.0003
    assert learning_rate((xl.warmup_steps + xl.steps) // 2, xl) == pytest.approx(0.00015, rel=1e-5)
    assert learning_rate(xl.steps, xl) == 0
