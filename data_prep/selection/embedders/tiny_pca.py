"""tiny_pca: images of 16 x 16 pixels and their 64 principal components. For tests and rough use.

It needs no weights and no further package, and it knows layout and colour, not what is shown: two photographs of
one dog lie far apart. Use `timm` or `open_clip` for a selection that is to be trained on. The components are fitted
to images that the pool is to be like.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.selection.embedders import Arrays
from igpt_ds.errors import UserError

_SIDE = 16
_COMPONENTS = 64


@dataclass(frozen=True, eq=False)
class TinyPca:
    """See `data_prep.selection.embedders.Embedder`. Once fitted: `mean` [768] and `components` [768, 64], float32."""

    mean: np.ndarray | None = None
    components: np.ndarray | None = None
    name: str = "tiny_pca"
    fit_images: int = 4096

    def record(self) -> dict[str, Any]:
        """Its sizes; the components follow from the images."""
        return {"name": self.name, "side": _SIDE, "components": _COMPONENTS, "fit_images": self.fit_images}

    def fit(self, images: Iterator[Image.Image]) -> Arrays:
        """Mean and leading principal components."""
        rows = [self.prepare(image).reshape(-1) for image in images]
        if not rows:
            raise UserError("--like: not one image can be read: look at its files")
        pixels = np.stack(rows).astype(np.float64) / 255
        mean = pixels.mean(0)
        _, vectors = np.linalg.eigh((pixels - mean).T @ (pixels - mean))
        components = vectors[:, : -_COMPONENTS - 1 : -1]
        # A principal component has no sign of its own; libraries differ in which they return.
        signs = np.sign(components[np.abs(components).argmax(0), np.arange(_COMPONENTS)])
        return {"mean": mean.astype(np.float32), "components": (components * signs).astype(np.float32)}

    def fitted(self, learnt: Arrays) -> "TinyPca":
        """With mean and components."""
        return replace(self, mean=learnt["mean"], components=learnt["components"])

    def prepare(self, image: Image.Image) -> np.ndarray:
        """uint8 [16, 16, 3], the mean colour of each area."""
        return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX))

    def embed(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 64]."""
        if self.mean is None or self.components is None:
            raise RuntimeError("tiny_pca is used before it is fitted")
        vectors: np.ndarray = (images.reshape(len(images), -1).astype(np.float32) / 255 - self.mean) @ self.components
        # An image that equals the mean has no direction: any one will do, as long as it has one.
        vectors[(vectors == 0).all(1), 0] = 1
        return vectors


def open_embedder(model: str | None, weights: Path | None) -> TinyPca:
    """The embedder, still to be fitted."""
    if model is not None or weights is not None:
        raise UserError("--embedder tiny_pca: takes neither --model nor --weights: leave them out")
    return TinyPca()
