"""What turns images into vectors whose angles say how alike the images are: one module an embedder, found by name.

A module has a docstring that says what it needs, and `open_embedder(model, weights) -> Embedder`. To add an
embedder is to add a file here.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from igpt_ds.errors import UserError

Arrays = Mapping[str, np.ndarray]


class Embedder(Protocol):
    """Images to vectors. Small and picklable: it travels to the workers, where it loads what it needs at first use.

    Attributes:
        name: its module's name.
        fit_images: number of images that `fit` is to see; 0 where there is nothing to fit.
    """

    name: str
    fit_images: int

    def record(self) -> dict[str, Any]:
        """All that the vectors depend on besides the images, for JSON: the weights' sha256, not their path."""

    def fit(self, images: Iterator[Image.Image]) -> Arrays:
        """Learn from RGB images; what was learnt, for `fitted`."""

    def fitted(self, learnt: Arrays) -> "Embedder":
        """The same embedder, with what was learnt."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB image of any size -> uint8 [height, width, 3], the same size for all."""

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Prepared images uint8 [n, height, width, 3] -> float32 [n, dimension], of any length but 0."""


def names() -> list[str]:
    """The embedders that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def open_embedder(name: str, model: str | None, weights: Path | None) -> Embedder:
    """The embedder called `name`.

    Args:
        model: which network, by the name that its package gives it.
        weights: the network's weights, a local file.
    """
    if name not in names():
        raise UserError(f"--embedder {name}: no such embedder: choose from {', '.join(names())}")
    embedder: Embedder = importlib.import_module(f"{__name__}.{name}").open_embedder(model, weights)
    return embedder
