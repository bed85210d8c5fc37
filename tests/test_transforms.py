"""Decoding hostile and odd images, and the paper's two crops."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data_prep.transforms import MAX_PIXELS, RejectError, Transform, _resized, decode, evaluation


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


def test_sixteen_bit_colour_is_scaled() -> None:
    values = np.array([[[0, 30_000, 65_535], [255, 256, 40_000]]], np.uint16)
    data = png(2, 1, 16, 2, b"\0" + values.astype(">u2").tobytes())
    assert np.abs(np.asarray(decode(data)) - values / 257).max() < 1


def test_pixels_without_a_known_range_are_rejected() -> None:
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


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation: int, turns: int) -> None:
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(Image.fromarray(pixels), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(pixels, turns))


def test_broken_exif_does_not_lose_the_image() -> None:
    data = encode(Image.fromarray(noise(8, 8, 3)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode(data).size == (8, 8)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


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
    monkeypatch.setattr("data_prep.transforms.MAX_BYTES", len(data))
    decode(data)
    monkeypatch.setattr("data_prep.transforms.MAX_BYTES", len(data) - 1)
    with pytest.raises(RejectError, match="too many bytes"):
        decode(data)


def test_training_views_depend_on_seed_id_and_view_alone() -> None:
    image = Image.fromarray(noise(300, 400, 3))
    keys = [(seed, image_id, view) for seed in (0, 1) for image_id in ("a", "b") for view in (0, 1)]
    first = {key: Transform("random", 16, key[0])(image, key[1], key[2]).tobytes() for key in keys}
    again = {key: Transform("random", 16, key[0])(image, key[1], key[2]).tobytes() for key in reversed(keys)}
    assert first == again
    assert len(set(first.values())) == len(keys)


def test_the_random_crop_is_stable_for_ever() -> None:
    """Shards of different releases must agree; these figures were computed once from the definition."""
    crop = Transform("random", 32, seed=1)._random_crop
    assert [crop((500, 375), "n01440764/n01440764_18.JPEG", view) for view in (0, 1)] == [
        (321, 204, 40),
        (315, 23, 60),
    ]


def test_random_lengths_and_crops_span_their_ranges() -> None:
    transform = Transform("random", 32, seed=3)
    draws = [transform._random_crop((500, 375), f"{i}.jpg", 0) for i in range(20_000)]
    lengths = np.array([draw[0] for draw in draws])
    assert (lengths.min(), lengths.max()) == (256, 384)
    assert len(set(lengths.tolist())) == 129
    assert lengths.mean() == pytest.approx(320, abs=1.5)
    for shorter, left, top in draws:
        width, height = _resized((500, 375), shorter)
        assert height == shorter
        assert 0 <= left <= width - 224
        assert 0 <= top <= height - 224
    at_least = [draw for draw in draws if draw[0] == 256]
    tops = {draw[2] for draw in at_least}
    assert (min(tops), max(tops)) == (0, 32)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (100, 90), (1000, 1000)])
def test_the_crop_equals_resizing_all_and_cutting(size: tuple[int, int]) -> None:
    pixels = noise(size[1] // 5 + 1, size[0] // 5 + 1, 3)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    shorter, left, top = Transform("random", 32, 0)._random_crop(size, "x", 0)
    whole = image.resize(_resized(size, shorter), Image.Resampling.BICUBIC)
    cut = whole.crop((left, top, left + 224, top + 224))
    mine = Transform("random", 32, 0)._crop(image, shorter, left, top)
    assert np.abs(np.asarray(cut).astype(int) - np.asarray(mine)).max() <= 1


def test_evaluation_is_the_centre_crop() -> None:
    image = Image.fromarray(noise(375, 500, 3))
    whole = image.resize((299, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
    wanted = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC))
    mine = evaluation(32, crop=True)(image, "any", 0)
    assert mine.shape == (32, 32, 3)
    assert np.abs(mine.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (1, 1)])
@pytest.mark.parametrize("crop", ["random", "centre"])
def test_very_long_images_need_no_memory(size: tuple[int, int], crop: str) -> None:
    assert Transform(crop, 32, 0)(Image.new("RGB", size), "x", 0).shape == (32, 32, 3)


def test_without_the_crop_step() -> None:
    pixels = noise(8, 8, 3)
    whole = evaluation(8, crop=False)
    assert np.array_equal(whole(Image.fromarray(pixels), "x", 0), pixels)
    assert evaluation(4, crop=False)(Image.fromarray(pixels), "x", 0).shape == (4, 4, 3)
    assert evaluation(None, crop=False)(Image.fromarray(noise(3, 5, 3)), "x", 0).shape == (3, 5, 3)
    with pytest.raises(RejectError, match=r"not square .*8 x 6"):
        whole(Image.fromarray(noise(6, 8, 3)), "x", 0)


def test_mutated_files_are_decoded_or_rejected() -> None:
    rng = np.random.default_rng(11)
    originals = [encode(Image.fromarray(noise(24, 24, 3)), k) for k in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")]
    for i in range(300):
        data = bytearray(originals[i % 5])
        for position in rng.integers(0, len(data), 1 + i % 9):
            data[position] = rng.integers(0, 256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except RejectError as reject:
            assert reject.reason
