"""The classifier that does best on the validation split, of those that a solver gives (paper section 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.features import classifier, classifier_sgd
from igpt_ds.features.classifier import Classifier, Rows


@dataclass(frozen=True)
class Choice:
    """What was chosen for a classifier (a strength, or a rate), and its accuracy on the validation split.

    Attributes:
        classifier: None of heads by SGD but for the best one.
    """

    accuracy: float
    setting: float
    converged: bool
    classifier: Classifier | None


def choose(train: Rows, validation: Rows, strengths: Sequence[float]) -> Choice:
    """By L-BFGS; all strengths of regularisation are tried."""
    best: Choice | None = None
    for strength, found in zip(strengths, classifier.fit(train, strengths), strict=True):
        accuracy = found.accuracy(validation)
        if best is None or accuracy > best.accuracy:
            best = Choice(accuracy, strength, found.converged, found)
    assert best is not None, "strengths"
    return best


@dataclass(frozen=True)
class Sgd:
    """How heads are trained by SGD.

    Attributes:
        iterations: batches; the paper's are a million.
        batch: images of one.
        ranks: that divide the heads among them.
    """

    classes: int
    iterations: int
    batch: int
    seed: int
    ranks: Ranks

    def choose(self, trains: Sequence[Rows], validations: Sequence[Rows], title: str) -> list[Choice]:
        """For each group of features; a collective of the ranks, all of which get them.

        All rates are tried at once, where the paper goes down from the largest until the accuracy falls.

        Raises:
            RunError: SGD diverged at every rate.
        """
        rates = classifier_sgd.RATES
        bank = classifier_sgd.fit(
            trains, self.classes, rates, self.iterations, self.seed, title, self.batch, self.ranks
        )
        accuracies_GR = bank.accuracies(validations, len(rates))
        if np.isnan(accuracies_GR).all(axis=1).any():
            raise RunError(f"{title}: SGD diverged at every rate: look at the features, or take --solver lbfgs")
        rate_G = np.nanargmax(accuracies_GR, axis=1)  # of equals the largest rate
        best_G = accuracies_GR[np.arange(len(trains)), rate_G]
        best = int(best_G.argmax())
        found = bank.classifier(best, int(rate_G[best]))
        return [
            Choice(float(best_G[group]), rates[rate], True, found if group == best else None)
            for group, rate in enumerate(rate_G.tolist())
        ]

    def fit(self, rows: Rows, rate: float, title: str) -> Classifier | None:
        """One head, by this rank alone; None if it diverged."""
        bank = classifier_sgd.fit([rows], self.classes, [rate], self.iterations, self.seed, title, self.batch)
        found = bank.classifier(0, 0)
        return found if np.isfinite(found.weights_DC).all() and np.isfinite(found.bias_C).all() else None
