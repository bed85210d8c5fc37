"""Which steps are bad, when a run rolls back, and which batches are left out then: cases with known answers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpt_ds.config.schema import HealthConfig
from igpt_ds.loading.order import LeftOut
from igpt_ds.train.stability import Stability

RECIPE = HealthConfig(spike_sigma=6.0, window=50, patience=3)


def noisy(count: int, seed: int = 0) -> list[float]:
    return list(2.0 + 0.05 * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_non_finite_gradient_is_skipped_whatever_the_loss(norm: float) -> None:
    judge = Stability(RECIPE, {})
    assert judge.judge(2.0, norm) == "skipped"
    assert (judge.bad, judge.skipped) == (1, 1)
    assert judge.judge(2.0, 1.0) == "good"
    assert (judge.bad, judge.skipped) == (0, 1)


def test_a_spike_stands_above_mean_and_six_deviations() -> None:
    losses = noisy(50)
    limit = np.mean(losses) + 6 * np.std(losses)
    for excess, verdict in ((-1e-9, "good"), (1e-9, "spike")):
        judge = Stability(RECIPE, {})
        assert [judge.judge(loss, 1.0) for loss in losses] == ["good"] * 50
        assert judge.judge(limit + excess, 1.0) == verdict
    assert judge.judge(math.nan, 1.0) == "spike"
    assert judge.judge(losses[0], 1.0) == "good"


def test_the_deviation_is_at_least_a_hundredth_of_the_mean() -> None:
    judge = Stability(RECIPE, {})
    for _ in range(50):
        judge.judge(2.0, 1.0)
    assert judge.judge(2.0 * 1.0599, 1.0) == "good"
    assert judge.judge(2.0 * 1.07, 1.0) == "spike"


def test_spikes_do_not_widen_the_window() -> None:
    judge = Stability(RECIPE, {})
    for loss in noisy(50):
        judge.judge(loss, 1.0)
    before = judge.state()["losses"]
    for _ in range(20):
        assert judge.judge(9.0, 1.0) == "spike"
    assert judge.state()["losses"] == before


def test_few_losses_are_no_ground_to_judge_on() -> None:
    judge = Stability(RECIPE, {})
    assert [judge.judge(2.0 if step % 5 else 9.0, 1.0) for step in range(20)] == ["good"] * 20


def test_no_sigma_lets_spikes_pass() -> None:
    judge = Stability(HealthConfig(spike_sigma=0.0), {})
    assert all(judge.judge(loss, 1.0) == "good" for loss in [*noisy(100), 50.0])


def test_the_third_bad_step_in_a_row_is_one_too_many() -> None:
    judge = Stability(RECIPE, {})
    for loss in noisy(50):
        judge.judge(loss, 1.0)
    lost = []
    for loss, norm in [(9.0, 1.0), (2.0, math.nan), (2.0, 1.0), (9.0, 1.0), (math.nan, math.nan), (9.0, 1.0)]:
        judge.judge(loss, norm)
        lost.append(judge.lost)
    assert lost == [False, False, False, False, False, True]


@given(st.lists(st.sampled_from([2.0, 2.01, 9.0, math.nan]), max_size=60), st.integers(0, 60))
def test_a_judge_from_a_checkpoint_judges_alike(losses: list[float], cut: int) -> None:
    unbroken, first = Stability(RECIPE, {}), Stability(RECIPE, {})
    expected = [unbroken.judge(loss, 1.0) for loss in losses]
    verdicts = [first.judge(loss, 1.0) for loss in losses[:cut]]
    second = Stability(RECIPE, json.loads(json.dumps(first.state())))
    assert verdicts + [second.judge(loss, 1.0) for loss in losses[cut:]] == expected
    assert second.state() == unbroken.state()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=6))
def test_batches_left_out_are_those_of_a_plain_set(spans: list[tuple[int, int]]) -> None:
    left_out = LeftOut.of([(first, first + count) for first, count in spans])
    never = {batch for first, count in spans for batch in range(first, first + count)}
    expected = [batch for batch in range(200) if batch not in never]
    assert [left_out.batch(step) for step in range(100)] == expected[:100]
    assert LeftOut.of(left_out.spans) == left_out
