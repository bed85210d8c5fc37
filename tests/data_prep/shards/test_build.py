"""Building shards: what is in them, that bytes depend on the plan alone, and that killed builds continue."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.check.verify import verify
from data_prep.shards.job import begin
from data_prep.shards.plan import Settings, unit_hash
from data_prep.sources import open_source
from igpt_ds.dataset.blocks import blocks
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import Transform, evaluation
from tests.helpers.places import Meter, build_here


def settings(**changed: object) -> Settings:
    fields = {"resolution": 8, "holdout": 0.25, "views": 1, "crop": True, "seed": 0, "rows_per_shard": 7}
    return Settings(**{**fields, **changed})


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32))


def make(photos: Path, out: Path, palette: Palette, chosen: Settings, **options: object) -> list:
    return build_here(begin(open_source("image_folder", [str(photos)]), out, palette, chosen, **options))


def digest(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_image_is_there_once_with_its_label_and_pixels(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings(views=2))
    seen = []
    for split, views in (("train", 2), ("val", 1)):
        verify(tmp_path / "d" / split)
        dataset = Dataset.open(tmp_path / "d" / split)
        ids = [i.decode() for i in dataset.ids()]
        seen += ids
        assert dataset.manifest.classes == ["china", "flower"]
        assert dataset.labels().tolist() == [int(i.startswith("flower")) for i in ids]
        transform = Transform("random", 8, 0) if split == "train" else evaluation(8, crop=True)
        for view in range(views):
            shards = [n for n, shard in enumerate(dataset.manifest.shards) if shard.view == view]
            tokens = np.concatenate([dataset.tokens(n) for n in shards])
            for image_id, row in list(zip(ids, tokens, strict=True))[::5]:
                image = Image.open(photos / image_id)
                wanted = palette.encode(transform(image, image_id, view)).reshape(-1)
                assert np.array_equal(row, wanted)
    assert sorted(seen) == sorted(str(p.relative_to(photos)) for p in photos.rglob("*.jpg"))


def test_the_manifest_says_what_the_palette_lost(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings(views=2, holdout=0))
    dataset = Dataset.open(tmp_path / "d" / "train")
    transform, squares = Transform("random", 8, 0), []
    for number, shard in enumerate(dataset.manifest.shards):
        ids = np.concatenate([block["ids"] for block in blocks(dataset.path / f"{shard.name}.tar", ("ids",))])
        for name, tokens in zip(ids.tolist(), dataset.tokens(number), strict=True):
            pixels = transform(Image.open(photos / name.decode()), name.decode(), shard.view).reshape(-1, 3)
            squares.append((pixels / 127.5 - 1 - palette.colours[tokens].astype(np.float64)) ** 2)
    assert dataset.manifest.palette["distortion"] == pytest.approx(np.sum(squares, axis=2).mean(), rel=1e-5)


def test_the_held_out_share_is_chosen_by_the_id_alone(photos: Path, tmp_path: Path, palette: Palette) -> None:
    splits = []
    for name, chosen in (("a", settings()), ("b", settings(seed=9, rows_per_shard=30))):
        make(photos, tmp_path / name, palette, chosen)
        splits.append(set(Dataset.open(tmp_path / name / "val").ids().tolist()))
    assert splits[0] == splits[1]
    assert {i for i in splits[0] if unit_hash("holdout", i.decode()) >= 0.25} == set()
    shares = [unit_hash("holdout", f"class/{i}.png") < 0.04 for i in range(50_000)]
    assert np.mean(shares) == pytest.approx(0.04, abs=0.003)


def test_shards_mix_the_classes(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings(holdout=0, rows_per_shard=12))
    labels = Dataset.open(tmp_path / "d" / "train").labels().reshape(4, 12)
    assert ((labels.mean(1) > 0.1) & (labels.mean(1) < 0.9)).all()
    assert not (tmp_path / "d" / "val").exists()


def test_the_same_plan_gives_the_same_bytes(photos: Path, tmp_path: Path, palette: Palette) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(photos, copy)
    make(photos, tmp_path / "a", palette, settings(views=2))
    make(copy, tmp_path / "b", palette, settings(views=2))
    make(photos, tmp_path / "c", palette, settings(views=2, seed=1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_small_images_pass_unchanged(tmp_path: Path, palette: Palette) -> None:
    rng = np.random.default_rng(1)
    levels = palette.decode(np.arange(32))
    tokens = rng.integers(0, 32, (20, 8, 8))
    for i, grid in enumerate(tokens):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(levels[grid]).save(tmp_path / "images" / f"{i:02d}.png")
    (done,) = make(tmp_path / "images", tmp_path / "d", palette, settings(crop=False, holdout=0))
    dataset = Dataset.open(done[0])
    assert dataset.manifest.classes is None
    rows = np.concatenate([dataset.tokens(n) for n in range(len(dataset.manifest.shards))])
    for image_id, row in zip(dataset.ids(), rows, strict=True):
        wanted = palette.encode(levels[tokens[int(image_id[:2])]])
        assert np.array_equal(row.reshape(8, 8), wanted)


def test_a_finished_dataset_is_left_alone(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    built = make(photos, tmp_path / "d", palette, settings())
    assert [manifest for _, manifest in built] == [None, None]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before


def test_another_plan_is_refused_and_forced(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings())
    before = digest(tmp_path / "d")
    with pytest.raises(UserError, match=r"holds another dataset \(.*seed was 0 and is 3.*--force"):
        make(photos, tmp_path / "d", palette, settings(seed=3))
    with pytest.raises(UserError, match="palette_sha256 was"):
        make(photos, tmp_path / "d", Palette(palette.colours[:5]), settings())
    with pytest.raises(UserError, match=r"holdout was 0\.25 and is 0"):
        make(photos, tmp_path / "d", palette, settings(holdout=0))
    assert digest(tmp_path / "d") == before
    make(photos, tmp_path / "d", palette, settings(seed=3, holdout=0, rows_per_shard=30), force=True)
    assert not (tmp_path / "d" / "val" / "manifest.json").exists()
    assert len(list((tmp_path / "d" / "train").glob("*.tar"))) == 2
    verify(tmp_path / "d" / "train")


def test_foreign_files_are_not_cleared_away(photos: Path, tmp_path: Path, palette: Palette) -> None:
    foreign = tmp_path / "d" / "train" / "train-00000.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("someone's")
    with pytest.raises(UserError, match="is not empty and no unfinished build"):
        make(photos, tmp_path / "d", palette, settings())
    assert foreign.read_text() == "someone's"


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "mark", "plan of another"])
def test_only_damaged_shards_are_built_again(photos: Path, tmp_path: Path, palette: Palette, damage: str) -> None:
    make(photos, tmp_path / "d", palette, settings())
    before = digest(tmp_path / "d")
    train = tmp_path / "d" / "train"
    (train / "manifest.json").unlink()
    tar = train / "train-00001.tar"
    mark = train / "train-00001.json"
    if damage == "missing":
        tar.unlink()
    elif damage == "short":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "flipped":
        tar.write_bytes(tar.read_bytes().replace(b"train-00001-000000", b"train-00001-000009", 1))
    elif damage == "mark":
        mark.unlink()
    else:
        text = json.loads(mark.read_text())
        mark.write_text(json.dumps({**text, "note": {**text["note"], "plan": "0" * 64}}))
    (train / ".train-00001.tar.1.tmp").write_text("left behind")
    meter = Meter()
    build_here(begin(open_source("image_folder", [str(photos)]), tmp_path / "d", palette, settings()), meter=meter)
    assert meter.shown[-1] == (7, 0, 7)
    assert digest(tmp_path / "d") == before


def test_an_unfinished_build_of_another_plan_is_replaced(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings())
    for split in ("train", "val"):
        (tmp_path / "d" / split / "manifest.json").unlink()
    make(photos, tmp_path / "d", palette, settings(rows_per_shard=20, seed=5))
    make(photos, tmp_path / "fresh", palette, settings(rows_per_shard=20, seed=5))
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")


@pytest.fixture
def spoilt(photos: Path, tmp_path: Path) -> Path:
    """48 good images and 3 bad ones."""
    root = tmp_path / "spoilt"
    shutil.copytree(photos, root)
    (root / "china" / "page.jpg").write_text("<html>")
    (root / "flower" / "empty.png").write_bytes(b"")
    (root / "flower" / "cut.jpg").write_bytes((photos / "flower" / "01.jpg").read_bytes()[:900])
    (root / "flower" / "notes.txt").write_text("not an image by its name")
    (root / "flower" / ".hidden.jpg").write_text("hidden")
    return root


def test_rejects_within_the_rate_are_counted_and_listed(spoilt: Path, tmp_path: Path, palette: Palette) -> None:
    chosen = settings(holdout=0, views=2)
    ((directory, manifest),) = make(spoilt, tmp_path / "d", palette, chosen, max_reject_rate=0.1)
    assert (manifest.rows, manifest.rejected) == (48, 3)
    lines = [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]
    assert {(line["id"], line["reason"]) for line in lines} == {
        ("china/page.jpg", "not an image"),
        ("flower/empty.png", "empty file"),
        ("flower/cut.jpg", "truncated"),
    }
    assert verify(directory).rows == 96
    # The bytes do not depend on whether the rejects were found in this run or an earlier one.
    before = digest(tmp_path / "d")
    (directory / "manifest.json").unlink()
    (directory / "train-00002.tar").unlink()
    make(spoilt, tmp_path / "d", palette, chosen, max_reject_rate=0.1)
    assert digest(tmp_path / "d") == before


def test_too_many_rejects_name_the_reasons_and_leave_nothing(spoilt: Path, tmp_path: Path, palette: Palette) -> None:
    with pytest.raises(UserError, match=r"mend or remove it") as caught:
        make(spoilt, tmp_path / "d", palette, settings(rows_per_shard=100))
    assert any(bad in str(caught.value) for bad in ("page.jpg", "empty.png", "cut.jpg"))
    with pytest.raises(UserError, match=r"3 of 51 images rejected \(.*empty file 1.*above 0.04"):
        make(spoilt, tmp_path / "d", palette, settings(rows_per_shard=100, holdout=0), max_reject_rate=0.04)
    assert not (tmp_path / "d").exists()


def test_a_split_without_images_is_refused(photos: Path, tmp_path: Path, palette: Palette) -> None:
    for share, which in ((1e-9, "validation"), (1.0, "training")):
        with pytest.raises(UserError, match=f"of 48 images none is left for {which}"):
            make(photos, tmp_path / "d", palette, settings(holdout=share))
    assert not (tmp_path / "d").exists()


def test_settings_that_contradict(photos: Path, tmp_path: Path, palette: Palette) -> None:
    with pytest.raises(UserError, match="larger than the crop of 224"):
        make(photos, tmp_path / "d", palette, settings(resolution=256))
    with pytest.raises(UserError, match="all views are the same"):
        make(photos, tmp_path / "d", palette, settings(views=2, crop=False))


def test_names_that_are_no_utf8_and_nested_folders(tmp_path: Path, palette: Palette) -> None:
    pixels = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for name in (b"b/deep/er/1.png", b"a/caf\xe9.png", "a/日本.PNG".encode()):
        path = tmp_path / "images" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels.save(path, "PNG")
    ((directory, _),) = make(tmp_path / "images", tmp_path / "d", palette, settings(crop=False, holdout=0))
    ids = Dataset.open(directory).ids().tolist()
    assert sorted(ids) == sorted([b"b/deep/er/1.png", b"a/caf\xe9.png", "a/日本.PNG".encode()])
    verify(directory)


def test_the_manifest_says_how_it_was_made(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, settings(views=2))
    train, val = (Manifest.load(tmp_path / "d" / split) for split in ("train", "val"))
    assert train.transform["shorter_side"] == [256, 384]
    assert (train.transform["crop"], val.transform["crop"]) == ("random", "centre")
    assert train.transform["filter"] == "bicubic"
    assert (train.views, val.views, train.split, val.split) == (2, 1, "train", "val")
    assert train.versions.keys() == {"igpt_ds", "numpy", "pillow"}
    assert train.rows + val.rows == 48
