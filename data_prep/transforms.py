"""From an image file's bytes to a small square of pixels: decode safely, crop, resize.

Training view: the shorter side is resized to a random length in [256, 384], then a random 224 x 224 crop is
taken; evaluation: shorter side 224, centre crop (Chen et al. 2020, section 3.1). Both then go down to the
input resolution. The paper names no filter; both steps use Pillow's bicubic one, which is antialiased.

A view's randomness depends on (seed, image id, view) alone, through SHA-256: never on worker, order or
library version. Whether an image is rejected does not depend on the view, so all views hold the same images.
"""

import contextlib
import hashlib
import io
import warnings
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.sources import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
CROP = 224
SHORTER_SIDE = (256, 384)
FILTERS = {"bicubic": Image.Resampling.BICUBIC}


class RejectError(Exception):
    """An image that cannot be used: a short `reason` to count by, and a `detail` about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image as upright 8-bit RGB, alpha laid on white.

    16-bit greys are scaled, not clipped; CMYK, palettes and greys are converted; the EXIF orientation is
    applied.

    Raises:
        RejectError: empty, too large, of no known format, truncated, damaged, or without a known pixel range.
    """
    if not data:
        raise RejectError("empty file")
    if len(data) > MAX_BYTES:
        raise RejectError("too many bytes", f"more than {MAX_BYTES}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise RejectError("too many pixels", f"more than {MAX_PIXELS}") from None
        except UnidentifiedImageError:
            raise RejectError("not an image", f"none of {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow's parsers raise anything on hostile bytes.
            raise RejectError("damaged", _first_line(error)) from error
        if image.width * image.height > MAX_PIXELS:
            raise RejectError("too many pixels", f"{image.width} x {image.height}, more than {MAX_PIXELS}")
        try:
            image.load()
            _turn_upright(image)
            return _rgb(image)
        except (RejectError, MemoryError):
            raise
        except Exception as error:
            reason = "truncated" if "truncated" in str(error).lower() else "damaged"
            raise RejectError(reason, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _turn_upright(image: Image.Image) -> None:
    # Broken EXIF, which ImageNet has, says nothing about the pixels.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise RejectError("unknown pixel range", "32-bit integers")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise RejectError("unknown pixel range", "floating point")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Transform:
    """What is done to a decoded image; its fields go into the manifest.

    Attributes:
        crop: "random" (training), "centre" (evaluation) or "none" (the whole image, which must be square).
        resolution: the side of the result, pixels; None with crop "none" leaves the image's own size.
        seed: of the random crops.
        filter: the resizing filter of both steps.
    """

    crop: Literal["random", "centre", "none"]
    resolution: int | None
    seed: int
    filter: str = "bicubic"

    def record(self) -> dict[str, object]:
        """For the manifest: every figure that the pixels depend on."""
        record: dict[str, object] = {**asdict(self), "exif_orientation": "applied", "alpha": "on white"}
        if self.crop != "none":
            record["crop_size"] = CROP
            record["shorter_side"] = list(SHORTER_SIDE) if self.crop == "random" else CROP
        if self.crop != "random":
            del record["seed"]
        return record

    def __call__(self, image: Image.Image, image_id: str, view: int) -> np.ndarray:
        """The image's pixels: RGB -> uint8 [resolution, resolution, 3].

        Raises:
            RejectError: crop is "none" and the image is not square.
        """
        if self.crop == "random":
            image = self._crop(image, *self._random_crop(image.size, image_id, view))
        elif self.crop == "centre":
            image = self._crop(image, *_centre_crop(image.size))
        if self.resolution is not None and image.size != (self.resolution, self.resolution):
            if image.width != image.height:
                raise RejectError("not square", f"{image.width} x {image.height} without the crop step")
            image = image.resize((self.resolution, self.resolution), FILTERS[self.filter])
        return np.asarray(image)

    def _random_crop(self, size: tuple[int, int], image_id: str, view: int) -> tuple[int, int, int]:
        key = f"crop\0{self.seed}\0{view}\0{image_id}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(key).digest()
        length, left, top = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
        low, high = SHORTER_SIDE
        shorter = low + length % (high - low + 1)
        width, height = _resized(size, shorter)
        return shorter, left % (width - CROP + 1), top % (height - CROP + 1)

    def _crop(self, image: Image.Image, shorter: int, left: int, top: int) -> Image.Image:
        """Resize the shorter side to `shorter` and cut out CROP x CROP at (left, top), in one step.

        Only the cut is ever computed: the whole of a very long image would not fit into memory.
        """
        width, height = _resized(image.size, shorter)
        x, y = image.width / width, image.height / height
        box = (
            left * x,
            top * y,
            min((left + CROP) * x, image.width),
            min((top + CROP) * y, image.height),
        )
        return image.resize((CROP, CROP), FILTERS[self.filter], box=box)


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return shorter, max(shorter, round(height * shorter / width))
    return max(shorter, round(width * shorter / height)), shorter


def _centre_crop(size: tuple[int, int]) -> tuple[int, int, int]:
    width, height = _resized(size, CROP)
    return CROP, (width - CROP) // 2, (height - CROP) // 2


def evaluation(resolution: int | None, crop: bool) -> Transform:
    """The transform of palettes and of held-out images."""
    return Transform("centre" if crop else "none", resolution, seed=0)
