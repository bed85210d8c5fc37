"""From an image file's bytes to RGB pixels, when the bytes may come from anybody.

Pillow decodes; what it leaves open is closed here. Formats are tried by name, the file and its pixels are capped,
and nothing depends on a clock, so that an image is accepted everywhere or nowhere. One decode takes at most about
1.5 GiB (a WebP of MAX_PIXELS; a photograph of 500 x 375 takes 3 MiB), and seconds rather than hours, by these limits:

- MAX_BYTES of file, MAX_PIXELS of image and of a TIFF's tile (a tile may be larger than its image);
- MAX_METADATA bytes and MAX_PARTS pieces read before the pixels: a TIFF directory can name the same bytes 65,000
  times, and a GIF comment of small blocks is joined in quadratic time. A PNG's text or profile may unpack to as much;
- MAX_EXIF bytes of EXIF, which is itself such a directory; a longer one is passed over, as a broken one is;
- MAX_SCANS of a JPEG, each of which visits every block of the image;
- MAX_SLOW_PIXELS in the forms that Pillow decodes in Python (run-length BMP, plain and odd-ranged PNM).

A colour profile (ICC) is not applied: the samples are taken for sRGB, as everyone's ImageNet is.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as Exif

from igpt_ds.images import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_METADATA = 8 << 20
MAX_PARTS = 10_000
MAX_EXIF = 1 << 16
MAX_SCANS = 100
MAX_SLOW_PIXELS = 4 << 20
PngImagePlugin.MAX_TEXT_CHUNK = MAX_METADATA  # Pillow's own limit is 1 MiB, and ends the reading of the image
_SLOW_CODECS = {"bmp_rle", "ppm", "ppm_plain"}
_BAND = 1 << 20  # pixels that are converted at a time
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 258, 262, 322, 323
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ExifOrientation = Literal["apply", "ignore"]


class RejectError(Exception):
    """An image that cannot be used: a short `reason` to count by, and a `detail` about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


class Reduced(NamedTuple):
    """A decoded image, perhaps smaller than it was stored.

    Attributes:
        image: RGB.
        size: (width, height) as stored, upright.
        scale: 1, 2, 4 or 8: pixel (x, y) of `image` covers those from (scale x, scale y) of the stored one; None
            where no reduction was wanted, or the image is no JPEG in RGB or grey.
        stored: (width, height) as stored, of a JPEG in RGB or grey; None of others.
    """

    image: Image.Image
    size: tuple[int, int]
    scale: int | None
    stored: tuple[int, int] | None


def decode(data: bytes, exif: ExifOrientation = "apply") -> Image.Image:
    """The first frame of an encoded image as 8-bit RGB, alpha laid on white.

    16-bit greys are scaled, not clipped, and 16-bit colours give their high bytes; CMYK, palettes and greys are
    converted. With `exif` "apply" the EXIF orientation is applied; a TIFF's orientation, which is no EXIF but part
    of the format, always is.

    Raises:
        RejectError: empty, too large, of no known format, truncated, damaged, or without a known pixel range.
    """
    return reduced(data, exif, lambda size: None).image


