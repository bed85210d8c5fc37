"""What inspect tells is what the dataset holds, from few reads; and the pictures show it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.check.inspection import inspect, spread
from data_prep.check.pictures import by_hue, contact_sheet, save_all, swatches, token_use
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset, write_shard
from igpt_ds.errors import UserError
from tests.igpt_ds.dataset.test_shards import ROWS, K, N, make_dataset

ROOT = Path(__file__).resolve().parents[3]
KEYS = [
    "directory",
    "source",
    "split",
    "rows",
    "views",
    "resolution",
    "sequence_length",
    "storage",
    "shards",
    "rows_per_shard",
    "bytes",
    "bytes_per_sample",
    "classes",
    "palette",
    "transform",
    "seed",
    "versions",
    "rejected",
    "rejects",
    "tokens",
]


def igpt_data(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def many_rows(path: Path, rows: int, shards: int, views: int = 1) -> np.ndarray:
    """A dataset whose i-th image of view v holds the token (i + v) % 8 nine times; returns the images' first tokens."""
    path.mkdir()
    palette = Palette(np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3))
    palette.save(path / "palette.npy")
    edges = np.arange(shards + 1) * rows // shards
    records = []
    for i in range(shards):
        for view in range(views):
            index = np.arange(edges[i], edges[i + 1])
            tokens = np.repeat((index + view) % 8, 9).reshape(-1, 9).astype(np.uint16)
            ids = [f"{j}" for j in index]
            name = f"s-{i * views + view:05d}"
            records.append(write_shard(path, name, tokens, ids, None, rows_per_block=7, view=view))
    Manifest(
        rows=rows,
        sequence_length=9,
        resolution=3,
        rows_per_block=7,
        storage="uint16",
        palette={"k": 8, "sha256": palette.sha256},
        source="webdataset",
        split="train",
        views=views,
        transform={"crop": "centre"},
        seed=0,
        classes=None,
        versions={},
        rejected=0,
        shards=records,
    ).save(path)
    return np.arange(rows) % 8


