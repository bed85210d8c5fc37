"""The palette fit: exact where it can be, as good as k-means over all pixels, and reproducible."""

import io
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from data_prep.images.rejects import Tally
from data_prep.palette import fit as fits
from data_prep.palette.count import add_colours, add_up, colour_tasks, count_colours
from data_prep.palette.fit import _histogram, _rounds, _Weighted, distortion, fit
from data_prep.sources import Source, open_source
from data_prep.workers.pool import pool
from data_prep.workers.run import Done, Here
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import Transform, evaluation
from igpt_ds.lock import Lock
from tests.helpers.places import fit_at
from tests.helpers.streams import Folders


def counts_of(*images: np.ndarray) -> np.ndarray:
    counts = np.zeros(1 << 24, np.int64)
    for image in images:
        add_colours(counts, image)
    return counts


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A real photograph, every other pixel: 68 000 pixels, 213 x 320."""
    return np.ascontiguousarray(load_sample_images().images[0][::2, ::2])


def test_counts_add_up(photo: np.ndarray) -> None:
    counts = counts_of(photo[:50], photo[50:])
    assert np.array_equal(counts, counts_of(photo))
    assert counts.sum() == photo.shape[0] * photo.shape[1]
    red, green, blue = photo[3, 4].astype(int)
    assert counts[red << 16 | green << 8 | blue] == (photo == photo[3, 4]).all(-1).sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exactly_k_colours_are_kept_exactly(seed: int) -> None:
    levels = np.unique(np.random.default_rng(seed).integers(0, 256, (40, 3)), axis=0).astype(np.uint8)
    image = np.concatenate([levels, levels[:7], levels[:3]])
    counts = counts_of(image)
    palette = fit(counts, len(levels), seed)
    assert np.array_equal(palette.decode(palette.encode(image)), image)
    # Zero but for the float32 in which palettes are stored.
    assert distortion(counts, palette).mse < 1e-14


def test_the_distortion_is_what_it_says(photo: np.ndarray) -> None:
    counts = counts_of(photo)
    palette = fit(counts, 8, seed=0)
    error = photo / 127.5 - 1.0 - palette.colours[palette.encode(photo)]
    found = distortion(counts, palette)
    assert found.mse == pytest.approx((error**2).sum(-1).mean(), rel=1e-9)
    assert found.rms_levels == pytest.approx(127.5 * np.sqrt((error**2).mean()), rel=1e-9)


@pytest.mark.parametrize(("k", "easy"), [(8, 1 << 22), (64, 1 << 22), (64, 0), (256, 0)])
def test_no_worse_than_k_means_over_all_pixels(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, k: int, easy: int
) -> None:
    monkeypatch.setattr(fits, "_EASY", easy)
    counts = counts_of(photo)
    pixels = photo.reshape(-1, 3) / 127.5 - 1.0
    reference = KMeans(k, n_init=1, random_state=0).fit(pixels)
    assert distortion(counts, fit(counts, k, seed=0)).mse < 1.01 * reference.inertia_ / len(pixels)


def test_small_sets_find_the_best_grouping() -> None:
    """17 grey levels into 16: the best palette merges the pair that costs least; all pairs are tried."""
    images = np.minimum(load_digits().images * 16, 255).astype(np.uint8)
    counts = counts_of(images[..., None].repeat(3, -1))
    levels, weights = np.unique(images, return_counts=True)
    x = levels / 127.5 - 1.0
    merged = []
    for i in range(len(x) - 1):
        mean = np.average(x[i : i + 2], weights=weights[i : i + 2])
        merged.append(3 * (weights[i : i + 2] * (x[i : i + 2] - mean) ** 2).sum() / weights.sum())
    assert distortion(counts, fit(counts, 16, seed=0)).mse == pytest.approx(min(merged), rel=1e-5)


@pytest.mark.parametrize("easy", [1 << 22, 0])
def test_the_same_bytes_again_sorted_and_whatever_the_threads(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, easy: int
) -> None:
    from threadpoolctl import threadpool_limits

    monkeypatch.setattr(fits, "_EASY", easy)
    counts = counts_of(photo)
    with threadpool_limits(2):
        palette = fit(counts, 32, seed=4)
    with threadpool_limits(1):
        assert fit(counts, 32, seed=4).sha256 == palette.sha256
    assert fit(counts, 32, seed=5).sha256 != palette.sha256
    rows = palette.colours.tolist()
    assert rows == sorted(rows)


def test_rounds_are_those_of_lloyd(photo: np.ndarray) -> None:
    """All distances, computed in the plainest way; colours that are not looked up again must belong where they did."""
    points, weights = np.unique(photo[::3, ::3].reshape(-1, 3), axis=0, return_counts=True)
    points = points.astype(np.float64)
    # Between the colours, so that none is as far from two of them.
    start = wanted = points[:: len(points) // 20][:20] + np.random.default_rng(0).uniform(0.1, 0.4, (20, 3))
    for rounds in range(1, 13):
        nearest = np.square(points[:, None] - wanted).sum(2).argmin(1)
        wanted = np.stack([np.average(points[nearest == i], axis=0, weights=weights[nearest == i]) for i in range(20)])
        pixels = _Weighted(points, weights.astype(np.float64))
        found = _rounds(pixels, start, tqdm(disable=True), rounds, gain=0.0, step=1.0)
        assert found == pytest.approx(wanted, abs=1e-9)


def test_a_centre_without_colours_gets_some(photo: np.ndarray) -> None:
    points = np.unique(photo[::3, ::3].reshape(-1, 3), axis=0).astype(np.float64)
    centres = np.concatenate([points[:4], np.full((6, 3), -900.0)])
    for rounds in (1, 20):
        found = _rounds(_Weighted(points, np.ones(len(points))), centres, tqdm(disable=True), rounds, 0.0, 1.0)
        assert len(np.unique(found, axis=0)) == 10
        assert found.min() >= 0


def test_the_rounds_are_shown(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "_EASY", 0)
    bars = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: object) -> None:
            assert options.pop("disable", True) is None  # on a terminal only
            super().__init__(**options, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(fits, "tqdm", Bar)
    fit(counts_of(photo), 32, seed=0)
    (bar,) = bars
    assert bar.n > 10
    assert re.fullmatch(r"\d+\.\d\d levels", bar.postfix)


def test_fewer_colours_than_k_names_both() -> None:
    counts = counts_of(np.array([[0, 0, 0], [1, 2, 3], [9, 9, 9]], np.uint8))
    with pytest.raises(UserError, match=r"--k 4: .* only 3 unique colours"):
        fit(counts, 4, seed=0)
    for k in (0, 70_000):
        with pytest.raises(UserError, match="1 to 65536"):
            fit(counts, k, seed=0)


def test_coarse_bins_are_not_used_where_they_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand colours in 27 bins of 6 bits: the fit must still tell them apart."""
    monkeypatch.setattr(fits, "_EASY", 0)
    grid = np.stack(np.meshgrid(*[np.arange(100, 110)] * 3), -1).astype(np.uint8)
    palette = fit(counts_of(grid), 100, seed=0)
    assert len(np.unique(palette.encode(grid))) == 100


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_bins_stand_at_their_exact_means(photo: np.ndarray, bits: int) -> None:
    packed = np.flatnonzero(counts := counts_of(photo))
    means, weights = _histogram(packed, counts[packed].astype(np.float64), bits)
    pixels, side = photo.reshape(-1, 3), 1 << (8 - bits)
    assert len(means) == len(np.unique(pixels // side, axis=0))
    assert weights.sum() == len(pixels)
    for mean, weight in zip(means[::97], weights[::97], strict=True):
        inside = (pixels // side == np.floor(mean + 1e-6) // side).all(-1)
        assert pixels[inside].mean(0) == pytest.approx(mean, abs=1e-9)
        assert inside.sum() == weight


def counted(source: Source, transform: Transform, folder: Path) -> tuple[np.ndarray, Tally]:
    """All counts of a source, by its tasks one after another."""
    tasks = colour_tasks(source, transform, folder)
    for task in tasks:
        count_colours(task)
    return add_up([task.path for task in tasks])


def test_images_are_counted_after_the_evaluation_transform(photos: Path, tmp_path: Path) -> None:
    source = open_source("image_folder", [str(photos)])
    counts, tally = counted(source, evaluation(16, crop=True), tmp_path / "a")
    assert counts.sum() == 48 * 16 * 16
    assert (tally.seen, tally.rejected) == (48, 0)
    whole, _ = counted(source, evaluation(None, crop=False), tmp_path / "b")
    assert whole.sum() == 48 * 80 * 106
    images = (np.asarray(Image.open(photos / item.id)) for item in source.items("train"))
    assert np.array_equal(whole, counts_of(*images))


def test_counts_of_tasks_add_up(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(photos / "china", tmp_path / "in" / name)
    source = open_source("image_folder", [str(tmp_path / "in" / "a")])
    one, _ = counted(source, evaluation(16, crop=True), tmp_path / "one")
    three, tally = counted(Folders(tmp_path / "in"), evaluation(16, crop=True), tmp_path / "three")
    assert np.array_equal(three, 3 * one)
    assert tally.seen == 72


def test_what_is_counted_is_not_counted_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A palette that was interrupted goes on; counts of other images or of another transform are not taken for it."""
    source, folder = Folders(photos), tmp_path / "work"
    first, _ = colour_tasks(source, evaluation(16, crop=True), folder)
    done = count_colours(first)
    assert (done.tally.seen, done.kept) == (24, 0)
    again = colour_tasks(source, evaluation(16, crop=True), folder)
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.palette.count.pixels", None)
        assert count_colours(again[0]) == Done(done.tally, 24)
        with pytest.raises(TypeError):
            count_colours(again[1])
    for other in (
        colour_tasks(source, evaluation(8, crop=True), folder),
        colour_tasks(source, evaluation(16, crop=True), folder, sample=0.5),
        colour_tasks(source, evaluation(16, crop=True), folder, options={"a": "b"}),
    ):
        assert count_colours(other[0]).kept == 0
    assert count_colours(first).kept == 0  # the others have written over it
    first.path.write_bytes(first.path.read_bytes()[:-40])
    assert count_colours(first).kept == 0


@pytest.mark.parametrize("told", [b"", b"[]", b"{}", b'{"last":' * 100_000, None])
def test_damaged_counts_are_counted_again(photos: Path, tmp_path: Path, told: bytes | None) -> None:
    (task, _) = colour_tasks(Folders(photos), evaluation(16, crop=True), tmp_path)
    count_colours(task)
    with np.load(task.path) as file:
        told = file["tally"].tobytes().replace(b": 24", b": NaN") if told is None else told
        np.savez(task.path, packed=file["packed"], times=file["times"], tally=np.frombuffer(told, np.uint8))
    with pytest.raises(UserError, match=r"counts-00000\.npz: cannot be read: delete it"):
        add_up([task.path], task.key)
    assert count_colours(task).kept == 0
    assert add_up([task.path], task.key)[1].seen == 24


def test_the_palette_depends_on_the_images_alone(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On their order, and on how they are cut into tasks, nothing depends, where the histograms are used, too."""
    monkeypatch.setattr(fits, "_EASY", 0)
    files = sorted(photos.rglob("*.jpg"))
    found = []
    for order, images in ((files, 512), (files[::-1], 7), (files[1::2] + files[::2], 1)):
        monkeypatch.setattr("data_prep.palette.count._IMAGES", images)
        folder = tmp_path / f"in{images}"
        folder.mkdir()
        for number, path in enumerate(order):
            shutil.copy(path, folder / f"{number:02d}.jpg")
        source = open_source("image_folder", [str(folder)])
        with pool(2 if images == 7 else 1) as executor:
            fitted = fit_at(Here(executor), source, evaluation(None, False), tmp_path / "p.npy", k=64)
        found.append((fitted, (tmp_path / "p.npy").read_bytes()))
    assert found[1:] == found[:1] * 2


def test_counts_of_another_run_are_not_added_up(photos: Path, tmp_path: Path) -> None:
    first, second = colour_tasks(Folders(photos), evaluation(16, crop=True), tmp_path)
    count_colours(first)
    count_colours(colour_tasks(Folders(photos), evaluation(8, crop=True), tmp_path)[1])
    with pytest.raises(UserError, match=r"counts-00001\.npz: cannot be read: delete it"):
        add_up([first.path, second.path], first.key)


def test_a_file_that_changed_is_counted_again(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(photos / "china" / "00.jpg", "0.jpg")
    source = open_source("webdataset", [str(tmp_path)])
    tasks = colour_tasks(source, evaluation(8, crop=True), tmp_path / "work")
    assert [count_colours(task).kept for task in tasks] == [0, 0]
    with tarfile.open(tmp_path / "b.tar", "a") as tar:
        tar.add(photos / "china" / "01.jpg", "1.jpg")
    assert [count_colours(task).kept for task in tasks] == [1, 0]
    assert add_up([task.path for task in tasks])[1].seen == 3


def test_listed_images_that_changed_are_counted_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.palette.count._IMAGES", 24)
    shutil.copytree(photos, tmp_path / "in")
    tasks = colour_tasks(
        open_source("image_folder", [str(tmp_path / "in")]), evaluation(8, crop=True), tmp_path / "work"
    )
    assert [count_colours(task).kept for task in tasks] == [0, 0]
    shutil.copy(photos / "china" / "01.jpg", tmp_path / "in" / "china" / "00.jpg")
    assert [count_colours(task).kept for task in tasks] == [0, 24]


def test_a_source_without_images_is_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    source, transform = Folders(tmp_path / "in"), evaluation(8, crop=True)
    with pytest.raises(UserError, match=r"p\.npy: no palette: the source has no images: mend the path"):
        fit_at(Here(), source, transform, tmp_path / "p.npy")
    (tmp_path / "in" / "a" / "0.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"all 1 images were rejected \(not an image 1\)"):
        fit_at(Here(), source, transform, tmp_path / "q.npy", max_reject_rate=1.0)


def test_a_second_palette_at_one_place_is_refused(photos: Path, tmp_path: Path) -> None:
    work = tmp_path / "p.npy.work"
    work.mkdir()
    lock = Lock.take(work)
    try:
        with pytest.raises(UserError, match=r"p\.npy\.work: in use by process \d+ on"):
            fit_at(Here(), Folders(photos), evaluation(8, crop=True), tmp_path / "p.npy")
    finally:
        lock.release()
    assert fit_at(Here(), Folders(photos), evaluation(8, crop=True), tmp_path / "p.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["p.npy"]
