"""The paper's two crops, and the fast decoder held against the exact one."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from igpt_ds.images import transforms
from igpt_ds.images.decode import reduced
from igpt_ds.images.transforms import RejectError, Transform, _resized, decode, evaluation
from tests.igpt_ds.images.test_decode import encode, noise


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
    transform = Transform("random", 224, 0)
    shorter, left, top = transform._random_crop(size, "x", 0)
    whole = image.resize(_resized(size, shorter), Image.Resampling.BICUBIC)
    cut = whole.crop((left, top, left + 224, top + 224))
    assert np.abs(np.asarray(cut).astype(int) - transform(image, "x", 0)).max() <= 1


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


def test_a_file_s_pixels_are_those_of_its_image() -> None:
    data = encode(Image.fromarray(noise(40, 60, 3)), "PNG")
    transform = Transform("random", 16, 3)
    assert np.array_equal(transform.pixels(data, "a", 2), transform(decode(data), "a", 2))
    with pytest.raises(RejectError, match="empty file"):
        transform.pixels(b"", "a", 0)


def test_the_record_tells_all_that_pixels_depend_on() -> None:
    exact = evaluation(32, True).record()
    assert (exact["exif"], exact["decoder"], exact["crop_size"]) == ("apply", "pillow", 224)
    fast = evaluation(32, True, exif="ignore", decoder="fast").record()
    assert (fast["exif"], fast["decoder"], fast["oversampling"]) == ("ignore", "fast", 1.5)


PHOTO = load_sample_images().images[0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(500, 375), (333, 500), (641, 427)])
@pytest.mark.parametrize(("crop", "resolution"), [("random", 64), ("random", 32), ("centre", 48)])
def test_fast_pixels_are_nearly_the_exact_ones(mode: str, size: tuple[int, int], crop: str, resolution: int) -> None:
    image = Image.fromarray(PHOTO).resize(size, Image.Resampling.BICUBIC).convert(mode)
    data = encode(image, "JPEG", quality=92)
    exact, fast = (Transform(crop, resolution, 1, decoder=d).pixels(data, "x", 0) for d in ("pillow", "fast"))
    assert fast.shape == exact.shape
    difference = fast.astype(int) - exact
    assert 0 < np.abs(difference).mean() < 2.5
    # Nothing is shifted: moved by a pixel either way, the pictures fit less well.
    for axis in (0, 1):
        for shift in (1, -1):
            assert np.abs(np.roll(fast, shift, axis).astype(int) - exact).mean() > 2 * np.abs(difference).mean()


def test_a_reduced_image_lies_where_the_whole_one_does() -> None:
    """On a ramp of one level a pixel, the mean difference is the shift in stored pixels."""
    ramp = np.tile(np.arange(256), (256, 1)).astype(np.uint8)
    image = Image.merge("RGB", [Image.fromarray(ramp), Image.fromarray(ramp.T.copy()), Image.new("L", (256, 256), 9)])
    data = encode(image, "JPEG", quality=100, subsampling=0)
    for resolution, scale in ((16, 8), (32, 4), (64, 2), (128, 1)):
        exact, fast = (evaluation(resolution, False, decoder=d).pixels(data, "", 0) for d in ("pillow", "fast"))
        assert evaluation(resolution, False, decoder="fast")._scale((256, 256), "", 0) == scale
        across_and_down = (fast.astype(int) - exact)[2:-2, 2:-2, :2]
        assert abs(across_and_down.mean()) < 0.25


@pytest.mark.parametrize(
    ("size", "scales"), [((500, 375), {2, 4}), ((160, 130), {None, 1}), ((70, 90), {None}), ((960, 720), {4, 8})]
)
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_views_of_one_decoding_are_those_of_one_each(
    size: tuple[int, int], scales: set[int | None], decoder: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = encode(Image.fromarray(PHOTO).resize(size, Image.Resampling.BICUBIC), "JPEG", exif=tag)
    transform = Transform("random", 48 if size[0] > 200 else 64, 3, decoder=decoder)
    views = [9, *range(7)]
    wanted = [transform.pixels(data, "x", view) for view in views]
    if decoder == "pillow":
        assert all(np.array_equal(transform(decode(data), "x", v), w) for v, w in zip(views, wanted, strict=True))
    decoded = []
    monkeypatch.setattr(transforms, "reduced", lambda *rest: decoded.append(found := reduced(*rest)) or found)
    assert np.array_equal(transform.views(data, "x", views), wanted)
    assert sorted(map(str, (each.scale for each in decoded))) == sorted(
        map(str, {None} if decoder == "pillow" else scales)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_fast_pixels_stand_upright(orientation: int, exif: str) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    image = Image.fromarray(PHOTO).resize((480, 360))
    data = encode(image, "JPEG", exif=tag)
    upright = decode(encode(image, "JPEG"))
    if exif == "apply":
        turns = {2: ["flip"], 3: [2], 4: [2, "flip"], 5: [3, "flip"], 6: [3], 7: [1, "flip"], 8: [1]}
        pixels = np.asarray(upright)
        for turn in turns.get(orientation, []):
            pixels = pixels[:, ::-1] if turn == "flip" else np.rot90(pixels, turn)
        upright = Image.fromarray(np.ascontiguousarray(pixels))
    wanted = Transform("random", 32, 5)(upright, "name", 1).astype(int)
    for decoder, bound in (("pillow", 0), ("fast", 2)):
        mine = Transform("random", 32, 5, exif=exif, decoder=decoder).pixels(data, "name", 1)
        assert np.abs(mine - wanted).mean() <= bound


@pytest.mark.parametrize(
    ("kind", "mode", "size"),
    [("PNG", "RGB", 500), ("JPEG", "CMYK", 500), ("MPO", "RGB", 500), ("WEBP", "RGB", 500), ("JPEG", "RGB", 90)],
)
def test_fast_is_exact_where_it_has_no_faster_way(kind: str, mode: str, size: int) -> None:
    image = Image.fromarray(PHOTO).resize((size, size)).convert(mode)
    data = encode(image, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    exact, fast = (Transform("random", 64, 1, decoder=d).pixels(data, "x", 0) for d in ("pillow", "fast"))
    assert np.array_equal(exact, fast)


def test_fast_without_the_crop_step() -> None:
    image = Image.fromarray(PHOTO)
    for data in (encode(image.resize((32, 32)), "JPEG"), encode(image.resize((40, 32)), "JPEG")):
        exact = evaluation(None, False).pixels(data, "", 0)
        assert np.array_equal(evaluation(None, False, decoder="fast").pixels(data, "", 0), exact)
    with pytest.raises(RejectError, match="not square"):
        evaluation(8, False, decoder="fast").pixels(data, "", 0)
    large = encode(image.resize((256, 256)), "JPEG")
    exact, fast = (evaluation(32, False, decoder=d).pixels(large, "", 0).astype(int) for d in ("pillow", "fast"))
    assert np.abs(exact - fast).mean() < 2
