"""Views of listed images: of one decoding, however many at a time; and more of them for a dataset that is there."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.check.verify import verify
from data_prep.shards import marks, plan, task
from data_prep.shards.job import Build, Results, begin
from data_prep.sources import open_source
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.images import transforms
from tests.data_prep.shards.test_build import digest, settings
from tests.helpers.places import Meter, build_here
from tests.helpers.streams import Folders


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32))


def planned(images: Path, out: Path, palette: Palette, views: int, **choices: object) -> Build:
    return begin(open_source("image_folder", [str(images)]), out, palette, settings(views=views), **choices)


def make(images: Path, out: Path, palette: Palette, views: int, **choices: object) -> Results:
    return build_here(planned(images, out, palette, views, **choices))


def written(split: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in split.glob("*.tar")}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each file's bytes were decoded."""
    counts: Counter[bytes] = Counter()
    decode = transforms.reduced

    def counted(data: bytes, *rest: object) -> object:
        counts[data] += 1
        return decode(data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(transforms, "reduced", counted)
    return counts


@pytest.mark.parametrize("streamed", [False, True])
def test_an_image_is_decoded_once_for_all_views(
    photos: Path, tmp_path: Path, palette: Palette, decoded: Counter[bytes], streamed: bool
) -> None:
    source = Folders(photos) if streamed else open_source("image_folder", [str(photos)])
    meter = Meter()
    build_here(begin(source, tmp_path / "d", palette, settings(views=3)), meter=meter)
    assert set(decoded.values()) == {1}
    assert len(decoded) == 48
    assert meter.shown[-1] == (48, 0, 48)


@pytest.mark.parametrize("views_at_a_time", [1, 2])
def test_few_views_at_a_time_bound_memory_and_change_no_byte(
    photos: Path, tmp_path: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch, views_at_a_time: int
) -> None:
    make(photos, tmp_path / "whole", palette, 3)
    monkeypatch.setattr(plan, "_TOKENS_AT_A_TIME", views_at_a_time * 7 * 2 * 8**2)  # 7 rows of 8 x 8 tokens
    job, meter = planned(photos, tmp_path / "d", palette, 3), Meter()
    assert {len(each.slice.views) for each in job.tasks(job.plans[0])} == {1, views_at_a_time}
    build_here(job, meter=meter)
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")
    rows = Dataset.open(tmp_path / "d" / "train").rows
    readings = {1: 3, 2: 2}[views_at_a_time] * rows + 48 - rows
    assert meter.shown[-1] == (readings, 0, readings)


@pytest.mark.parametrize("views_at_a_time", [1, 2, 9])
def test_views_are_added_to_a_dataset(
    photos: Path, tmp_path: Path, palette: Palette, decoded: Counter[bytes], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], views_at_a_time: int,
) -> None:  # fmt: skip
    make(photos, tmp_path / "fresh", palette, 4)
    monkeypatch.setattr(plan, "_TOKENS_AT_A_TIME", views_at_a_time * 7 * 2 * 8**2)
    make(photos, tmp_path / "d", palette, 2)
    before = written(tmp_path / "d" / "train")
    decoded.clear()
    job = planned(photos, tmp_path / "d", palette, 4)
    assert job.to_do == ["train"]
    build_here(job)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    assert before.items() < written(tmp_path / "d" / "train").items()
    assert verify(tmp_path / "d" / "train").views == 4
    assert set(decoded.values()) == {2 if views_at_a_time == 1 else 1}  # for the new ones only
    told = f"igpt-data: {tmp_path}/d/train: was of 2 view(s), now 4: shards of views in both are kept\n"
    assert capsys.readouterr().err == told
    assert planned(photos, tmp_path / "d", palette, 4).to_do == []


@pytest.mark.parametrize("views", [1, 3])
def test_an_unfinished_build_goes_on_with_other_views(
    photos: Path, tmp_path: Path, palette: Palette, views: int
) -> None:
    make(photos, tmp_path / "fresh", palette, views)
    make(photos, tmp_path / "d", palette, 2)
    train = tmp_path / "d" / "train"
    before = written(train)
    (train / "manifest.json").unlink()
    (train / "train-00001.json").unlink()
    make(photos, tmp_path / "d", palette, views)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    after = written(train)
    assert {name for name in before if before[name] != after.get(name, before[name])} == {"train-00001.tar"}


def test_views_are_taken_from_a_finished_dataset_by_force_only(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, 2)
    before = digest(tmp_path / "d")
    with pytest.raises(UserError, match=r"train: holds another dataset \(views was 2 and is 1\)"):
        make(photos, tmp_path / "d", palette, 1)
    assert digest(tmp_path / "d") == before


def test_views_of_input_files_take_turns_and_are_not_added(photos: Path, tmp_path: Path, palette: Palette) -> None:
    build_here(begin(Folders(photos), tmp_path / "d", palette, settings(views=2)))
    with pytest.raises(UserError, match=r"train: holds another dataset \(views was 2 and is 3\)"):
        begin(Folders(photos), tmp_path / "d", palette, settings(views=3))


