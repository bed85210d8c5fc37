"""Where a command may write, and in which bounds: refused in one line before an image is read."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from igpt_ds.dataset.palette import Palette

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two black images of 8 x 8 pixels in each of two classes; and a palette beside them."""
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    Palette(np.array([[-1, -1, -1], [1, 1, 1]], np.float32)).save(tmp_path / "palette.npy")
    return tmp_path / "images"


class Command:
    """igpt-data in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", ["igpt-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code is None or isinstance(end.value.code, int)
        return (end.value.code or 0, *self.capsys.readouterr())

    def refused(self, *arguments: object) -> str:
        status, out, err = self(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        return err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Command:
    return Command(monkeypatch, capsys)


def shards(
    images: Path, out: object, *options: object, source: str = "image_folder", palette: Path | None = None
) -> tuple[object, ...]:
    palette = palette or images.parent / "palette.npy"
    sizes = ("--resolution", 8, "--no-crop", "--holdout", 0)
    return ("shards", source, images, "--palette", palette, *sizes, "--out", out, *options)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image may be decoded."""
    for module in ("data_prep.shards.task", "data_prep.palette.count"):
        monkeypatch.setattr(f"{module}.pixels", None)
    monkeypatch.setattr("data_prep.selection.embed.decode", None)


@pytest.mark.usefixtures("unread")
def test_nothing_is_written_into_the_images(images: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (images / "bird").symlink_to(tmp_path / "store")  # a class, which lies elsewhere
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "linked").symlink_to(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    for arguments in [
        shards(images, images),
        shards(images, images / "tokens"),
        shards(images, images / "cat" / "tokens"),
        shards(images, tmp_path / "link" / "tokens"),
        shards(tmp_path / "link", images / "tokens"),
        shards(images, tmp_path / "store" / "deep" / "tokens"),
        shards(images, images.parent / "none" / ".." / "images" / "tokens"),
        shards(tmp_path / "tars", tmp_path / "tars" / "tokens", source="webdataset"),
        shards(tmp_path / "tars", tmp_path / "store" / "tokens", source="img2dataset"),
        shards(tmp_path / "*", tmp_path / "tars" / "tokens", source="webdataset"),
        shards(tmp_path / "{tars,b}", tmp_path / "tars" / "tokens", source="parquet"),
        ("palette", images, "--out", images / "palette.npy"),
        ("palette", "image_folder", images, "--out", images / "cat" / "palette.npy"),
    ]:
        assert "whose images are read: choose a place outside of it" in command.refused(*arguments), arguments
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("unread")
def test_select_writes_no_pictures_into_the_images(images: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "like")
    embedder = ("--images", 2, "--embedder", "tiny_pca")
    for out, work in (("images/s.npz", "work"), ("s.npz", "images/work"), ("like/s.npz", "work")):
        arguments = ["select", "image_folder", images, "--like", f"image_folder:{tmp_path / 'like'}", *embedder]
        arguments += ["--out", tmp_path / out, "--work", tmp_path / work]
        assert "whose images are read" in command.refused(*arguments)


@pytest.mark.usefixtures("unread")
def test_nothing_is_written_among_the_classes_of_imagenet(images: Path, command: Command, tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC"
    for place in ("train/n00000001", "val/n00000001"):
        shutil.copytree(images / "cat", root / place)
    before = sorted(tmp_path.rglob("*"))
    for path, out, *options in [
        (root, root / "train" / "tokens"),
        (root / "train", root / "train" / "tokens"),
        (root, root / "train" / "n00000001"),
        (root, root / "val" / "tokens", "--split", "test"),
    ]:
        told = command.refused(*shards(path, out, *options, source="imagenet", palette=tmp_path / "palette.npy"))
        assert "whose images are read: choose a place outside of it" in told
    assert "whose images are read" in command.refused("palette", "imagenet", root, "--out", root / "train" / "p.npy")
    assert sorted(tmp_path.rglob("*")) == before


def test_imagenet_s_own_folder_may_hold_the_tokens(images: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(images / "cat", tmp_path / "ILSVRC" / "train" / "n00000001")
    root = tmp_path / "ILSVRC"
    assert command(*shards(root, root / "t", source="imagenet", palette=tmp_path / "palette.npy"))[0] == 0


def test_links_that_are_not_followed_are_not_read(images: Path, command: Command, tmp_path: Path) -> None:
    (images / "cat" / "up").symlink_to("../..")
    (tmp_path / "store").mkdir()
    (images / "cat" / ".hidden").symlink_to(tmp_path / "store")
    assert command(*shards(images, tmp_path / "d"))[0] == 0
    assert command(*shards(images, tmp_path / "store" / "d"))[0] == 0


@pytest.mark.usefixtures("unread")
def test_a_pipe_is_not_replaced(images: Path, command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        told = command.refused("palette", images, "--k", 1, "--out", tmp_path / name)
        assert f"{name}: is a device or a pipe" in told
    assert (tmp_path / "link").is_fifo() and (tmp_path / "link").is_symlink()


def test_images_beside_the_tokens_are_read(images: Path, command: Command) -> None:
    """DATA/images and DATA/train lie beside one another."""
    assert command(*shards(images, images.parent))[0] == 0


@pytest.mark.usefixtures("unread")
def test_a_place_that_cannot_be_written_is_refused_first(images: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    selection = ["select", "image_folder", images, "--like", f"image_folder:{images}", "--images", 2]
    selection += ["--embedder", "tiny_pca", "--work", tmp_path / "work"]
    for out, complaint in [
        (tmp_path / "folder", "the path is a directory"),
        (tmp_path / "file" / "palette.npy", "a part of the path is a file"),
        (tmp_path / ("n" * 300), "the name is too long"),
        (Path("/proc/palette.npy"), "cannot write"),
    ]:
        for arguments in (["palette", images, "--k", 2], selection):
            message = command.refused(*arguments, "--out", out)
            assert str(out) in message
            assert complaint in message
    assert not (tmp_path / "work").exists()


def test_the_users_folder(images: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert command(*shards(images, "~/tokens"))[0] == 0
    assert (tmp_path / "home" / "tokens" / "train" / "manifest.json").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.usefixtures("unread")
def test_figures_out_of_bounds(images: Path, command: Command, tmp_path: Path) -> None:
    out, huge = tmp_path / "d", 10**30
    palette = ("palette", images, "--out", tmp_path / "new.npy")
    for option, *values in [
        ("--workers", huge, 0, "nan", 8 * (os.cpu_count() or 1) + 64),
        ("--rows-per-shard", huge, 0, 1.5),
        ("--views", huge, 0),
        ("--resolution", huge, -1),
        ("--max-shards", 0),
        ("--holdout", "nan", "inf", 1),
        ("--max-reject-rate", "nan", -0.1),
        ("--seed", huge, -1),
        ("--array-parallelism", 0),
    ]:
        for value in values:
            assert option in command.refused(*shards(images, out, option, value)), value
    for option, *values in [
        ("--k", huge, 0, -1),
        ("--share", "nan", 0, 2),
        ("--resolution", huge, 0),
        ("--workers", huge),
        ("--max-reject-rate", "nan"),
    ]:
        for value in values:
            assert option in command.refused(*palette, option, value), value
    assert not out.exists()


def test_a_trial_of_more_shards_than_there_are_is_the_whole(images: Path, command: Command, tmp_path: Path) -> None:
    assert command(*shards(images, tmp_path / "d", "--max-shards", 10**30))[0] == 0


def test_what_is_complete_says_what_to_do_about_its_rejects(images: Path, command: Command, tmp_path: Path) -> None:
    (images / "cat" / "2.png").write_text("<html>")
    arguments = shards(images, tmp_path / "d", "--max-reject-rate", 0.5)
    assert command(*arguments)[0] == 0
    told = "nothing to do (1 images were rejected); where images have changed since, --force builds anew"
    assert told in command(*arguments)[1]


def test_one_colour_has_no_entropy(images: Path, command: Command, tmp_path: Path) -> None:
    assert command(*shards(images, tmp_path / "d"))[0] == 0
    for verb in ("verify", "inspect"):
        _, out, _ = command(verb, tmp_path / "d" / "train")
        assert "entropy      0.0000 " in out or "entropy     0.0000 " in out


def test_a_file_larger_than_allowed(
    images: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patched:
        patched.setattr("igpt_ds.atomic.os.fsync", too_large)
        assert "larger than files may be here" in command.refused(*shards(images, tmp_path / "d"))
    assert not (tmp_path / "d").exists()
