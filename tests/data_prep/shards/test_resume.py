"""A build that goes on: on an input that changed, beside another build, in a directory of another plan."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.job import Results, begin
from data_prep.shards.plan import Settings
from data_prep.shards.task import OWNER, build_slice, finished
from data_prep.sources import open_source
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from tests.data_prep.shards.test_build import digest
from tests.data_prep.shards.test_build import settings as of_folders
from tests.helpers.places import build_here
from tests.helpers.streams import SETTINGS, Folders

PLAIN = replace(SETTINGS, holdout=0.0, views=1, rows_per_shard=4)


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32))


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """One input file of 13 images."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    for path in sorted((photos / "china").iterdir())[:13]:
        shutil.copy(path, tmp_path / "in" / "a")
    return tmp_path / "in"


def make(root: Path, out: Path, palette: Palette, chosen: Settings = PLAIN, **choices: object) -> Results:
    return build_here(begin(Folders(root), out, palette, chosen, **choices))


def interrupted(root: Path, out: Path, palette: Palette, chosen: Settings = PLAIN) -> Path:
    """A build that has ended after its last full shard; the split's directory."""
    (root / "a" / "99.end").touch()
    with pytest.raises(UserError, match="a: ends badly"):
        make(root, out, palette, chosen)
    (root / "a" / "99.end").unlink()
    return out / "train"


def remove(folder: Path) -> None:
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        (folder / name).unlink()


def grow(folder: Path) -> None:
    shutil.copy(folder / "03.jpg", folder / "00-new.jpg")


def swap(folder: Path) -> None:
    """As a download that gives other bytes under the same names: as many of them, too."""
    data = (folder / "00.jpg").read_bytes()
    (folder / "00.jpg").write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])


def shorten(folder: Path) -> None:
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()


