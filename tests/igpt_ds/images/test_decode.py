"""Decoding odd and hostile images: what is read, what is refused, and by what bounds."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops, PngImagePlugin, features

from igpt_ds.images.decode import MAX_PIXELS, MAX_SCANS, RejectError, decode


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG by hand, for depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG"])
def test_every_format_is_read(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = np.full((9, 7, 3), (200, 30, 90), np.uint8)
    image = decode(encode(Image.fromarray(pixels), kind, **options))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - pixels).max() <= (0 if kind != "JPEG" else 4)


def test_formats_off_the_list_are_rejected() -> None:
    for kind in ("ICO", "TGA", "PCX", "EPS"):
        with pytest.raises(RejectError, match="not an image"):
            decode(encode(Image.fromarray(noise(16, 16, 3)), kind))


ONE_STRIP = [(273, 4, 1, 1000), (277, 3, 1, 1), (278, 3, 1, 64), (279, 4, 1, 3)]


def tiff(tags: list[tuple[int, int, int, int]], rest: bytes) -> bytes:
    """A little-endian TIFF with these tags (number, type, count, value or offset), and `rest` at offset 1000."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return (b"II*\0" + struct.pack("<I", 8) + directory + b"\0\0\0\0").ljust(1000, b"\0") + rest


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_greys_palettes_and_cmyk_become_rgb(mode: str) -> None:
    source = Image.fromarray(noise(8, 8, 3)).convert(mode)
    image = decode(encode(source, "TIFF" if mode == "CMYK" else "PNG"))
    wanted = source.convert("RGB")
    if mode == "LA":  # the converted image is opaque
        wanted = source.convert("L").convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = np.asarray(decode(encode(red, "JPEG", quality=95)))[8, 8]
    assert pixel[0] > 245
    assert pixel[1:].max() < 10


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 30_000, 65_535]], np.uint16)
    wanted = np.rint(values / 257)[..., None].repeat(3, -1)
    assert np.array_equal(decode(encode(Image.fromarray(values), "PNG")), wanted)
    assert np.array_equal(decode(encode(Image.fromarray(values), "TIFF")), wanted)
    assert np.array_equal(decode(b"P5 6 1 65535\n" + values.astype(">u2").tobytes()), wanted)


@pytest.mark.parametrize("transform", [0, 2])
def test_adobe_cmyk_and_ycck_jpegs_look_right(transform: int) -> None:
    """Adobe stores 255 less each ink; with transform 2, as Y, Cb and Cr of 255 less that (libjpeg, jcolor.c)."""
    paper = Image.new("RGB", (16, 16), (200, 80, 40))
    planes = paper.split() if transform == 0 else ImageChops.invert(paper).convert("YCbCr").split()
    # Pillow stores 255 less what the CMYK image holds.
    stored = [ImageChops.invert(plane) for plane in planes]
    image = Image.merge("CMYK", [*stored, Image.new("L", paper.size, 0)])
    data = encode(image, "JPEG", quality=98, subsampling=0)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data = data[:place] + bytes([transform]) + data[place + 1 :]
    assert np.abs(np.asarray(decode(data)).astype(int) - (200, 80, 40)).max() <= 3


def test_tiff_greys_have_the_range_of_their_bits() -> None:
    values = np.array([[0, 1000, 4095, 65_535]], np.uint16)
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 251, 239, 0]
    twelve = tiff([(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (262, 3, 1, 1), *ONE_STRIP], b"\xff\xf8\0")
    assert np.asarray(decode(twelve))[0, :, 0].tolist() == [255, 128]
    signed = tiff(
        [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 16), (262, 3, 1, 1), *ONE_STRIP, (339, 3, 1, 2)], b"\1\2"
    )
    with pytest.raises(RejectError, match="unknown pixel range"):
        decode(signed)


def test_a_transparent_grey_of_sixteen_bits_lies_on_white() -> None:
    data = encode(Image.fromarray(np.array([[300, 2570]], np.uint16)), "PNG", transparency=300)
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 10]


