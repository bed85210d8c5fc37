"""The modal prediction over masks, and the seeds of an evaluation's masks."""

import collections
import dataclasses

import numpy as np
import pytest
import torch

from igpt_ds.features.masks import mask_seed, vote
from igpt_ds.objectives import masked_pixel
from tests.helpers.models import small_config

CONFIG = small_config("objective.name=masked_pixel")


def voted(columns: list[list[int]], positions: list[int] | None = None, seed: int = 0) -> list[int]:
    """The classes voted for; each column holds one image's predictions."""
    where = torch.tensor(range(len(columns)) if positions is None else positions)
    return vote(torch.tensor(columns).T, where, dataclasses.replace(CONFIG, seed=seed)).tolist()


def test_the_class_named_most_often_wins_wherever_it_stands() -> None:
    assert voted([[3, 1, 3, 2, 2 + 1], [7, 7, 0, 0, 7], [5, 5, 5, 5, 5], [9, 4, 8, 4, 6]]) == [3, 7, 5, 4]
    assert voted([[6]]) == [6]


def test_votes_are_those_of_counting_one_by_one() -> None:
    predictions = np.random.default_rng(0).integers(0, 4, (300, 5))
    for column, found in zip(predictions.tolist(), voted(predictions.tolist()), strict=True):
        counts = collections.Counter(column)
        assert counts[found] == max(counts.values())


def test_ties_are_broken_evenly_and_by_the_seed() -> None:
    images = 6000
    tie = [[8, 2, 8, 2, 5]] * images
    first = voted(tie, seed=1)
    shares = collections.Counter(first)
    # Six standard deviations of a fair coin.
    assert set(shares) == {2, 8} and abs(shares[2] - images / 2) < 6 * (images / 4) ** 0.5
    assert voted(tie, seed=1) == first
    assert voted(tie, seed=2) != first
    three = collections.Counter(voted([[4, 6, 9]] * images))
    assert set(three) == {4, 6, 9} and all(abs(n - images / 3) < 6 * (images * 2 / 9) ** 0.5 for n in three.values())


def test_an_image_gets_the_same_vote_in_any_batch() -> None:
    tie = [[1, 2]] * 50
    whole = voted(tie)
    assert voted(tie[:20], list(range(30, 50))) == whole[30:]


def test_masks_of_an_evaluation_differ_from_one_another_and_from_those_of_training() -> None:
    tokens, positions = torch.zeros(400, 16, dtype=torch.int64), torch.arange(400)
    seeds = [CONFIG.seed, *(mask_seed(CONFIG.seed, split, m) for split in ("train", "val") for m in range(3))]
    masks = [masked_pixel.mask(tokens, positions, s, CONFIG.objective.mask_rate).float() for s in seeds]
    for number, mask in enumerate(masks):
        assert mask.mean().item() == pytest.approx(0.15, abs=0.03)
        for other in masks[:number]:
            # Independent masks meet in 0.15² of the places; six standard deviations.
            together = (mask * other).mean().item()
            assert together == pytest.approx(0.0225, abs=6 * (0.0225 / 6400) ** 0.5)