def test_views_of_images_that_changed_are_not_added(
    photos: Path, tmp_path: Path, palette: Palette, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "in")
    make(tmp_path / "in", tmp_path / "d", palette, 2)
    for path in sorted((tmp_path / "in" / "china").iterdir()):
        shutil.copy(tmp_path / "in" / "flower" / path.name, path)
    make(tmp_path / "in", tmp_path / "d", palette, 3)
    make(tmp_path / "in", tmp_path / "fresh", palette, 3)
    assert digest(tmp_path / "d" / "train") == digest(tmp_path / "fresh" / "train")
    assert "igpt-data: train-00000: its images have changed since it was built: it is built anew\n" in (
        capsys.readouterr().err
    )


def test_only_the_views_that_are_missing_are_built(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "d", palette, 3)
    train = tmp_path / "d" / "train"
    before, bytes_before = written(train), digest(tmp_path / "d")
    pieces = len(before) // 3
    (train / "manifest.json").unlink()
    gone = {f"train-{pieces + 1:05d}.tar", f"train-{2 * pieces:05d}.tar"}
    for name in gone:
        (train / name).unlink()
    make(photos, tmp_path / "d", palette, 3)
    assert digest(tmp_path / "d") == bytes_before
    after = written(train)
    assert {name for name in before if after[name] != before[name]} == gone


def test_views_of_one_slice_are_never_of_different_images(
    photos: Path, tmp_path: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished build goes on after the images have changed, and is killed after a slice's first view."""
    shutil.copytree(photos, tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(Build, "finish", lambda _: [])
        make(tmp_path / "in", tmp_path / "d", palette, 2)
    for path in sorted((tmp_path / "in" / "china").iterdir()):
        shutil.copy(tmp_path / "in" / "flower" / path.name, path)
    write, built = task.write_shard, []

    def killed(directory: Path, name: str, *rest: object, **options: object) -> None:
        if built:
            raise KeyboardInterrupt
        built.append(name)
        write(directory, name, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(task, "write_shard", killed)
        make(tmp_path / "in", tmp_path / "d", palette, 2)
    assert built == ["train-00000"]
    make(tmp_path / "in", tmp_path / "d", palette, 2)
    make(tmp_path / "in", tmp_path / "fresh", palette, 2)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")


def test_views_without_a_usable_image(tmp_path: Path, photos: Path, palette: Palette) -> None:
    """A slice's marks are there in all views, without shards; and more views get theirs."""
    shutil.copytree(photos, tmp_path / "in")
    ids = [i.decode() for i in _first_slice(photos, tmp_path / "look", palette)]
    for name in ids:
        (tmp_path / "in" / name).write_text("<html>")
    chosen = {"max_reject_rate": 0.5}
    for views in (2, 3):
        make(tmp_path / "in", tmp_path / "d", palette, views, **chosen)
        make(tmp_path / "in", tmp_path / f"fresh{views}", palette, views, **chosen)
        assert digest(tmp_path / "d") == digest(tmp_path / f"fresh{views}")
    pieces = len(list((tmp_path / "d" / "train").glob("train-*.json"))) // 3
    for view in range(3):
        mark = json.loads((tmp_path / "d" / "train" / f"train-{view * pieces:05d}.json").read_text())
        assert (mark["rows"], len(mark["note"]["rejected"])) == (0, 7)
    assert Dataset.open(tmp_path / "d" / "train").manifest.rejected == 7


def _first_slice(images: Path, out: Path, palette: Palette) -> list[bytes]:
    make(images, out, palette, 1, max_shards=1)
    return Dataset.open(out / "train").ids().tolist()  # type: ignore[no-any-return]


def test_killed_while_marks_are_adopted_nothing_is_lost(
    photos: Path, tmp_path: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(photos, tmp_path / "fresh", palette, 3)
    make(photos, tmp_path / "d", palette, 2)
    before = written(tmp_path / "d" / "train")
    publish, left = marks.publish_text, [3]

    def killed(path: Path, text: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        publish(path, text)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(marks, "publish_text", killed)
        make(photos, tmp_path / "d", palette, 3)
    verify(tmp_path / "d" / "train")
    assert planned(photos, tmp_path / "d", palette, 2).to_do == []
    make(photos, tmp_path / "d", palette, 3)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    assert before.items() <= written(tmp_path / "d" / "train").items()


def test_a_trial_of_more_views_goes_on(photos: Path, tmp_path: Path, palette: Palette) -> None:
    make(photos, tmp_path / "fresh", palette, 3)
    make(photos, tmp_path / "d", palette, 2, max_shards=1)
    before = written(tmp_path / "d" / "train")
    make(photos, tmp_path / "d", palette, 3, max_shards=2)
    assert len(Dataset.open(tmp_path / "d" / "train").manifest.shards) == 6
    make(photos, tmp_path / "d", palette, 3)
    assert digest(tmp_path / "d") == digest(tmp_path / "fresh")
    assert before.items() <= written(tmp_path / "d" / "train").items()


def test_a_slice_that_is_there_is_read_but_not_decoded(
    photos: Path, tmp_path: Path, palette: Palette, decoded: Counter[bytes]
) -> None:
    job = planned(photos, tmp_path / "d", palette, 2)
    with job.owned() as mine:
        mine.prepare()
        first = next(mine.tasks(mine.plans[0]))
        assert task.build_slice(first).kept == 0
        decoded.clear()
        assert task.build_slice(first).kept == 7
    assert not decoded