@pytest.mark.parametrize("storage", ["uint16", "packed9"])
def test_the_figures_are_those_of_the_rows(tmp_path: Path, storage: str) -> None:
    tokens = make_dataset(tmp_path / "d", views=2, storage=storage)[0]
    facts = inspect(tmp_path / "d").facts
    assert list(facts) == KEYS
    size = sum(path.stat().st_size for path in (tmp_path / "d").glob("*.tar"))
    assert (facts["rows"], facts["views"], facts["shards"], facts["storage"]) == (2 * ROWS, 2, 4, storage)
    assert facts["bytes"] == size
    assert facts["bytes_per_sample"] == pytest.approx(size / (4 * ROWS), abs=0.01)
    assert facts["rows_per_shard"] == {"smallest": ROWS, "largest": ROWS}
    assert facts["classes"] == [{"name": "x", "rows": 8}, {"name": "y", "rows": 7}, {"name": "z", "rows": 7}]
    counts = np.bincount(tokens.ravel(), minlength=K)
    share = counts[counts > 0] / tokens.size
    found = facts["tokens"]
    assert (found["rows_sampled"], found["rows"]) == (2 * ROWS, 2 * ROWS)
    assert found["entropy_nats"] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-6)
    assert found["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-6)
    assert found["most_used"] == counts.argmax()
    assert found["most_used_share"] == pytest.approx(share.max(), abs=1e-6)
    assert found["unused"] == (counts == 0).sum()


@pytest.mark.parametrize(("rows", "stretches", "length"), [(10, 3, 2), (1000, 62, 17), (301, 18, 17), (64, 64, 1)])
def test_stretches_are_spread_and_do_not_overlap(rows: int, stretches: int, length: int) -> None:
    found = spread(rows, stretches, length)
    assert len(found) == stretches
    assert found == spread(rows, stretches, length)
    for i, (first, stop) in enumerate(found):
        assert i * rows // stretches <= first < stop <= (i + 1) * rows // stretches
        assert stop - first in (length, (i + 1) * rows // stretches - i * rows // stretches)


@pytest.mark.parametrize("sample", [1, 15, 300, 999, 1000, 5000])
def test_a_sample_is_read_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    many_rows(tmp_path / "d", 1000, 5, views=2)
    read: list[tuple[int, int, int]] = []
    span = Dataset.span

    def noted(self: Dataset, shard: int, first: int, stop: int) -> np.ndarray:
        read.append((shard, first, stop))
        return span(self, shard, first, stop)

    monkeypatch.setattr(Dataset, "span", noted)
    found = inspect(tmp_path / "d", sample)
    images = [200 * (shard // 2) + row for shard, first, stop in read for row in range(first, stop)]
    assert len(set(images)) == len(images) == found.facts["tokens"]["rows_sampled"]
    assert min(sample, 1000) <= len(images) <= min(sample + 16, 1000) or sample < 16
    assert all(shard % 2 == 0 for shard, _, _ in read)  # view 0
    assert np.array_equal(found.counts, 9 * np.bincount(np.array(images) % 8, minlength=8))


def test_the_sheet_shows_the_images_spread_over_the_dataset(tmp_path: Path) -> None:
    first = many_rows(tmp_path / "d", 1000, 7)
    found = inspect(tmp_path / "d")
    sheet = np.asarray(contact_sheet(found))
    assert sheet.shape == (8 * (111 + 8) + 8, 8 * (111 + 8) + 8, 3)
    colours = found.dataset.palette.decode(np.arange(8))
    for i, (image, _) in enumerate(spread(1000, 64, 1)):
        top, left = 8 + i // 8 * 119, 8 + i % 8 * 119
        assert (sheet[top : top + 111, left : left + 111] == colours[first[image]]).all()


def test_the_sheet_keeps_pixels_in_their_places_and_names_classes(tmp_path: Path) -> None:
    tokens = make_dataset(tmp_path / "d")[0].reshape(-1, N)
    found = inspect(tmp_path / "d")
    sheet = contact_sheet(found)
    # 22 images of 4 x 4 at 28 pixels each, below each the name of its class.
    assert sheet.size == (8 * 120 + 8, 3 * 136 + 8)
    pixels = np.asarray(sheet)
    colours = found.dataset.palette.decode(tokens[9]).reshape(4, 4, 3)
    tile = pixels[8 + 136 : 8 + 136 + 112, 8 + 120 : 8 + 120 + 112]
    assert np.array_equal(tile, colours.repeat(28, 0).repeat(28, 1))
    captions = [pixels[8 + 112 : 8 + 128, 8 + 120 * i : 8 + 120 * i + 112] for i in range(4)]
    assert all((caption < 128).any() for caption in captions)
    # Classes go x, y, z, x.
    assert np.array_equal(captions[0], captions[3])
    assert not np.array_equal(captions[0], captions[1])


@pytest.mark.parametrize("k", [1, 2, 3, 16, 512, 700])
def test_every_colour_has_its_swatch(k: int) -> None:
    levels = np.random.default_rng(k).choice(1 << 24, k, replace=False)
    rgb = np.stack([levels >> 16, levels >> 8 & 255, levels & 255], axis=1)
    picture = np.asarray(swatches((rgb / 127.5 - 1).astype(np.float32)))
    cells = picture[12::24, 12::24].reshape(-1, 3)
    shown = {tuple(cell) for cell in cells.tolist()}
    assert shown - {(255, 255, 255)} == {tuple(each) for each in rgb.tolist()}
    assert (picture.reshape(-1, 24, picture.shape[1] // 24, 24, 3) == picture[::24, None, ::24, None]).all()


def test_greys_stand_apart_and_hues_go_round() -> None:
    rgb = np.array([[0, 0, 255], [200, 200, 200], [255, 0, 0], [255, 255, 0], [10, 10, 10], [0, 255, 0], [250, 0, 20]])
    greys, others = by_hue((rgb / 127.5 - 1).astype(np.float32))
    assert greys.tolist() == [4, 1]
    assert others.tolist() == [6, 2, 3, 5, 0]


def test_use_of_a_large_palette(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", k=4096, side=16)
    found = inspect(tmp_path / "d")
    token_use(found, tmp_path / "use.png")
    with Image.open(tmp_path / "use.png") as picture:
        assert picture.size == (1080, 480)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    large = np.random.default_rng(0).uniform(-1, 1, (1 << 16, 3)).astype(np.float32)
    assert max(swatches(large).size) <= 2048


def test_one_image_of_one_colour(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    palette = Palette(np.zeros((1, 3), np.float32))
    palette.save(path / "palette.npy")
    record = write_shard(path, "s", np.zeros((1, 1), np.uint16), ["a"], None, rows_per_block=256, view=0)
    shards, k = [record], {"k": 1, "sha256": palette.sha256}
    facts = {"source": "a", "split": "test", "views": 1, "transform": {}, "seed": 0, "versions": {}, "rejected": 0}
    shape = {"rows": 1, "sequence_length": 1, "resolution": 1, "rows_per_block": 256, "storage": "uint16"}
    Manifest(**facts, **shape, classes=None, palette=k, shards=shards).save(path)
    found = inspect(path)
    assert found.facts["tokens"]["entropy_nats"] == 0
    assert sorted(save_all(found, tmp_path / "new" / "folder")) == ["palette", "samples", "tokens"]


def test_rejects_are_counted_by_reason(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", rejected=3)
    assert inspect(tmp_path / "d").facts["rejects"] == {}
    rejects = tmp_path / "d" / "rejects.jsonl"
    lines = [{"id": str(i), "reason": reason, "detail": ""} for i, reason in enumerate(["a b", "truncated", "a b"])]
    rejects.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert inspect(tmp_path / "d").facts["rejects"] == {"a b": 2, "truncated": 1}
    for bad in ("{\n", "3\n", "{}\n", "\udcff"):
        rejects.write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"rejects\.jsonl: not readable"):
            inspect(tmp_path / "d")


def test_the_command(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", classes=["a class", "\x1b[31m red", "z\udcff"])
    result = igpt_data("inspect", tmp_path / "d", "--out", tmp_path / "pictures", "--images", 8)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "looked at 8 of 22 images" in result.stdout
    assert r"\x1b[31m red" in result.stdout
    assert "\x1b" not in result.stdout
    for name in ("samples", "palette", "tokens"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            picture.load()
    result = igpt_data("inspect", tmp_path / "d", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert list(facts) == [*KEYS, "pictures"]
    assert facts["pictures"] is None
    assert facts["tokens"]["rows_sampled"] == 2 * ROWS


def test_bad_input_in_one_line(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    (tmp_path / "file").write_text("")
    for arguments, complaint in [
        ((tmp_path / "none",), "half-built or not a dataset"),
        ((tmp_path / "d", "--images", 0), "--images"),
        ((tmp_path / "d", "--out", tmp_path / "file"), "cannot write"),
    ]:
        result = igpt_data("inspect", *arguments)
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert complaint in result.stderr
    help_text = igpt_data("inspect", "--help")
    assert help_text.returncode == 0
    assert "igpt-data inspect DATA/train" in help_text.stdout