@pytest.mark.parametrize("change", [remove, grow, swap, shorten])
@pytest.mark.parametrize("views", [1, 2])
def test_an_input_that_changed_is_built_anew(
    images: Path, tmp_path: Path, palette: Palette, change: Callable[[Path], None], views: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = replace(PLAIN, views=views)
    train = interrupted(images, tmp_path / "d", palette, chosen)
    assert len(list(train.glob("*.tar"))) == 3 * views
    change(images / "a")
    make(images, tmp_path / "d", palette, chosen)
    make(images, tmp_path / "fresh", palette, chosen)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    ids = Dataset.open(train).ids().tolist()
    assert sorted(ids) == sorted(f"a/{path.name}".encode() for path in (images / "a").iterdir())
    told = "igpt-data: a: holds other images than when 3 of its shards were built: they are built anew for train\n"
    assert capsys.readouterr().err == told


def test_marks_without_a_hash_are_not_trusted(images: Path, tmp_path: Path, palette: Palette) -> None:
    """Those of versions before it was kept."""
    train = interrupted(images, tmp_path / "d", palette)
    for path in train.glob("train-*.json"):
        mark = json.loads(path.read_text())
        del mark["note"]["passed"]
        path.write_text(json.dumps(mark))
    remove(images / "a")
    make(images, tmp_path / "d", palette)
    assert len(set(Dataset.open(train).ids().tolist())) == 10


@pytest.fixture
def tars(photos: Path, tmp_path: Path) -> Path:
    """Two tars of six images; the last image of the second is damaged."""
    (tmp_path / "tars").mkdir()
    for name, folder in (("a", "china"), ("b", "flower")):
        pack(tmp_path / "tars" / f"{name}.tar", sorted((photos / folder).iterdir())[:6])
    with tarfile.open(tmp_path / "tars" / "b.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("99.jpg"))
    return tmp_path / "tars"


def pack(path: Path, members: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.add(member, member.name)


def of_tars(tars: Path, out: Path, palette: Palette, rate: float = 0.0) -> tuple[list[str], list[int]]:
    """Builds; the ids, and when the shards of a.tar were written."""
    build_here(begin(open_source("webdataset", [str(tars)]), out, palette, PLAIN, max_reject_rate=rate))
    written = [path.stat().st_mtime_ns for path in sorted((out / "train").glob("train-00000-*.tar"))]
    return [i.decode() for i in Dataset.open(out / "train").ids()], written


def test_a_file_that_changed_after_it_was_built_is_built_anew(
    tars: Path, photos: Path, tmp_path: Path, palette: Palette, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where all tars are downloaded again since one of them was damaged."""
    with pytest.raises(UserError, match=r"b\.tar/99\.jpg"):
        of_tars(tars, tmp_path / "d", palette)
    pack(tars / "a.tar", sorted((photos / "china").iterdir())[2:7])
    pack(tars / "b.tar", sorted((photos / "flower").iterdir())[:6])
    found, _ = of_tars(tars, tmp_path / "d", palette)
    assert found == [*(f"a.tar/{i:02d}.jpg" for i in range(2, 7)), *(f"b.tar/{i:02d}.jpg" for i in range(6))]
    of_tars(tars, tmp_path / "fresh", palette)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    assert "a.tar: holds other images than when 2 of its shards were built" in capsys.readouterr().err


def test_a_file_of_another_time_but_the_same_images_is_kept(
    tars: Path, photos: Path, tmp_path: Path, palette: Palette, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"b\.tar/99\.jpg"):
        of_tars(tars, tmp_path / "d", palette)
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "d" / "train").glob("train-00000-*.tar"))]
    os.utime(tars / "a.tar", ns=(1, 1))
    pack(tars / "b.tar", sorted((photos / "flower").iterdir())[:6])
    found, after = of_tars(tars, tmp_path / "d", palette)
    assert len(found) == 12
    assert before == after
    assert capsys.readouterr().err == ""


def swap_classes(root: Path) -> None:
    """The same names, the same images: of other classes."""
    for old, new in (("china", "x"), ("flower", "china"), ("x", "flower")):
        (root / old).rename(root / new)


def same_time_and_size(root: Path) -> None:
    """As an archive unpacked over the images, whose files all bear one time."""
    for path in root.glob("china/*"):
        data = path.read_bytes()
        path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    of_one_time(root)


def of_one_time(root: Path) -> None:
    for path in root.glob("*/*"):
        os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [swap_classes, same_time_and_size])
@pytest.mark.parametrize("trial", [True, False])
def test_listed_images_that_changed_are_built_anew(
    photos: Path, tmp_path: Path, palette: Palette, change: Callable[[Path], None], trial: bool,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root, chosen = tmp_path / "in", of_folders(holdout=0, rows_per_shard=24)
    shutil.copytree(photos, root)
    of_one_time(root)

    def make(out: Path, **choices: object) -> None:
        build_here(begin(open_source("image_folder", [str(root)]), out, palette, chosen, **choices))

    with monkeypatch.context() as patched:
        if not trial:  # killed before its end
            patched.setattr("data_prep.shards.job.Build.finish", lambda _: [])
        make(tmp_path / "d", max_shards=1 if trial else None)
    with monkeypatch.context() as patched:  # what is as it was is not read
        patched.setattr("data_prep.sources.image_folder.ImageFolder.read", None)
        job = begin(open_source("image_folder", [str(root)]), tmp_path / "d", palette, chosen)
        built = [finished(task) for task in job.tasks(job.plans[0])]
        assert [each is not None for each in built] == [True, not trial]
    change(root)
    make(tmp_path / "d")
    make(tmp_path / "fresh")
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    told = capsys.readouterr().err
    assert "igpt-data: train-00000: its images have changed since it was built: it is built anew\n" in told


def test_a_dataset_is_mended_of_the_same_images(photos: Path, tmp_path: Path, palette: Palette) -> None:
    root, chosen = tmp_path / "in", of_folders(holdout=0, rows_per_shard=24)
    shutil.copytree(photos, root)

    def make(out: Path) -> None:
        build_here(begin(open_source("image_folder", [str(root)]), out, palette, chosen))

    make(tmp_path / "d")
    (tmp_path / "d" / "train" / "train-00001.tar").unlink()
    swap_classes(root)
    make(tmp_path / "d")
    make(tmp_path / "fresh")
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")


def test_copies_of_listed_images_are_the_same(
    photos: Path, tmp_path: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read again, not built anew: also where it is not known what their files were."""
    chosen = of_folders(holdout=0)
    shutil.copytree(photos, tmp_path / "in")
    source = open_source("image_folder", [str(tmp_path / "in")])
    build_here(begin(source, tmp_path / "d", palette, chosen, max_shards=2))
    (tmp_path / "d" / "train" / ".train-00001.input").unlink()
    os.utime(tmp_path / "in" / "china" / "00.jpg", ns=(1, 1))
    monkeypatch.setattr("data_prep.shards.task.write_shard", None)
    job = begin(source, tmp_path / "d", palette, chosen)
    with job.owned() as mine:
        mine.prepare()
        tasks = list(mine.tasks(mine.plans[0]))[:2]
        for _ in range(2):
            assert [build_slice(task).kept for task in tasks] == [7, 7]
            assert all(map(finished, tasks))
            monkeypatch.setattr("data_prep.sources.image_folder.ImageFolder.read", None)
    assert capsys.readouterr().err == ""


def test_an_image_of_another_split_changes_nothing(images: Path, tmp_path: Path, palette: Palette) -> None:
    chosen = replace(PLAIN, holdout=0.3)
    make(images, tmp_path / "whole", palette, chosen)
    held_out = Dataset.open(tmp_path / "whole" / "val").ids().tolist()
    train = interrupted(images, tmp_path / "d", palette, chosen)
    before = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    (images / held_out[0].decode()).unlink()
    make(images, tmp_path / "d", palette, chosen)
    after = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    assert before and before.items() <= after.items()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_second_build_is_refused_before_it_clears_anything(
    images: Path, tmp_path: Path, palette: Palette, seed: int
) -> None:
    interrupted(images, tmp_path / "d", palette)
    first = begin(Folders(images), tmp_path / "d", palette, PLAIN)
    with first.owned() as mine:
        mine.prepare()
        before = digest(tmp_path / "d")
        for force in (False, True):
            with pytest.raises(UserError, match=r"d/train: in use by process \d+ on .* since .*: wait for its end"):
                make(images, tmp_path / "d", palette, replace(PLAIN, seed=seed), force=force)
        assert digest(tmp_path / "d") == before
    make(images, tmp_path / "d", palette)
    assert not [path.name for path in (tmp_path / "d" / "train").iterdir() if path.name.startswith(".")]


def test_what_was_built_while_this_build_was_planned_is_kept(images: Path, tmp_path: Path, palette: Palette) -> None:
    late = begin(Folders(images), tmp_path / "d", palette, replace(PLAIN, rows_per_shard=5))
    make(images, tmp_path / "d", palette)
    with pytest.raises(UserError, match=r"holds another dataset \(rows_per_shard was 4 and is 5\)"):
        build_here(late)
    assert Dataset.open(tmp_path / "d" / "train").rows == 13


def test_only_the_owner_publishes(images: Path, tmp_path: Path, palette: Palette) -> None:
    """A task that was asleep, or is one of a job that was submitted before, finds that another build has begun."""
    job = begin(Folders(images), tmp_path / "d", palette, PLAIN)
    with job.owned() as late:
        late.prepare()
    (train,) = (late.directory(plan) for plan in late.plans)
    (task,) = late.tasks(late.plans[0])
    with job.owned() as mine:
        mine.prepare()
        for act in (lambda: build_slice(task), late.finish):
            with pytest.raises(RunError, match=r"d/train: this process owns it no longer, but process \d+ on"):
                act()
        assert sorted(path.name for path in train.glob("[!.]*")) == ["palette.npy", "plan.json"]


def test_a_build_that_fails_leaves_other_splits_alone(images: Path, tmp_path: Path, palette: Palette) -> None:
    """Also those that appeared after it began, in a directory that it has made."""
    (images / "a" / "00.jpg").write_text("<html>")
    job = begin(Folders(images), tmp_path / "d", palette, PLAIN)
    (tmp_path / "d" / "test").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a/00\.jpg"):
        build_here(job)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["test"]


def test_an_unfinished_build_is_not_dropped_without_a_word(
    images: Path, tmp_path: Path, palette: Palette, capsys: pytest.CaptureFixture[str]
) -> None:
    train = interrupted(images, tmp_path / "d", palette)
    make(images, tmp_path / "d", palette, replace(PLAIN, rows_per_shard=7))
    told = f"igpt-data: {train}: 3 shards of another plan's unfinished build are removed: rows_per_shard was 4 and is 7"
    assert capsys.readouterr().err.splitlines() == [told]


def test_a_file_of_classes_may_be_named_in_another_way(photos: Path, tmp_path: Path, palette: Palette) -> None:
    """What it says is compared: the classes, and of a file of labels the labels."""
    source = open_source("image_folder", [str(photos)])

    def begun(**options: str) -> list[str]:
        return begin(source, tmp_path / "d", palette, of_folders(), options=options).to_do

    build_here(begin(source, tmp_path / "d", palette, of_folders(), options={"classes": "cls.txt"}))
    assert begun(classes="/elsewhere/cls.txt") == []
    with pytest.raises(UserError, match="options was"):
        begun(classes="cls.txt", other="1")
    train = tmp_path / "d" / "train"
    (train / "manifest.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    build_here(begin(source, tmp_path / "d", palette, of_folders(), options={"classes": "/elsewhere/cls.txt"}))
    assert {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")} == before


@pytest.mark.parametrize("first", ["train", "test"])
def test_splits_of_one_directory_are_one_data_set(photos: Path, tmp_path: Path, palette: Palette, first: str) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    shutil.copytree(photos, both)
    shutil.copytree(photos / "flower", one / "flower")
    second = "test" if first == "train" else "train"
    chosen, out = of_folders(holdout=0), tmp_path / "d"

    def make(root: Path, split: str, palette: Palette = palette, **choices: object) -> object:
        force = bool(choices.pop("force", False))
        source = open_source("image_folder", [str(root)])
        return build_here(
            begin(source, out, palette, replace(chosen, **choices), splits=(split,), force=force)  # type: ignore[arg-type]
        )

    make(both, first)
    for force in (False, True):
        with pytest.raises(UserError, match=rf"has 2 classes \(china, flower\), but {second} would have 1 classes"):
            make(one, second, force=force)
        with pytest.raises(UserError, match=rf"{first}: was built with another palette: give --palette"):
            make(both, second, Palette(palette.colours[:5]), force=force)
        with pytest.raises(UserError, match=rf"{first}: was built with --resolution 8, not 16: give the same"):
            make(both, second, resolution=16, force=force)
    assert not (out / second).exists()
    make(both, second)
    shutil.rmtree(out / second)  # as the message says
    shutil.rmtree(out / first)
    make(one, second)
    assert Dataset.open(out / second).manifest.classes == ["flower"]


def test_splits_are_shares_of_the_same_images(tars: Path, photos: Path, tmp_path: Path, palette: Palette) -> None:
    """An image's share depends on its id, and so on the spelling of the path."""
    pack(tars / "b.tar", sorted((photos / "flower").iterdir())[:6])
    shutil.copytree(photos, tmp_path / "of" / "train")
    out = tmp_path / "d"

    def make(split: str, source: str, path: Path | str, **options: str) -> object:
        chosen = replace(PLAIN, holdout=0.4)
        return build_here(
            begin(open_source(source, [str(path)], options), out, palette, chosen, splits=(split,), options=options)  # type: ignore[arg-type]
        )

    for first, second in (("train", "val"), ("val", "train")):
        make(first, "webdataset", tars)
        for source, path, options in [
            ("webdataset", tmp_path / "tar*" / "[ab].tar", {}),
            ("webdataset", tars / "a.tar", {}),
            ("webdataset", tars, {"image": "jpg"}),
            ("image_folder", photos / "china", {}),
        ]:
            with pytest.raises(UserError, match=rf"d/{first}: was built from .* may overlap: build both in one"):
                make(second, source, path, **options)
        make(second, "webdataset", f"{tars}/*.tar", pool="train")
        found = [i for split in (first, second) for i in Dataset.open(out / split).ids().tolist()]
        assert len(set(found)) == len(found) == 12
        shutil.rmtree(out)
    make("train", "image_folder", tmp_path / "of")
    with pytest.raises(UserError, match="may overlap"):
        make("val", "image_folder", tmp_path / "of" / "train")
    make("val", "image_folder", f"{tmp_path}/./of/")
    make("test", "image_folder", photos)


def test_millions_of_shards_are_refused(photos: Path, tmp_path: Path, palette: Palette) -> None:
    source = open_source("image_folder", [str(photos)])
    with pytest.raises(UserError, match=r"--rows-per-shard 1: 48,000,000 shards in 1000000 view\(s\) for train"):
        begin(source, tmp_path / "d", palette, of_folders(holdout=0, rows_per_shard=1, views=1_000_000))


def test_the_lock_is_no_part_of_a_dataset(images: Path, tmp_path: Path, palette: Palette) -> None:
    make(images, tmp_path / "d", palette)
    lock = Lock.take(tmp_path / "d" / "train")
    try:
        (tmp_path / "d" / "train" / OWNER).write_text("of a build that was killed")
        assert Dataset.open(tmp_path / "d" / "train").rows == 13
        assert begin(Folders(images), tmp_path / "d", palette, PLAIN).to_do == []
    finally:
        lock.release()