def reduced(data: bytes, exif: ExifOrientation, scale: Callable[[tuple[int, int]], int | None]) -> Reduced:
    """Decode as `decode` does, a JPEG in RGB or grey perhaps at 1/2, 1/4 or 1/8 of its size.

    libjpeg then computes fewer samples of each 8 x 8 block but reads the file as a whole, so that the same files are
    rejected as at full size.

    Args:
        scale: told the stored size (width, height) of such a JPEG, the divisor wanted: 1, 2, 4, 8 or None.

    Raises:
        RejectError: as `decode`.
    """
    if not data:
        raise RejectError("empty file")
    if len(data) > MAX_BYTES:
        raise RejectError("too many bytes", f"more than {MAX_BYTES}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image, header = _open(data)
        try:
            _refuse_slow(image, data, header)
            divisor = stored = None
            size = image.size
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                stored, divisor = size, scale(size)
                if divisor:
                    image.draft(image.mode, (size[0] // divisor, size[1] // divisor))
            image.load()
            if divisor is None:
                size = image.size  # Pillow may have turned a TIFF.
            rgb, turned = _upright(image, exif)
            return Reduced(rgb, size[::-1] if turned else size, divisor, stored)
        except (RejectError, MemoryError):
            raise
        except Exception as error:
            raise _rejected(error) from error


def upright(image: Image.Image, exif: ExifOrientation = "apply") -> Image.Image:
    """An image that Pillow has opened or made, as 8-bit RGB, by the rules of `decode`; raises as it does."""
    try:
        return _upright(image, exif)[0]
    except (RejectError, MemoryError):
        raise
    except Exception as error:
        raise _rejected(error) from error


def _upright(image: Image.Image, exif: ExifOrientation) -> tuple[Image.Image, bool]:
    """In RGB, and whether its sides were exchanged."""
    rgb = _rgb(image)
    orientation = _orientation(image) if exif == "apply" else 1
    return rgb.transpose(_UPRIGHT[orientation]) if orientation > 1 else rgb, orientation >= 5


class _Metered(io.BytesIO):
    """The file as Pillow reads it: up to the pixels, in not too many pieces."""

    left: int | None = MAX_METADATA
    parts = MAX_PARTS

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        if self.left is not None:
            self.parts -= 1
            if size is not None and size >= 0:  # WebP's decoder is handed the file as a whole
                self.left -= len(found)
            if self.left < 0 or self.parts < 0:
                raise RejectError("too much metadata", f"more than {MAX_METADATA} bytes or {MAX_PARTS} parts")
        return found


def _open(data: bytes) -> tuple[Image.Image, int]:
    """Read an image's header: the image, unloaded, and where in the file the header ended."""
    file = _Metered(data)
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RejectError("too many pixels", f"more than {MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise RejectError("not an image", f"none of {', '.join(FORMATS)}") from None
    except (RejectError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes.
        raise _rejected(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise RejectError("too many pixels", f"{image.width} x {image.height}, more than {MAX_PIXELS}")
    file.left = None
    return image, file.tell()


def _refuse_slow(image: Any, data: bytes, header: int) -> None:
    if image.format in ("JPEG", "MPO") and _scans(image, data, header) > MAX_SCANS:
        raise RejectError("too many scans", f"more than {MAX_SCANS}")
    if image.tile and image.tile[0][0] in _SLOW_CODECS and image.width * image.height > MAX_SLOW_PIXELS:
        size = f"{image.width} x {image.height}"
        raise RejectError("too many pixels", f"{size}, more than {MAX_SLOW_PIXELS} in a form that decodes slowly")
    if image.format == "TIFF":
        tile = image.tag_v2.get(_TIFF_TILE_WIDTH, 0), image.tag_v2.get(_TIFF_TILE_LENGTH, 0)
        if tile[0] * tile[1] > MAX_PIXELS:
            raise RejectError("too many pixels", f"a tile of {tile[0]} x {tile[1]}, more than {MAX_PIXELS}")


def _scans(image: Image.Image, data: bytes, header: int) -> int:
    """How many scans a JPEG may have; its header ends with that of the first one."""
    if image.format == "MPO":
        return data.count(b"\xff\xda")  # the header may end elsewhere
    bands = len(image.getbands())
    first = header - 8 - 2 * bands
    # To look through the file costs time. Where the first scan holds all bands at once, libjpeg refuses further ones.
    if data[first : first + 2] == b"\xff\xda" and data[first + 4] == bands and "progressive" not in image.info:
        return 1
    return 1 + data.count(b"\xff\xda", header)


def _rejected(error: Exception) -> RejectError:
    """Why an image is rejected that Pillow gives up on."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if "MAX_TEXT_" in line:
        return RejectError("too much metadata", f"text or a profile of more than {MAX_METADATA} bytes")
    return RejectError("truncated" if "truncated" in str(error).lower() else "damaged", line)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    lengths = len(image.info.get("exif") or b""), len(image.info.get("Raw profile type exif") or "") // 2
    if max(lengths) > MAX_EXIF:
        return 1
    try:
        value = image.getexif().get(Exif.Orientation)
        return value if value in _UPRIGHT else 1
    except MemoryError:
        raise
    except Exception:  # Broken EXIF, which ImageNet has, says nothing about the pixels.
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("F", "LAB"):
        raise RejectError("unknown pixel range", f"mode {image.mode}")
    if not image.mode.startswith("I") and not image.has_transparency_data:
        return image.convert("RGB")
    # In bands, for both ways need several copies.
    to_rgb = _grey if image.mode.startswith("I") else _on_white
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(to_rgb(band, image), (0, top))
    return rgb


def _on_white(band: Image.Image, _: Image.Image) -> Image.Image:
    band = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", band.size, (255, 255, 255, 255)), band).convert("RGB")


def _grey(band: Image.Image, whole: Any) -> Image.Image:
    """A band of 16-bit greys (modes I;16, I;16B, I) in 8 bits, by the range that the format gives them."""
    values, top = np.asarray(band), 65535
    if whole.format == "TIFF":
        if whole.mode == "I":
            raise RejectError("unknown pixel range", "signed or 32-bit integers")
        top = (1 << whole.tag_v2[_TIFF_BITS][0]) - 1
        if whole.tag_v2[_TIFF_PHOTOMETRIC] == 0:  # white is zero
            values = top - values
    if values.min() < 0 or values.max() > top:
        raise RejectError("unknown pixel range", f"integers beyond {top}")
    grey = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    if isinstance(clear := whole.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
