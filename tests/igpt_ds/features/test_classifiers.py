"""The linear classifiers: scikit-learn's and ours against optima found otherwise, and SGD against both."""

import itertools

import numpy as np
import pytest
import torch

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.features import classifier, classifier_sgd
from igpt_ds.features.choice import Sgd
from igpt_ds.features.classifier import Classifier, Rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SCALES = np.array([1, 10, 0.1, 1, 1, 1])


def clouds(classes: int, images: int, seed: int = 0) -> Rows:
    """Overlapping clouds in 6 features of different scale; the same clouds whatever the seed."""
    centres = np.random.default_rng(7).normal(size=(classes, 6))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    features = (centres[labels] + generator.normal(size=(images, 6)) * 1.5) * SCALES + 3
    return Rows([(features.astype(np.float32),)], labels)


def optimum(rows: Rows, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """scipy's minimum of  sum_i -log p(y_i | x_i) + strength |W|² / 2  on standardised features: W, b."""
    from scipy.optimize import minimize

    features = rows.read(*rows.blocks(len(rows))[0]).astype(np.float64)
    x, one_hot = (features - features.mean(0)) / features.std(0), np.eye(rows.labels_I.max() + 1)[rows.labels_I]
    size = x.shape[1] * one_hot.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:size].reshape(x.shape[1], -1), flat[size:]
        logits = x @ weights + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slope = np.exp(log_p) - one_hot
        value = -(log_p * one_hot).sum() + strength * (weights**2).sum() / 2
        return value, np.concatenate([(x.T @ slope + strength * weights).ravel(), slope.sum(0)])

    best = minimize(loss, np.zeros(size + one_hot.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-7}).x
    return best[:size].reshape(x.shape[1], -1), best[size:]


@pytest.mark.parametrize("device", [None, "cpu"], ids=["scikit-learn", "torch"])
def test_classifier_is_the_regularised_maximum_of_likelihood(device: str | None) -> None:
    train, test = clouds(4, 300), clouds(4, 500, seed=1)
    strengths = (100.0, 3.0, 0.1)  # each begins where the one before ended
    for strength, found in zip(strengths, classifier.fit(train, strengths, device, tolerance=1e-9), strict=True):
        weights, bias = optimum(train, strength)
        np.testing.assert_allclose(found.weights_DC, weights, atol=1e-5)
        # Only differences of scores matter, and b is not penalised.
        np.testing.assert_allclose(found.bias_C - found.bias_C.mean(), bias - bias.mean(), atol=1e-5)
        scores = (test.parts[0][0] - found.mean_D) / found.scale_D @ weights + bias
        assert found.accuracy(test) == pytest.approx((scores.argmax(1) == test.labels_I).mean(), abs=2 / 500)
        assert 0.4 < found.accuracy(test) < 0.95


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_torch_finds_the_optimum_of_scikit_learn(classes: int, strength: float) -> None:
    """At the tolerance in use; with two classes only the difference of the two columns is determined."""
    train, test = clouds(classes, 400), clouds(classes, 400, seed=1)
    theirs, ours = (next(classifier.fit(train, (strength,), device)) for device in (None, "cpu"))
    assert theirs.converged and ours.converged

    def differences(found: Classifier) -> np.ndarray:
        table = np.vstack([found.weights_DC, found.bias_C])
        return table - table[:, :1]

    np.testing.assert_allclose(differences(ours), differences(theirs), atol=5e-3)
    assert (ours.predict(test) == theirs.predict(test)).mean() > 0.99


@pytest.mark.parametrize("device", [None, "cpu"], ids=["scikit-learn", "torch"])
def test_a_feature_that_is_constant_but_for_rounding_does_no_harm(device: str | None) -> None:
    train, test = clouds(3, 300), clouds(3, 300, seed=1)
    generator = np.random.default_rng(3)

    def with_constant(rows: Rows, noise: float) -> Rows:
        column = 100 + noise * generator.normal(size=(len(rows), 1))
        return Rows([(rows.parts[0][0], column)], rows.labels_I)

    plain = next(classifier.fit(train, (1.0,), device))
    found = next(classifier.fit(with_constant(train, 1e-9), (1.0,), device))
    assert (found.predict(with_constant(test, 1e-3)) == plain.predict(test)).mean() > 0.99