def test_sixteen_bit_colour_is_scaled() -> None:
    values = np.array([[[0, 30_000, 65_535], [255, 256, 40_000]]], np.uint16)
    data = png(2, 1, 16, 2, b"\0" + values.astype(">u2").tobytes())
    assert np.abs(np.asarray(decode(data)) - values / 257).max() < 1


def test_pixels_without_a_known_range_are_rejected() -> None:
    with pytest.raises(RejectError, match="mode LAB"):
        decode(encode(Image.new("LAB", (4, 4)), "TIFF"))
    for array in (np.array([[-5, 100_000]], np.int32), np.array([[0.5, 2.0]], np.float32)):
        with pytest.raises(RejectError, match="unknown pixel range"):
            decode(encode(Image.fromarray(array), "TIFF"))


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    pixels = np.asarray(decode(encode(Image.fromarray(rgba), "PNG")))
    assert pixels[0, :, 0].tolist() == [255, 127, 0]


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode(encode(image, "PNG", transparency=0)))
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(kind: str, orientation: int, turns: int) -> None:
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(pixels), kind, exif=exif, **options)
    turned = np.rot90(pixels, turns)
    assert np.array_equal(np.asarray(decode(data)), turned)
    # A TIFF's orientation is part of the format.
    assert np.array_equal(np.asarray(decode(data, "ignore")), turned if kind == "TIFF" else pixels)


