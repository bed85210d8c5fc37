"""Linear probe of every layer (paper section 2.4, figure 2): how well a linear classifier reads the classes.

Multinomial logistic regression by L-BFGS, as the paper does for CIFAR and STL-10. Features are scaled to unit
variance, so that one regularisation strength suits all layers and the raw pixels.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_ds.checkpoint import Checkpoint
from igpt_ds.config import Config
from igpt_ds.errors import UserError
from igpt_ds.evals.features import Features, extract, load_model, pixels
from igpt_ds.shards import Dataset

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LayerResult:
    """One classifier: which layer's features it reads, and its accuracy on held-out images."""

    layer: int
    accuracy: float
    converged: bool


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the validation split.

    Attributes:
        layers: one a layer, 0 to L.
        untrained: the same network before training; empty if it was not asked for.
        pixels: the classifier on raw colours.
        train_images, validation_images: how many images the figures rest on.
    """

    step: int
    layers: list[LayerResult]
    untrained: list[LayerResult]
    pixels: float
    train_images: int
    validation_images: int

    @property
    def best(self) -> LayerResult:
        return max(self.layers, key=lambda result: result.accuracy)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best_layer": self.best.layer, "best_accuracy": self.best.accuracy}


def probe(
    checkpoint: Checkpoint,
    config: Config,
    train: Dataset,
    validation: Dataset,
    *,
    images: int | None = None,
    untrained: bool = False,
) -> ProbeResult:
    """Probe every layer of a checkpoint, the pixels and, if asked for, the untrained network.

    Args:
        images: how many of each split, from its beginning; None for all.

    Raises:
        UserError: no labels, other classes in the two splits, fewer than two classes, or data of another palette
            than the checkpoint's.
    """
    for dataset in (train, validation):
        if dataset.palette.sha256 != checkpoint.identity["palette_sha256"]:
            raise UserError(
                f"{dataset.path}: another palette than the one {checkpoint.path} was trained with: "
                f"build the data with the run's palette.npy"
            )
    if train.manifest.classes != validation.manifest.classes:
        raise UserError(f"{validation.path}: its classes are not those of {train.path}: build both splits in one go")
    if train.manifest.classes is None or len(np.unique(train.labels()[:images])) < 2:
        raise UserError(f"{train.path}: images of one class or without labels: a probe needs class folders")

    def probe_network(trained: Checkpoint | None, name: str) -> list[LayerResult]:
        model = load_model(config, trained)
        return fit_layers(
            extract(model, config, train, f"features of {name}, train", images),
            extract(model, config, validation, f"features of {name}, val", images),
            name,
        )

    labels, held_out = train.labels()[:images], validation.labels()[:images]
    return ProbeResult(
        step=checkpoint.step,
        layers=probe_network(checkpoint, "trained"),
        untrained=probe_network(None, "untrained") if untrained else [],
        pixels=fit(pixels(train, images), labels, pixels(validation, images), held_out)[0],
        train_images=len(labels),
        validation_images=len(held_out),
    )


def fit_layers(train: Features, validation: Features, name: str) -> list[LayerResult]:
    """A classifier for every layer."""
    results = []
    for layer in tqdm(range(len(train.layers)), desc=f"probes of {name}", unit=" layers", leave=False, disable=None):
        accuracy, converged = fit(train.layers[layer], train.labels, validation.layers[layer], validation.labels)
        results.append(LayerResult(layer, accuracy, converged))
    return results


def fit(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> tuple[float, bool]:
    """Accuracy on the test features of a logistic regression on the training features, and whether it converged.

    Args:
        train, test: float [images, features].
        train_labels, test_labels: int [images].
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(solver="lbfgs", max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(train.astype(np.float64), train_labels)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return float(classifier.score(test.astype(np.float64), test_labels)), converged


def table(result: ProbeResult) -> str:
    """The result as an aligned table."""
    title = "untrained" if result.untrained else ""
    lines = [f"{'layer':>7}  {'accuracy':>9}  {title:>9}   (n = {result.validation_images} images)"]
    for layer, trained in enumerate(result.layers):
        untrained = f"{result.untrained[layer].accuracy:.4f}" if result.untrained else ""
        notes = "  <- best" if trained == result.best else ""
        notes += "" if trained.converged else f"  (not converged in {MAX_ITERATIONS} iterations)"
        lines.append(f"{trained.layer:>7}  {trained.accuracy:>9.4f}  {untrained:>9}{notes}".rstrip())
    lines.append(f"{'pixels':>7}  {result.pixels:>9.4f}")
    return "\n".join(lines)
