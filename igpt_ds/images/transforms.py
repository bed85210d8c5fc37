"""From decoded pixels to a small square of them: crop and resize, as the paper does.

Training view: the shorter side is resized to a random length in [256, 384], then a random 224 x 224 crop is
taken; evaluation: shorter side 224, centre crop (Chen et al. 2020, section 3.1). Both then go down to the
input resolution. The paper names no filter; both steps use Pillow's bicubic one, which is antialiased.

The decoder "fast" takes the same cut of the same image, but has JPEGs decoded at a half, quarter or eighth of their
size where the cut stays OVERSAMPLING times finer than the result, and goes there in one step instead of two: about
twice as fast, at pixels that differ by less than a level on the average (benchmarks/results/data_prep.md). Other
files, and images that are hardly larger than the result, are treated as by the decoder "pillow".

A view's randomness depends on (seed, image id, view) alone, through SHA-256: never on worker, order or
library version. Whether an image is rejected does not depend on the view or the decoder, so all views hold the same
images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from igpt_ds.images.decode import ExifOrientation, Reduced, RejectError, decode, reduced

__all__ = ["CROP", "RejectError", "Transform", "decode", "evaluation"]

CROP = 224
SHORTER_SIDE = (256, 384)
OVERSAMPLING = 1.5
FILTERS = {"bicubic": Image.Resampling.BICUBIC}

Decoder = Literal["pillow", "fast"]


@dataclass(frozen=True)
class Transform:
    """What is done to an image; its fields go into the manifest.

    Attributes:
        crop: "random" (training), "centre" (evaluation) or "none" (the whole image, which must be square).
        resolution: the side of the result, pixels; None with crop "none" leaves the image's own size.
        seed: of the random crops.
        filter: the resizing filter of all steps.
        exif: whether the EXIF orientation is applied.
        decoder: "pillow", which is exact, or "fast".
    """

    crop: Literal["random", "centre", "none"]
    resolution: int | None
    seed: int
    filter: str = "bicubic"
    exif: ExifOrientation = "apply"
    decoder: Decoder = "pillow"

    def record(self) -> dict[str, object]:
        """For the manifest: every figure that the pixels depend on."""
        record: dict[str, object] = {**asdict(self), "alpha": "on white"}
        if self.crop != "none":
            record["crop_size"] = CROP
            record["shorter_side"] = list(SHORTER_SIDE) if self.crop == "random" else CROP
        if self.crop != "random":
            del record["seed"]
        if self.decoder == "fast":
            record["oversampling"] = OVERSAMPLING
        return record

    def pixels(self, data: bytes, image_id: str, view: int) -> np.ndarray:
        """An image file's pixels: uint8 [resolution, resolution, 3].

        Raises:
            RejectError: it cannot be decoded; or crop is "none" and it is not square.
        """
        return self.views(data, image_id, [view])[0]

    def views(self, data: bytes, image_id: str, views: Sequence[int]) -> list[np.ndarray]:
        """An image file's pixels in some views, each as `pixels` gives it; the file is decoded once.

        Once a scale, to be exact: of a JPEG that is reduced, some cuts may be too small for the reduction of others.
        """
        made: dict[int, np.ndarray] = {}
        while left := [view for view in views if view not in made]:
            found = reduced(data, self.exif, partial(self._scale, image_id=image_id, view=left[0]))
            for view in left:
                scale = self._scale(found.stored, image_id, view) if found.stored else None
                if scale == found.scale and scale:
                    made[view] = self._in_one_step(found, scale, image_id, view)
                elif scale == found.scale:
                    made[view] = self(found.image, image_id, view)
        return [made[view] for view in views]

    def __call__(self, image: Image.Image, image_id: str, view: int) -> np.ndarray:
        """A decoded image's pixels: RGB -> uint8 [resolution, resolution, 3].

        Raises:
            RejectError: crop is "none" and the image is not square.
        """
        if self.crop != "none":
            image = image.resize((CROP, CROP), FILTERS[self.filter], box=self._cut(image.size, image_id, view))
        if self.resolution is not None and image.size != (self.resolution, self.resolution):
            if image.width != image.height:
                raise RejectError("not square", f"{image.width} x {image.height} without the crop step")
            image = image.resize((self.resolution, self.resolution), FILTERS[self.filter])
        return np.asarray(image)

    def _scale(self, size: tuple[int, int], image_id: str, view: int) -> int | None:
        """By how much a JPEG may be reduced when it is decoded; None: use the two steps."""
        if self.decoder == "pillow" or self.resolution is None or (self.crop == "none" and size[0] != size[1]):
            return None
        left, top, right, bottom = self._cut(size, image_id, view)
        finer = min(right - left, bottom - top) / (OVERSAMPLING * self.resolution)
        return next((scale for scale in (8, 4, 2, 1) if scale <= finer), None)

    def _in_one_step(self, found: Reduced, scale: int, image_id: str, view: int) -> np.ndarray:
        side = self.resolution or CROP
        cut = self._cut(found.size, image_id, view)
        box = cut[0] / scale, cut[1] / scale, cut[2] / scale, cut[3] / scale
        return np.asarray(found.image.resize((side, side), FILTERS[self.filter], box=box))

    def _cut(self, size: tuple[int, int], image_id: str, view: int) -> tuple[float, float, float, float]:
        """What is taken of an image of `size`, in its own pixels: (left, top, right, bottom).

        The paper resizes the whole and cuts then; only the cut is ever computed here, for the whole of a very long
        image would not fit into memory.
        """
        if self.crop == "none":
            return 0, 0, *size
        crop = self._random_crop(size, image_id, view) if self.crop == "random" else _centre_crop(size)
        shorter, left, top = crop
        width, height = _resized(size, shorter)
        x, y = size[0] / width, size[1] / height
        return left * x, top * y, min((left + CROP) * x, size[0]), min((top + CROP) * y, size[1])

    def _random_crop(self, size: tuple[int, int], image_id: str, view: int) -> tuple[int, int, int]:
        key = f"crop\0{self.seed}\0{view}\0{image_id}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(key).digest()
        length, left, top = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
        low, high = SHORTER_SIDE
        shorter = low + length % (high - low + 1)
        width, height = _resized(size, shorter)
        return shorter, left % (width - CROP + 1), top % (height - CROP + 1)


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return shorter, max(shorter, round(height * shorter / width))
    return max(shorter, round(width * shorter / height)), shorter


def _centre_crop(size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = _resized(size, CROP)
    return CROP, (width - CROP) // 2, (height - CROP) // 2


def evaluation(
    resolution: int | None, crop: bool, exif: ExifOrientation = "apply", decoder: Decoder = "pillow"
) -> Transform:
    """The transform of palettes and of held-out images."""
    return Transform("centre" if crop else "none", resolution, seed=0, exif=exif, decoder=decoder)
