"""Multinomial logistic regression by L-BFGS, as the paper classifies CIFAR and STL-10 (section 3.4).

The minimum over W, b of

    sum over images of -log p(y | x) + strength / 2 |W|²,    p = softmax(W x + b),

where x are the features scaled to mean 0 and variance 1 over the training images, so that one strength suits all
layers and the raw pixels. On a CPU by scikit-learn; on a GPU the same objective in float64 by torch, for sets that
take scikit-learn hours. With two classes scikit-learn has one weight vector w, the difference of the two of softmax,
and penalises |w|² / 2, which is |W|²: there torch takes twice the strength.

Suffixes: I images, D features, C classes.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from igpt_ds.cores import threads_for
from igpt_ds.errors import RunError, UserError
from igpt_ds.memory import available_bytes

MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # largest slope of the mean loss at the end: scikit-learn's default
_CHUNK = 4096  # images predicted at once


@dataclass(frozen=True)
class Rows:
    """Features and labels of images that lie in several arrays, as a rule memory maps.

    Attributes:
        parts: images [D] that follow one another (training images, then validation images that are folded in); each
            a tuple of layers [images, D of the layer], whose features stand side by side.
        labels_I: int64, of all of them.
    """

    parts: Sequence[tuple[np.ndarray, ...]]
    labels_I: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_I)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows([*self.parts, *other.parts], np.concatenate([self.labels_I, other.labels_I]))

    @property
    def width(self) -> int:
        """Features an image, D."""
        return sum(layer.shape[1] for layer in self.parts[0])

    def blocks(self, size: int) -> list[tuple[int, int, int]]:
        """All rows, cut up: (part, first, last + 1) of at most `size` rows each."""
        return [
            (part, first, min(first + size, len(layers[0])))
            for part, layers in enumerate(self.parts)
            for first in range(0, len(layers[0]), size)
        ]

    def read(self, part: int, first: int, stop: int) -> np.ndarray:
        """One block's features: [stop - first, D]."""
        layers = [layer[first:stop] for layer in self.parts[part]]
        return layers[0] if len(layers) == 1 else np.concatenate(layers, axis=1)

    def labels(self, part: int, first: int, stop: int) -> np.ndarray:
        """One block's labels."""
        start = sum(len(layers[0]) for layers in self.parts[:part])
        return self.labels_I[start + first : start + stop]


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of scaled features; float64.

    Attributes:
        mean_D, scale_D: x = (features - mean) / scale.
        weights_DC, bias_C: the scores of class c are x @ weights[:, c] + bias[c].
        classes_C: int64, the labels that the columns stand for.
        converged: whether the slope fell below the tolerance.
    """

    mean_D: np.ndarray
    scale_D: np.ndarray
    weights_DC: np.ndarray
    bias_C: np.ndarray
    classes_C: np.ndarray
    converged: bool

    def predict(self, rows: Rows) -> np.ndarray:
        """Labels: int64 [I]. Reads a few thousand rows at a time."""
        found = [np.empty(0, np.int64)]
        with threadpool_limits(threads_for(2 * min(len(rows), _CHUNK) * self.weights_DC.size)):
            for block in rows.blocks(_CHUNK):
                x_ID = (rows.read(*block).astype(np.float64) - self.mean_D) / self.scale_D
                scores_IC = x_ID @ self.weights_DC + self.bias_C
                if not np.isfinite(scores_IC).all():  # argmax would take one for a class
                    raise RunError("a classifier's scores are not finite: remove the features that are kept, try again")
                found.append(self.classes_C[scores_IC.argmax(axis=1)])
        return np.concatenate(found)

    def accuracy(self, rows: Rows) -> float:
        """The share of images whose label is found."""
        return float((self.predict(rows) == rows.labels_I).mean())


def fit(
    rows: Rows,
    strengths: Sequence[float],
    device: str | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[Classifier]:
    """A classifier for each strength of regularisation; each begins where the one before ended.

    Args:
        rows: with at least two classes; a float64 copy of the features is held in memory.
        strengths: above 0, best in descending order: the strongest is found first and fastest.
        device: "cuda" or "cpu" for torch; None: scikit-learn, or torch where there is a GPU.
    """
    needed = 2 * 8 * len(rows) * rows.width
    if needed > available_bytes():
        raise UserError(
            f"logistic regression: {needed / 2**30:.3g} GiB for {len(rows):,} images of {rows.width:,} features "
            f"do not fit in memory: take --solver sgd, or fewer --images"
        )
    x_ID = np.empty((len(rows), rows.width))
    done = 0
    for block in rows.blocks(_CHUNK):
        features_ID = rows.read(*block)
        x_ID[done : done + len(features_ID)] = features_ID
        done += len(features_ID)
    if not np.isfinite(x_ID).all():
        raise RunError("the features of a classifier are not finite: remove those that are kept, and try again")
    mean_D, deviation_D = x_ID.mean(axis=0), x_ID.std(axis=0)
    # A feature that differs by rounding only is constant: to scale that up would make noise of it.
    scale_D = np.where(deviation_D > 1e-6 * np.abs(mean_D), deviation_D, 1.0)
    x_ID -= mean_D
    x_ID /= scale_D
    classes_C, targets_I = np.unique(rows.labels_I, return_inverse=True)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is None:
        solutions = _by_scikit_learn(x_ID, targets_I, strengths, tolerance)
    else:
        solutions = _by_torch(x_ID, targets_I, strengths, tolerance, device)
    for weights_DC, bias_C, converged in solutions:
        yield Classifier(mean_D, scale_D, weights_DC, bias_C, classes_C, converged)


_Solution = tuple[np.ndarray, np.ndarray, bool]


def _by_scikit_learn(
    x_ID: np.ndarray, targets_I: np.ndarray, strengths: Sequence[float], tolerance: float
) -> Iterator[_Solution]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(solver="lbfgs", max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True)
    threads = threads_for(2 * x_ID.size * (int(targets_I.max()) + 1))
    for strength in strengths:
        model.set_params(C=1 / strength)
        with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads):
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x_ID, targets_I)
        weights_DC, bias_C = model.coef_.T.copy(), model.intercept_.copy()
        if len(bias_C) == 1:  # two classes, one vector: the scores of the second
            weights_DC = np.concatenate([np.zeros_like(weights_DC), weights_DC], axis=1)
            bias_C = np.array([0.0, bias_C[0]])
        yield weights_DC, bias_C, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def _by_torch(
    x_ID: np.ndarray, targets_I: np.ndarray, strengths: Sequence[float], tolerance: float, device: str
) -> Iterator[_Solution]:
    x, targets = torch.from_numpy(x_ID).to(device), torch.from_numpy(targets_I).to(device)
    images, classes = len(x), int(targets.max()) + 1
    weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=device, requires_grad=True)
    for strength in strengths:
        penalty = strength * (2 if classes == 2 else 1) / (2 * images)
        # torch stops at small steps, too, by default: only a small slope may end it here.
        lbfgs = torch.optim.LBFGS(
            [weights, bias],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def loss(lbfgs: torch.optim.LBFGS = lbfgs, penalty: float = penalty) -> float:
            lbfgs.zero_grad()
            value = F.cross_entropy(x @ weights + bias, targets) + penalty * weights.square().sum()
            value.backward()
            return float(value.detach())

        lbfgs.step(loss)
        loss()
        assert weights.grad is not None and bias.grad is not None
        slope = max(float(weights.grad.abs().max()), float(bias.grad.abs().max()))
        found = weights.detach().cpu().numpy().copy(), bias.detach().cpu().numpy().copy()
        yield *found, slope <= tolerance
