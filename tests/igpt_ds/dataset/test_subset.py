"""Few labels of a class: which images, the same ones in every view, and what is read of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.dataset.shards import Dataset
from igpt_ds.dataset.subset import Subset, balanced, require_labels
from igpt_ds.errors import UserError
from igpt_ds.loading.loader import MicroBatches, shard_labels, source_rows
from igpt_ds.loading.order import Order
from tests.igpt_ds.loading.test_loader import build

LABELS = np.repeat([0, 1, 2], [50, 80, 65])[np.random.default_rng(0).permutation(195)]


def test_subsets_hold_as_many_distinct_images_of_every_class() -> None:
    for count in (1, 7, 50):
        chosen = balanced(LABELS, count, seed=3)
        assert len(set(chosen.tolist())) == 3 * count
        assert np.bincount(LABELS[chosen]).tolist() == [count] * 3
    assert set(np.flatnonzero(LABELS == 0)) <= set(balanced(LABELS, 50, 3).tolist())


def test_subsets_are_drawn_by_the_seed() -> None:
    first = balanced(LABELS, 10, seed=3, repeat=0).tolist()
    assert balanced(LABELS, 10, seed=3, repeat=0).tolist() == first == balanced(LABELS, 10, 3).tolist()
    assert balanced(LABELS, 10, seed=3, repeat=1).tolist() != first
    assert balanced(LABELS, 10, seed=4, repeat=0).tolist() != first


def test_every_image_of_a_class_is_as_likely() -> None:
    """Over 2000 draws of 10 of the 50 images of class 0: each 400 times, within six standard deviations."""
    times = np.zeros(195)
    for repeat in range(2000):
        times[balanced(LABELS, 10, 0, repeat)] += 1
    assert np.abs(times[LABELS == 0] - 400).max() < 6 * (2000 * 0.2 * 0.8) ** 0.5


@pytest.fixture
def whole(tmp_path: Path) -> Dataset:
    """Ten images in two views, whose shards are cut at other places; a label is an image's number."""
    return build(tmp_path / "data", [(7, 0), (3, 0), (2, 1), (6, 1), (2, 1)], labelled=True)


def test_an_image_is_there_in_all_of_its_views(whole: Dataset) -> None:
    chosen = np.array([1, 2, 6, 9])
    subset = Subset(whole, chosen)
    assert (subset.rows, subset.manifest.rows) == (4, 4)
    assert [record.rows for record in subset.manifest.shards] == [3, 1, 1, 2, 1]
    assert subset.labels().tolist() == chosen.tolist() and [int(i) for i in subset.ids()] == chosen.tolist()
    assert [part.tolist() for part in shard_labels(subset)] == [[1, 2, 6], [9], [1], [2, 6], [9]]
    np.testing.assert_array_equal(subset.images(), whole.images()[chosen])
    np.testing.assert_array_equal(subset.tokens(3), whole.tokens(3)[[0, 4]])
    for copy in (subset, subset.own(), pickle.loads(pickle.dumps(subset))):
        np.testing.assert_array_equal(copy.read_many([(3, 1), (0, 0)]), whole.read_many([(3, 4), (0, 1)]))


def test_each_epoch_has_each_image_once_with_its_label(whole: Dataset) -> None:
    """Also where whole shards have none of them."""
    subset = Subset(whole, np.array([7, 8, 9]))
    batches = MicroBatches(
        [subset],
        Order(0, [source_rows(subset)], None, 1),
        batch=3,
        micro_batch=3,
        rank=0,
        world=1,
        labels=[shard_labels(subset)],
    )
    by_label = [
        {int(label): row.tolist() for label, row in zip(view_labels, tokens, strict=True)}
        for view_labels, tokens in (
            (whole.labels(), whole.images()),
            (np.concatenate(shard_labels(whole)[2:]), np.concatenate([whole.tokens(k) for k in (2, 3, 4)])),
        )
    ]
    for epoch, batch in enumerate(batches.read(range(4))):
        assert sorted(batch["labels"].tolist()) == [7, 8, 9]
        for label, row in zip(batch["labels"].tolist(), batch["tokens"].tolist(), strict=True):
            assert row == by_label[epoch % 2][label]


def test_more_labels_than_a_class_has_are_refused(digits: Path) -> None:
    train = Dataset.open(digits / "train")
    least = int(np.bincount(train.labels()).min())
    require_labels(train, least, "--labels 9")
    with pytest.raises(UserError, match=rf"--labels 9: class \d has {least} images: ask for at most {least}"):
        require_labels(train, least + 1, "--labels 9")
