"""image_folder: classes or splits by the folders' names, links, what systems leave behind, and links to nothing."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.images.pieces import pieces_of, pixels, stream
from data_prep.palette.count import colour_tasks
from data_prep.shards.plan import Settings, make_plans
from data_prep.sources import ListedSource
from igpt_ds.dataset.palette import Palette
from igpt_ds.images.transforms import evaluation
from tests.helpers.source_fixtures import listed, png, refusal


def lay(root: Path, *names: str) -> Path:
    """A tree with images of these names; those that end in / are empty folders."""
    for seed, name in enumerate(names):
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(png(seed))
    return root


def found(source: ListedSource, pool: str = "train") -> list[tuple[str, int | None]]:
    return [tuple(item) for item in source.items(pool)]  # type: ignore[arg-type]


SPLIT = ("cat/1.png", "dog/2.png")


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "Testing"), ("train", "val"), ("train", "valid"), ("TRAIN", "Evaluation")],
)
def test_folders_of_splits_are_no_classes(tmp_path: Path, train: str, test: str) -> None:
    lay(tmp_path, *(f"{train}/{name}" for name in SPLIT), f"{test}/dog/3.png")
    source = listed("image_folder", tmp_path)
    assert source.classes == ["cat", "dog"]
    assert found(source) == [(f"{train}/cat/1.png", 0), (f"{train}/dog/2.png", 1)]
    assert found(source, "test") == [(f"{test}/dog/3.png", 1)], "labels are those of the training images"
    assert source.read(f"{test}/dog/3.png") == png(2)


def test_three_splits_and_one(tmp_path: Path) -> None:
    lay(tmp_path / "i", "train/1.png", "val/2.png", "test/3.png")
    source = listed("image_folder", tmp_path / "i")
    assert (source.classes, found(source), found(source, "test")) == (
        None,
        [("train/1.png", None)],
        [("test/3.png", None)],
    )
    assert found(listed("image_folder", tmp_path / "i", test="validation"), "test") == [("val/2.png", None)]
    assert "choose test or validation" in refusal(lambda: listed("image_folder", tmp_path / "i", test="dev"))
    assert "leave it out" in refusal(lambda: listed("image_folder", tmp_path / "i/val", test="test"))
    alone = listed("image_folder", lay(tmp_path / "j", "train/cat/1.png", "train/dog/1.png"))
    assert (alone.classes, found(alone, "test")) == (["cat", "dog"], [])
    alone = listed("image_folder", lay(tmp_path / "k", "test/cat/1.png", "test/dog/1.png"))
    assert (alone.classes, found(alone), len(found(alone, "test"))) == (["cat", "dog"], [], 2)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("train/1.png", "test/1.png", "cat/1.png"), "cat beside it like a class"),
        (("cat/1.png", "dog/1.png", "test/1.png"), "test: looks like a split"),
        (("train/cat/1.png", "validate/cat/1.png"), "train: looks like a split"),
        (("seg_train/a/1.png", "seg_test/a/1.png"), "call them train and test"),
        (("seg_train/a/1.png", "seg_test/a/1.png", "seg_pred/1.png"), "call them train and test"),
        (("train/1.png", "test_images/1.png"), "call them train and test"),
        (("train/1.png", "training/1.png"), "one folder a split"),
        (("bullet_train/1.png", "eye_test/1.png", "cat/1.png", "dog/1.png"), "bullet_train and eye_test look like"),
        (("seg_train/1.png", "seg_test/1.png", "seg_pred/1.png", "seg_extra/1.png"), "seg_test and seg_train look"),
        (("train2017/1.png", "val2017/1.png", "a/1.png", "b/1.png"), "train2017 and val2017 look like splits"),
        (("images/train2017/1.png", "images/val2017/1.png"), "images: holds train2017 and val2017"),
        (("images/seg_train/cat/1.png", "images/seg_test/cat/1.png"), "images: holds seg_test and seg_train"),
        (("cat/my_train/1.png", "cat/my_test/1.png", "dog/1.png"), "cat: holds my_test and my_train"),
        (("cat/Test/1.png", "dog/Train/1.png"), "cat/Test and dog/Train look like splits"),
        (("train/cat/test/1.png", "train/dog/1.png"), "train/cat/test: looks like a split inside train"),
        (("train/images/cat/1.png", "test/images/cat/1.png"), "train/images: the one class would be images"),
        (("images/cat/1.png", "images/dog/1.png"), "of folders such as cat: give"),
        (("data/train/cat/1.png", "data/test/cat/1.png"), "data: holds test and train"),
        (("cat/train/1.png", "cat/val/1.png", "dog/1.png"), "cat: holds train and val"),
        (("train/cat/1.png", "test/1.png"), "no class folders, unlike"),
        (("train/1.png", "test/cat/1.png"), "class folders such as cat, unlike"),
        (("train/cat/1.png", "test/dog/1.png"), "test/dog: no class of the training images"),
    ],
)
def test_what_could_be_splits_is_refused(tmp_path: Path, names: tuple[str, ...], told: str) -> None:
    def read() -> None:
        source = listed("image_folder", lay(tmp_path, *names))
        source.items("train"), source.items("test")

    assert told in refusal(read)


def test_a_folder_that_is_a_split_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pool in (("train", "train"), ("val2017", "test"), ("seg_test", "test"), ("test/images", "test")):
        root = lay(tmp_path / "i" / name, "cat/1.png", "dog/2.png")
        link = tmp_path / f"{name.replace('/', '_')[:-1]}X"
        link.symlink_to(root)
        monkeypatch.chdir(root)
        for given in (root, link, Path(), root / "cat/.."):
            source = listed("image_folder", given)
            assert {p: len(source.items(p)) for p in ("train", "test")} == {
                pool: 2,
                "test" if pool == "train" else "train": 0,
            }  # type: ignore[arg-type]
    palette, settings = Palette(np.zeros((2, 3), np.float32)), Settings(8, 0, 1, crop=False, seed=0, rows_per_shard=9)
    told = "mend the path or the names in it, which tell train from test"
    assert told in refusal(lambda: make_plans(listed("image_folder", root), palette, settings, ("train",)))
    assert told in refusal(lambda: colour_tasks(listed("image_folder", root), evaluation(8, crop=False), tmp_path))
    (tmp_path / "train").symlink_to(root)
    assert "is called train and leads to test" in refusal(lambda: listed("image_folder", tmp_path / "train"))
    for name in ("contest", "test_run/data", "dev/data"):
        assert len(listed("image_folder", lay(tmp_path / "j" / name, "cat/1.png")).items("train")) == 1


def test_classes_that_sound_like_splits(tmp_path: Path) -> None:
    names = ["bullet_train", "cat", "contest", "train"]
    assert listed("image_folder", lay(tmp_path / "a", *(f"{name}/1.png" for name in names))).classes == names
    alone = ["bus/1.png", "car/night/1.png", "train/1.png", "car/val_thorens/1.png"]
    assert listed("image_folder", lay(tmp_path / "c", *alone)).classes == ["bus", "car", "train"]
    assert len(listed("image_folder", tmp_path / "c").items("train")) == 4
    lay(tmp_path / "d", "train/bus/1.png", "train/train/1.png", "test/train/1.png")
    assert [len(listed("image_folder", tmp_path / "d").items(pool)) for pool in ("train", "test")] == [2, 1]  # type: ignore[arg-type]
    names = ["bullet_train", "steam_train"]
    assert listed("image_folder", lay(tmp_path / "b", *(f"{name}/1.png" for name in names))).classes == names


def test_folders_that_are_no_classes_are_left_out(tmp_path: Path) -> None:
    lay(
        tmp_path, "cat/1.png", "dog/2.png", "empty/", "notes/deep/", "lost+found/", "__MACOSX/cat/1.png", ".cache/3.png"
    )
    lay(tmp_path, "cat/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "cat/.hidden/4.png", "cat/._1.png", "@eaDir/x/5.jpg")
    lay(tmp_path, "__macosx/1.png", "@eadir/1.png", "LOST+FOUND/1.png")
    (tmp_path / "notes/readme.txt").write_text("no image")
    source = listed("image_folder", tmp_path)
    assert source.classes == ["cat", "dog"]
    assert found(source) == [("cat/1.png", 0), ("dog/2.png", 1)]


def test_links_to_folders(tmp_path: Path) -> None:
    root = lay(tmp_path / "i", "cat/1.png", "dog/2.png")
    lay(tmp_path / "store", "birds/3.png", "more/4.png")
    (root / "bird").symlink_to(tmp_path / "store/birds")
    (root / "cat/more").symlink_to("../../store/more")
    (tmp_path / "store/more/back").symlink_to(tmp_path / "store/more")
    for name, target in (("cat/up", ".."), ("dog/self", "."), ("around", "."), ("above", ".."), ("cat/dogs", "../dog")):
        (root / name).symlink_to(target)
    source = listed("image_folder", root)
    assert source.classes == ["bird", "cat", "dog"]
    assert found(source) == [("bird/3.png", 0), ("cat/1.png", 1), ("cat/more/4.png", 1), ("dog/2.png", 2)]
    (root / "kitten").symlink_to("cat")
    assert "the same folder as cat" in refusal(lambda: listed("image_folder", root))


def test_links_to_nothing(tmp_path: Path) -> None:
    root = lay(tmp_path, "cat/1.png", "dog/2.png")
    (root / "cat/gone.png").symlink_to("nowhere.png")
    (root / "cat/round.png").symlink_to("round.png")
    source = listed("image_folder", root)
    (piece,) = pieces_of(source, "train", 10)
    results = [pixels(encoded, evaluation(8, crop=True)) for encoded in stream(source, piece)]
    assert [getattr(result, "reason", None) for result in results] == [None, "unreadable", "unreadable", None]
    (root / "bird").symlink_to("nowhere")
    assert "bird: a link that leads nowhere" in refusal(lambda: listed("image_folder", root))
    (root / "bird").rename(root / "cat/more")
    assert "more: a link that leads nowhere" in refusal(lambda: listed("image_folder", root).items("train"))
    (root / "cat/more").unlink()
    os.mkfifo(root / "dog/pipe.png")  # reading it would hang
    told = refusal(lambda: listed("image_folder", root).items("train"))
    assert "pipe.png: a pipe or a device, no image: remove it" in told
