"""Validation images that are trained on: whose part of the mixture they take."""

from fractions import Fraction
from pathlib import Path

import pytest

from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.loading.splits import folded_weights, open_held_out
from igpt_ds.train.begin import pretraining
from igpt_ds.train.job import Job, prepare
from tests.helpers.machines import CPU
from tests.igpt_ds.loading.test_loader import build

FOLD = "data.fold_validation=true"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """big/ has 90 images in two views and 10 held out, small/ 30 and 10, web/ 50 of which none was held out."""
    for name, train, held_out in (("big", [(90, 0), (90, 1)], 10), ("small", [(30, 0)], 10), ("web", [(50, 0)], 0)):
        (tmp_path / name).mkdir()
        build(tmp_path / name / "train", train, seed=len(name))
        if held_out:
            build(tmp_path / name / "val", [(held_out, 0)], seed=9)
    return [str(tmp_path / name) for name in ("big", "small", "web")]


def job(sources: list[str], *sets: str) -> Job:
    return prepare(pretraining("tiny", None, sources, [FOLD, *sets]), CPU)


def shares(found: Job, length: int) -> list[Fraction]:
    places = [found.order(p)[0] for p in range(length)]
    return [Fraction(places.count(source), length) for source in range(len(found.train_sets))]


def test_one_switch_trains_on_every_image_once_an_epoch(sources: list[str]) -> None:
    found = job(sources)
    assert [dataset.rows for dataset in found.train_sets] == [90, 30, 50, 10, 10]
    assert [dataset.path.name for dataset in found.train_sets] == ["train"] * 3 + ["val"] * 2
    assert found.validation_set is None and found.config.training.validate_every > 0
    seen = {found.order(p) for p in range(190)}
    assert len(seen) == 190 and {(source, row) for source, _, row in seen} == {
        (source, row) for source, dataset in enumerate(found.train_sets) for row in range(dataset.rows)
    }


def test_weights_stay_those_of_the_sources(sources: list[str]) -> None:
    """To the row: a source's two parts add up to what it had, and are shared by their rows."""
    found = job(sources, "data.weights=[5, 2, 1]")
    big, small, web, big_val, small_val = shares(found, sum(found.order.weights))
    assert (big + big_val, small + small_val, web) == (Fraction(5, 8), Fraction(2, 8), Fraction(1, 8))
    assert float(big_val / big) == pytest.approx(10 / 90, rel=1e-3)
    assert float(small_val / small) == pytest.approx(10 / 30, rel=1e-3)


def test_the_order_is_another_one_and_so_a_resume_is_refused(sources: list[str]) -> None:
    plain = prepare(pretraining("tiny", None, sources, []), CPU)
    folded = job(sources)
    differing = [key for key, value in plain.identity().items() if folded.identity()[key] != value]
    assert differing == ["data_order"]


def test_what_cannot_be_folded_is_a_line(sources: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.fold_validation=true: no source has a val/: leave it out"):
        job(sources[2:])
    with pytest.raises(UserError, match="must be bool, not 'yes'"):
        pretraining("tiny", None, sources, ["data.fold_validation=yes"])
    opened, held_out = [Dataset.open(Path(sources[0]) / "train")], [open_held_out(sources[0])]
    assert folded_weights([65536], opened, held_out) == (58982, 6554)
    with pytest.raises(UserError, match="1 cannot be shared"):
        folded_weights([1, 65535], opened * 2, held_out * 2)