def test_labels_keep_their_numbers_and_too_few_iterations_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    train = clouds(3, 200)
    gaps = Rows(train.parts, np.array([2, 5, 9])[train.labels_I])
    for device in (None, "cpu"):
        found = next(classifier.fit(gaps, (1.0,), device))
        assert found.converged and set(found.predict(gaps)) == {2, 5, 9} and found.accuracy(gaps) > 0.5
    monkeypatch.setattr(classifier, "MAX_ITERATIONS", 2)
    for device in (None, "cpu"):
        assert not next(classifier.fit(gaps, (1e-3,), device)).converged


def test_more_than_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match="do not fit in memory: take --solver sgd"):
        next(classifier.fit(clouds(3, 50), (1.0,)))


# --- SGD -------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_never_classified() -> None:
    rows = clouds(3, 60)
    found = next(classifier.fit(rows, (1.0,)))
    damaged = Rows([(rows.parts[0][0].copy(),)], rows.labels_I)
    damaged.parts[0][0][7, 2] = np.nan
    with pytest.raises(RunError, match="scores are not finite"):
        found.accuracy(damaged)
    with pytest.raises(RunError, match="features of a classifier are not finite"):
        next(classifier.fit(damaged, (1.0,)))


def numbered(*sizes: int) -> Rows:
    """Rows whose features and label tell which row it is; two layers side by side."""
    parts, first = [], 0
    for size in sizes:
        column = np.arange(first, first + size, dtype=np.float32)[:, None]
        parts.append((column, -column))
        first += size
    return Rows(parts, np.arange(first))


def test_rows_of_several_arrays_are_one_after_another() -> None:
    both = numbered(5) + Rows([(np.full((2, 1), 5.0), np.full((2, 1), -5.0))], np.array([5, 5]))
    assert len(both) == 7 and both.width == 2
    read = np.concatenate([both.read(*block) for block in both.blocks(3)])
    labels = np.concatenate([both.labels(*block) for block in both.blocks(3)])
    assert np.array_equal(read, np.stack([labels, -labels], axis=1)) and np.array_equal(labels, both.labels_I)


def test_every_row_is_seen_once_an_epoch_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_sgd, "_BLOCK", 4)
    monkeypatch.setattr(classifier_sgd, "_BLOCKS", 3)
    rows = numbered(23, 9)  # 32 rows, two batches an epoch
    epochs = []
    stream = classifier_sgd.batches([rows], 16, 1, CPU)
    for _ in range(3):
        first, second = next(stream), next(stream)
        labels = torch.cat([first[1], second[1]]).numpy()
        assert np.array_equal(torch.cat([first[0][0], second[0][0]]), np.stack([labels, -labels], axis=1))
        assert sorted(labels) == list(range(32))
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != list(range(32))
    again = classifier_sgd.batches([rows], 16, 1, CPU)
    assert torch.cat([next(again)[1], next(again)[1]]).tolist() == epochs[0]
    # Batches that do not divide the rows, or are more, go on into the next epoch; none is short.
    for size in (10, 40):
        found = list(itertools.islice(classifier_sgd.batches([rows], size, 1, CPU), 16))
        assert [len(labels) for _, labels in found] == [size] * 16
        seen = torch.cat([labels for _, labels in found])
        assert all(sorted(seen[i : i + 32].tolist()) == list(range(32)) for i in range(0, 160, 32))
        assert torch.equal(torch.cat([x for x, _ in found], dim=1)[0, :, 0], seen.float())


def alone(rows: Rows, classes: int, rate: float, steps: int, seed: int = 0, batch: int = 128) -> Classifier:
    return classifier_sgd.fit([rows], classes, [rate], steps, seed, "test", batch).classifier(0, 0)


def test_sgd_follows_momentum_and_cosine_to_the_letter() -> None:
    """Against the update written out in float64."""
    rows, steps, rate = clouds(3, 64), 12, 0.05
    found = alone(rows, 3, rate, steps, seed=4, batch=16)
    weights, bias = np.zeros((6, 3)), np.zeros(3)
    moved_weights, moved_bias = np.zeros((6, 3)), np.zeros(3)
    stream = itertools.islice(classifier_sgd.batches([rows], 16, 4, CPU), steps)
    for step, (x, labels) in enumerate((x[0].double().numpy(), labels.numpy()) for x, labels in stream):
        scores = x @ weights + bias
        p = np.exp(scores - scores.max(1, keepdims=True))
        slope = (p / p.sum(1, keepdims=True) - np.eye(3)[labels]) / 16
        moved_weights, moved_bias = 0.9 * moved_weights + x.T @ slope, 0.9 * moved_bias + slope.sum(0)
        now = rate * (1 + np.cos(np.pi * step / steps)) / 2
        weights, bias = weights - now * moved_weights, bias - now * moved_bias
    np.testing.assert_allclose(found.weights_DC, weights, atol=1e-4)
    np.testing.assert_allclose(found.bias_C, bias, atol=1e-4)


