"""The classifier that does best on the validation split, of those that a solver gives (paper section 3.4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from igpt_ds.errors import RunError
from igpt_ds.features import classifier, classifier_sgd
from igpt_ds.features.classifier import Classifier, Rows


@dataclass(frozen=True)
class Choice:
    """A classifier, what was chosen for it (a strength, or a rate), and its accuracy on the validation split."""

    accuracy: float
    setting: float
    classifier: Classifier


def choose(
    train: Rows, validation: Rows, classes: int, strengths: Sequence[float], iterations: int, seed: int, title: str
) -> Choice:
    """The classifier that does best on the validation split.

    Args:
        strengths: of regularisation, by L-BFGS; all are tried. None: by SGD, whose rates are tried in order, until the
            accuracy falls.
        iterations: of SGD.

    Raises:
        RunError: SGD diverged at every rate.
    """
    best: Choice | None = None
    for setting, found in _candidates(train, classes, strengths, iterations, seed, title):
        if found is None:
            continue
        accuracy = found.accuracy(validation)
        if best is None or accuracy > best.accuracy:
            best = Choice(accuracy, setting, found)
        elif not strengths and accuracy < best.accuracy:
            break
    if best is None:
        raise RunError(f"{title}: SGD diverged at every rate: look at the features, or take --solver lbfgs")
    return best


def _candidates(
    train: Rows, classes: int, strengths: Sequence[float], iterations: int, seed: int, title: str
) -> Iterator[tuple[float, Classifier | None]]:
    if strengths:
        yield from zip(strengths, classifier.fit(train, strengths), strict=True)
        return
    for rate in classifier_sgd.RATES:
        yield rate, classifier_sgd.fit(train, classes, rate, iterations, seed, f"{title}, rate {rate:g}")