def test_broken_exif_does_not_lose_the_image() -> None:
    data = encode(Image.fromarray(noise(8, 8, 3)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode(data).size == (8, 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(decode(data)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_rejected(kind: str, share: float) -> None:
    assert features.check("webp")
    data = encode(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(RejectError) as caught:
        decode(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "not an image"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(RejectError) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 30_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(RejectError, match="too many pixels"):
        decode(png(side, side, 8, 2, b"\0" * 100))


def test_a_file_with_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(noise(8, 8, 3)), "PNG")
    monkeypatch.setattr("igpt_ds.images.decode.MAX_BYTES", len(data))
    decode(data)
    monkeypatch.setattr("igpt_ds.images.decode.MAX_BYTES", len(data) - 1)
    with pytest.raises(RejectError, match="too many bytes"):
        decode(data)


def many_tags(size: int) -> bytes:
    """A TIFF directory of 40,000 tags, each of which names the same `size` bytes."""
    head = [(256, 3, 1, 8), (257, 3, 1, 8)]
    return tiff(head + [(1000 + i, 1, size, 10) for i in range(40_000)], bytes(size))


def with_comments(blocks: int) -> bytes:
    data = encode(Image.new("P", (8, 8)), "GIF")
    place = data.index(b",")
    return data[:place] + b"!\xfe" + (b"\xff" + b"a" * 255) * blocks + b"\0" + data[place:]


def with_segments(count: int) -> bytes:
    data = encode(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + (b"\xff\xe1\0\x0aExif\0\0ab") * count + data[2:]


def with_scans(count: int) -> bytes:
    data = encode(Image.new("L", (8, 8)), "JPEG", progressive=True)
    place = data.rindex(b"\xff\xda")
    return data[:place] + data[place:-2] * count + data[-2:]


def in_separate_scans(count: int, kind: str) -> bytes:
    """A baseline JPEG whose first band comes again and again, with bytes about it that look like an ordinary scan."""
    image = Image.new("RGB", (8, 8))
    data = encode(image, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    decoy = b"\xff\xfe\0\x06\xff\xda\0\x0c"
    scans = b"\xff\xda\0\x08\1\1\0\0\x3f\0\x28" * count
    return data[: data.index(b"\xff\xda")] + decoy + scans + b"\xff\xd9\xff\xda\0\x0c\3" + bytes(9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (many_tags(1_000_000), "too much metadata"),
        (tiff([(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 4_200_000, 1000)], bytes(8_400_000)), "too much metadata"),
        (with_comments(20_000), "too much metadata"),
        (with_segments(20_000), "too much metadata"),
        (with_scans(MAX_SCANS + 1), "too many scans"),
        (in_separate_scans(MAX_SCANS + 1, "JPEG"), "too many scans"),
        (in_separate_scans(MAX_SCANS + 1, "MPO"), "too many scans"),
        (b"P6 2049 2048 254\n" + bytes(3 * 2049 * 2048), "too many pixels"),
        (b"P3 2049 2048 255\n" + b"0 " * (3 * 2049 * 2048), "too many pixels"),
        (
            tiff([(256, 3, 1, 16), (257, 3, 1, 16), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 1000),
                  (325, 4, 1, 100), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)], bytes(100)),
            "too many pixels",
        ),
    ],
    ids=["tags", "values", "comments", "segments", "scans", "separate", "mpo", "odd-range", "plain", "tile"],
)  # fmt: skip
def test_small_files_that_ask_for_much(data: bytes, reason: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(RejectError) as caught:
        decode(data)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert caught.value.reason == reason
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # kB


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_a_text_that_grows_when_it_is_unpacked(kind: str) -> None:
    pixels = noise(4, 4, 3)

    def with_text(size: int) -> bytes:
        info = PngImagePlugin.PngInfo()
        if kind == "zTXt":
            info.add_text("a", "b" * size, zip=True)
        elif kind == "iTXt":
            info.add_itxt("XML:com.adobe.xmp", "b" * size, zip=True)
        return encode(Image.fromarray(pixels), "PNG", pnginfo=info, icc_profile=bytes(size) if kind == "iCCP" else None)

    assert np.array_equal(decode(with_text(2_000_000)), pixels)
    with pytest.raises(RejectError) as caught:
        decode(with_text(10_000_000))
    assert caught.value.reason == "too much metadata"


@pytest.mark.parametrize("place", ["eXIf", "text"])
@pytest.mark.parametrize(("size", "turns"), [(10_000, 1), (70_000, 0)])
def test_exif_beyond_its_limit_is_passed_over(place: str, size: int, turns: int) -> None:
    """Pillow 13 reads hostile directories in bounded memory, but not in little time; earlier ones in neither."""
    exif = b"Exif\0\0" + tiff([(0x0112, 3, 1, 8)], bytes(size))
    info = PngImagePlugin.PngInfo()
    if place == "text":
        info.add_text("Raw profile type exif", "\n\n\n" + exif.hex(), zip=True)
    options = {"pnginfo": info} if place == "text" else {"exif": exif}
    pixels = noise(4, 4, 3)
    assert np.array_equal(decode(encode(Image.fromarray(pixels), "PNG", **options)), np.rot90(pixels, turns))


def test_what_is_within_the_bounds_is_read() -> None:
    assert decode(with_comments(1000)).size == (8, 8)
    assert decode(with_segments(1000)).size == (8, 8)
    assert decode(with_scans(MAX_SCANS - 10)).size == (8, 8)
    assert decode(in_separate_scans(MAX_SCANS - 2, "JPEG")).size == (8, 8)
    # A second scan would never be looked at: the first one holds all there is.
    data = encode(Image.new("RGB", (8, 8)), "JPEG")
    with pytest.raises(RejectError, match="damaged"):
        decode(data[:-2] + data[data.index(b"\xff\xda") : -2] * MAX_SCANS + data[-2:])
    profile = encode(Image.new("RGB", (8, 8)), "JPEG", icc_profile=bytes(3_000_000))
    assert decode(profile).size == (8, 8)


def test_large_images_are_converted_in_bands_without_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(noise(50, 30, 4))
    whole = np.asarray(decode(encode(rgba, "PNG")))
    monkeypatch.setattr("igpt_ds.images.decode._BAND", 100)
    assert np.array_equal(decode(encode(rgba, "PNG")), whole)