def layers_of(images: int, seed: int = 0, dtype: str = "float32") -> list[Rows]:
    """Three layers of 6 features of the same images, of different scale."""
    rows = clouds(3, images, seed)
    scales = ((rows.parts[0][0] - 3) / SCALES.astype(np.float32) * factor for factor in (1, 0.3, 2))
    return [Rows([(layer.astype(dtype),)], rows.labels_I) for layer in scales]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_heads_trained_at_once_are_those_trained_one_by_one(dtype: str) -> None:
    train, held_out, rates = layers_of(500, 0, dtype), layers_of(200, 1, dtype), [0.1, 0.01]
    bank = classifier_sgd.fit(train, 3, rates, 60, 5, "test", 32)
    accuracies = bank.accuracies(held_out, len(rates))
    assert accuracies.shape == (3, 2) and len(set(accuracies.ravel())) > 3
    for group, rows in enumerate(train):
        for number, rate in enumerate(rates):
            one, among = alone(rows, 3, rate, 60, 5, 32), bank.classifier(group, number)
            np.testing.assert_allclose(among.weights_DC, one.weights_DC, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(among.bias_C, one.bias_C, rtol=1e-4, atol=1e-6)
            assert accuracies[group, number] == pytest.approx(one.accuracy(held_out[group]), abs=1e-12)


def test_layers_side_by_side_are_one_group() -> None:
    layers = layers_of(300)
    beside = Rows([tuple(rows.parts[0][0] for rows in layers)], layers[0].labels_I)
    joined = Rows([(np.concatenate([rows.parts[0][0] for rows in layers], axis=1),)], layers[0].labels_I)
    ours, theirs = alone(beside, 3, 0.05, 40), alone(joined, 3, 0.05, 40)
    assert ours.weights_DC.shape == (18, 3) and np.array_equal(ours.weights_DC, theirs.weights_DC)


def test_the_heads_are_shared_out_each_to_one_rank() -> None:
    for groups, rates, world in itertools.product((1, 2, 3, 7, 49), (1, 3, 8), (1, 2, 3, 5, 8, 16)):
        had: list[tuple[int, int]] = []
        for rank in range(world):
            of_groups, of_rates = classifier_sgd.share(groups, rates, rank, world)
            had += itertools.product(of_groups, of_rates)
        assert sorted(had) == list(itertools.product(range(groups), range(rates))), (groups, rates, world)
    loads = [len(classifier_sgd.share(49, 8, rank, 8)[0]) for rank in range(8)]
    assert sorted(loads) == [6] * 7 + [7]
    one_group = [classifier_sgd.share(1, 8, rank, 8) for rank in range(8)]
    assert [(list(groups), list(rates)) for groups, rates in one_group] == [([0], [rank]) for rank in range(8)]


def test_sgd_comes_near_the_unregularised_optimum() -> None:
    train, test = clouds(3, 600), clouds(3, 600, seed=1)
    scaled = [Rows([((rows.parts[0][0] - 3) / SCALES.astype(np.float32),)], rows.labels_I) for rows in (train, test)]
    best = next(classifier.fit(train, (1e-3,)))
    found = alone(scaled[0], 3, 0.1, 1500)
    assert (found.predict(scaled[1]) == best.predict(test)).mean() > 0.96


def test_a_rate_at_which_sgd_diverges_spoils_no_other_head() -> None:
    train, held_out = layers_of(300), layers_of(200, 1)
    huge, huge_held_out = (Rows([(layers[1].parts[0][0] * 1e18,)], layers[1].labels_I) for layers in (train, held_out))
    bank = classifier_sgd.fit([train[0], huge], 3, [1e30, 0.1], 40, 0, "test")
    accuracies = bank.accuracies([held_out[0], huge_held_out], 2)
    assert np.isnan(accuracies[1, 0])
    assert accuracies[0, 1] == alone(train[0], 3, 0.1, 40).accuracy(held_out[0]) > 0.4
    sgd = Sgd(3, 40, 128, 0, Ranks())
    assert sgd.fit(huge, 1e30, "test") is None and sgd.fit(train[0], 0.1, "test") is not None


def test_more_heads_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_sgd, "free_bytes", lambda device, neighbours: 1000)
    with pytest.raises(UserError, match="for 3 layers at once do not fit in memory: probe fewer --layers"):
        classifier_sgd.fit(layers_of(50), 3, [0.1], 5, 0, "test")
