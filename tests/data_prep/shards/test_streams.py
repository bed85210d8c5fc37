"""Streamed sources: one input file makes its own shards; the plan holds no images; kills change no byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.check.verify import verify
from data_prep.selection.file import Selection, write_selection
from data_prep.shards.job import Results, begin
from data_prep.shards.plan import Settings, unit_hash
from data_prep.workers.pool import pool
from data_prep.workers.run import Here
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import evaluation
from tests.data_prep.shards.test_build import digest
from tests.helpers.places import Meter, build_here, fit_at
from tests.helpers.streams import SETTINGS, Folders

ROOT = Path(__file__).resolve().parents[3]
PLAIN = replace(SETTINGS, holdout=0.0, views=1)


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Four input files of 24, 24, 0 good and 5 images, with rejects at every kind of place."""
    root = tmp_path_factory.mktemp("web")
    for name in ("china", "flower"):
        shutil.copytree(photos / name, root / f"0-{name}")
    (root / "0-china" / "00-first.gone").write_bytes(b"")
    (root / "0-china" / "06-within.jpg").write_text("<html>")
    (root / "0-flower" / "99-last.jpg").write_bytes(b"")
    for name in ("a.jpg", "b.jpg"):
        (root / "1-nothing").mkdir(exist_ok=True)
        (root / "1-nothing" / name).write_text("<html>")
    (root / "2-few").mkdir()
    for i in range(5):
        shutil.copy(photos / "china" / f"{i:02d}.jpg", root / "2-few")
    return root


def make(root: Path, out: Path, palette: Palette, settings: Settings, rate: float = 0.5, **choices: object) -> Results:
    return build_here(begin(Folders(root), out, palette, settings, max_reject_rate=rate, **choices))


def test_every_image_is_in_one_split_once_and_every_reject_is_listed(
    web: Path, tmp_path: Path, palette: Palette
) -> None:
    make(web, tmp_path / "d", palette, SETTINGS)
    wanted = {str(p.relative_to(web)) for p in web.rglob("*.*")}
    ids, rejected = [], []
    for split, views in (("train", 2), ("val", 1)):
        verify(tmp_path / "d" / split)
        dataset = Dataset.open(tmp_path / "d" / split)
        here = [i.decode() for i in dataset.ids()]
        assert all((unit_hash("holdout", i) < 0.1) == (split == "val") for i in here)
        assert {shard.view for shard in dataset.manifest.shards} == set(range(views))
        assert all(shard.rows <= 7 for shard in dataset.manifest.shards)
        ids += here
        lines = tmp_path / "d" / split / "rejects.jsonl"
        found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        assert len(found) == dataset.manifest.rejected
        rejected += [(each["id"], each["reason"]) for each in found]
    assert len(ids) + len(rejected) == len(wanted)
    assert {*ids, *(name for name, _ in rejected)} == wanted
    assert dict(rejected) == {
        "0-china/00-first.gone": "unreadable",
        "0-china/06-within.jpg": "not an image",
        "0-flower/99-last.jpg": "empty file",
        "1-nothing/a.jpg": "not an image",
        "1-nothing/b.jpg": "not an image",
    }


def test_the_rows_are_the_stream_in_its_order(web: Path, tmp_path: Path, palette: Palette) -> None:
    ((directory, manifest),) = make(web, tmp_path / "d", palette, PLAIN)
    assert manifest is not None
    good = sorted(p for p in web.rglob("[0-9][0-9].jpg"))
    assert [i.decode() for i in Dataset.open(directory).ids()] == [str(p.relative_to(web)) for p in good]
    # 24 rows in shards of 7; no shard of a file without a good image.
    assert [(s.name, s.rows) for s in manifest.shards[:4]] == [
        ("train-00000-000", 7),
        ("train-00000-001", 7),
        ("train-00000-002", 7),
        ("train-00000-003", 3),
    ]
    assert manifest.shards[-1].name == "train-00003-000"
    assert len(manifest.shards) == 9


def test_a_file_of_exactly_full_shards_has_no_empty_one(photos: Path, tmp_path: Path, palette: Palette) -> None:
    shutil.copytree(photos / "china", tmp_path / "in" / "a")
    (tmp_path / "in" / "a" / "zz.jpg").write_text("<html>")  # after the last good image
    ((_, manifest),) = make(tmp_path / "in", tmp_path / "d", palette, replace(PLAIN, rows_per_shard=8))
    assert manifest is not None
    assert [shard.rows for shard in manifest.shards] == [8, 8, 8]
    assert manifest.rejected == 1


def test_labels_and_the_pool_of_test_images(photos: Path, tmp_path: Path, palette: Palette) -> None:
    shutil.copytree(photos / "china", tmp_path / "in" / "a")
    shutil.copytree(photos / "flower", tmp_path / "in" / "test-b")
    source = Folders(tmp_path / "in", ["a", "test-b"])
    job = begin(source, tmp_path / "d", palette, replace(PLAIN, holdout=0.2), splits=("train", "val", "test"))
    built = dict(build_here(job))
    assert [path.name for path in built] == ["train", "val", "test"]
    assert set(Dataset.open(tmp_path / "d" / "train").labels()) == {0}
    test = Dataset.open(tmp_path / "d" / "test")
    assert (test.rows, set(test.labels()), test.manifest.transform["crop"]) == (24, {1}, "centre")
    # Another share held out is another train and val, but the same test.
    job = begin(source, tmp_path / "d", palette, replace(PLAIN, holdout=0.3), splits=("test",))
    assert job.to_do == []
    with pytest.raises(UserError, match=r"holdout was 0\.2 and is 0\.3"):
        begin(source, tmp_path / "d", palette, replace(PLAIN, holdout=0.3), splits=("val",))


def test_splits_built_one_by_one_must_not_overlap(web: Path, tmp_path: Path, palette: Palette) -> None:
    make(web, tmp_path / "d", palette, replace(PLAIN, holdout=0.2), splits=("train",))
    with pytest.raises(UserError, match=r"train: was built with --holdout 0\.2, not 0\.3"):
        make(web, tmp_path / "d", palette, replace(PLAIN, holdout=0.3), splits=("val",))
    make(web, tmp_path / "d", palette, replace(PLAIN, holdout=0.2), splits=("val",))
    make(web, tmp_path / "both", palette, replace(PLAIN, holdout=0.2))
    assert digest(tmp_path / "d") == digest(tmp_path / "both")


def test_a_trial_can_be_looked_at_and_goes_on(web: Path, tmp_path: Path, palette: Palette) -> None:
    chosen = replace(SETTINGS, holdout=0.3)
    make(web, tmp_path / "whole", palette, chosen)
    make(web, tmp_path / "d", palette, chosen, max_shards=1)
    verify(tmp_path / "d" / "train")
    trial = Dataset.open(tmp_path / "d" / "train")
    assert {i.split(b"/")[0] for i in trial.ids()} == {b"0-china"}
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d" / "train").glob("*.tar")}
    assert begin(Folders(web), tmp_path / "d", palette, chosen, max_shards=1).to_do == []
    assert begin(Folders(web), tmp_path / "d", palette, chosen).to_do == ["train", "val"]
    # Killed as soon as it has begun, the whole is not taken for built.
    begin(Folders(web), tmp_path / "d", palette, chosen, max_reject_rate=0.5).prepare()
    assert begin(Folders(web), tmp_path / "d", palette, chosen).to_do == ["train", "val"]
    make(web, tmp_path / "d", palette, chosen)
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d" / "train").glob("*.tar")}
    assert before.items() <= after.items()
    assert begin(Folders(web), tmp_path / "d", palette, chosen, max_shards=2).to_do == []


def test_a_shard_that_is_gone_is_built_again_from_there(web: Path, tmp_path: Path, palette: Palette) -> None:
    make(web, tmp_path / "d", palette, PLAIN)
    before = digest(tmp_path / "d")
    directory = tmp_path / "d" / "train"
    (directory / "manifest.json").unlink()
    (directory / "train-00001-002.json").unlink()
    (directory / "train-00002-000.json").unlink()  # of the file without a good image
    kept = (directory / "train-00001-001.tar").stat().st_mtime_ns
    meter = Meter()
    build_here(begin(Folders(web), tmp_path / "d", palette, PLAIN, max_reject_rate=0.5), meter=meter)
    assert digest(tmp_path / "d") == before
    assert (directory / "train-00001-001.tar").stat().st_mtime_ns == kept
    assert meter.shown[-1][0] == (25 - 14) + 2


def test_the_plan_holds_names_of_files_only(tmp_path: Path, palette: Palette) -> None:
    for i in range(300):
        (tmp_path / "in" / f"{i:05d}").mkdir(parents=True)
    job = begin(Folders(tmp_path / "in"), tmp_path / "d", palette, PLAIN)
    (plan,) = job.plans
    assert all(piece.items is None for piece in plan.pieces)
    assert len(json.dumps(plan.record)) < 2000
    assert (tmp_path / "d").exists() is False
    with pytest.raises(UserError, match="folders: no images in 00000 and 299 more files: mend the path"):
        build_here(job)


def test_an_input_file_that_ends_badly_stops_the_job_but_keeps_shards(
    web: Path, tmp_path: Path, palette: Palette
) -> None:
    root = tmp_path / "in"
    shutil.copytree(web, root)
    (root / "2-few" / "04.end").write_bytes(b"")
    with pytest.raises(UserError, match="2-few: ends badly: copy it again"):
        make(root, tmp_path / "d", palette, PLAIN)
    assert len(list((tmp_path / "d" / "train").glob("*.tar"))) == 8
    with pytest.raises(UserError, match="half-built"):
        Dataset.open(tmp_path / "d" / "train")
    (root / "2-few" / "04.end").unlink()
    make(root, tmp_path / "d", palette, PLAIN)
    make(web, tmp_path / "whole", palette, PLAIN)
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")


def test_the_share_of_rejects_is_that_of_the_whole_job(web: Path, tmp_path: Path, palette: Palette) -> None:
    """5 of 58: more than 0.08, fewer than 0.09, though half of one file and all of another are rejected."""
    with pytest.raises(UserError, match=r"5 of 58 images rejected \(not an image 3, empty file 1, unreadable 1\)"):
        make(web, tmp_path / "a", palette, PLAIN, rate=0.08)
    ((_, manifest),) = make(web, tmp_path / "b", palette, PLAIN, rate=0.09)
    assert manifest is not None
    assert manifest.rejected == 5
    with pytest.raises(UserError, match=r"5 of 58 images rejected"), pool(2) as executor:
        build_here(begin(Folders(web), tmp_path / "e", palette, PLAIN, max_reject_rate=0.08), executor)
    with pytest.raises(UserError, match=r"0-china/00-first.gone: unreadable \(gone\): mend or remove it"):
        make(web, tmp_path / "c", palette, PLAIN, rate=0.0)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_rejects_that_come_first_do_not_end_a_streamed_job(
    photos: Path, tmp_path: Path, palette: Palette, workers: int
) -> None:
    """3 of 51, all of them in the first file: how many there are in all is not guessed at."""
    for name in ("b", "c"):
        shutil.copytree(photos / "china", tmp_path / "in" / name)
    (tmp_path / "in" / "a").mkdir()
    for i in range(3):
        (tmp_path / "in" / "a" / f"{i}.jpg").write_text("<html>")
    source = Folders(tmp_path / "in")
    with pool(workers) as executor:
        job = begin(source, tmp_path / "d", palette, PLAIN, max_reject_rate=0.06)
        ((_, manifest),) = build_here(job, executor)
        fitted = fit_at(Here(executor), source, evaluation(8, crop=True), tmp_path / "p.npy", max_reject_rate=0.06)
        assert manifest and fitted and manifest.rejected == fitted.rejected == 3
        with pytest.raises(UserError, match="3 of 51 images rejected"):
            fit_at(Here(executor), source, evaluation(8, crop=True), tmp_path / "q.npy", max_reject_rate=0.05)


def select(web: Path, path: Path, drop: str, name: str = "folders") -> Selection:
    parts = []
    for part in Folders(web).parts("train"):
        ids = sorted(f"{part}/{p.name}" for p in (web / part).glob("[0-9][0-9].jpg"))
        parts.append((part, np.array([i for i in ids if drop not in i], dtype=np.bytes_)))
    kept = sum(len(ids) for _, ids in parts)
    return write_selection(path, name, iter(parts), inputs=kept, dropped={}, settings={})


def test_a_selection_is_built_and_nothing_else(web: Path, tmp_path: Path, palette: Palette) -> None:
    selection = select(web, tmp_path / "s.npz", drop="flower")
    ((directory, manifest),) = make(web, tmp_path / "d", palette, PLAIN, rate=0, selection=selection)
    assert manifest is not None
    ids = Dataset.open(directory).ids().tolist()
    assert len(ids) == 29
    assert not any(b"flower" in i for i in ids)
    with pytest.raises(UserError, match="selection_sha256 was"):
        make(web, tmp_path / "d", palette, PLAIN, selection=select(web, tmp_path / "t.npz", drop="few"))
    other = select(web, tmp_path / "o.npz", drop="few", name="webdataset")
    with pytest.raises(UserError, match="was made from webdataset, not from folders"):
        make(web, tmp_path / "e", palette, PLAIN, selection=other)
    root = tmp_path / "grown"
    shutil.copytree(web, root)
    shutil.copytree(web / "2-few", root / "3-new")
    with pytest.raises(UserError, match="was made without 3-new"):
        make(root, tmp_path / "e", palette, PLAIN, selection=selection)
    shutil.rmtree(root / "3-new")
    (root / "2-few" / "03.jpg").unlink()
    with pytest.raises(UserError, match=r"2-few: 1 of the 5 images that .* keeps are not there"):
        make(root, tmp_path / "e", palette, PLAIN, selection=selection)


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize("kind", ["streamed", "listed", "views added"])
def test_killed_at_random_moments_it_continues_to_the_same_bytes(
    web: Path, photos: Path, tmp_path: Path, palette: Palette, kind: str
) -> None:
    """SIGKILL to all processes five times, in one process and in two; the manifest, too, is the unbroken run's."""
    palette.save(tmp_path / "p.npy")
    listed = ["data_prep", "shards", "image_folder", str(photos), "--palette", str(tmp_path / "p.npy"), "--resolution"]
    listed += ["16", "--holdout", "0.1", "--rows-per-shard", "2", "--out"]

    def command(out: str, workers: int, views: int = 3) -> list[str]:
        if kind == "streamed":
            return ["tests.helpers.streams", str(web), str(tmp_path / "p.npy"), str(tmp_path / out), str(workers)]
        return [*listed, str(tmp_path / out), "--workers", str(workers), "--views", str(views)]

    def begin_again() -> None:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        if kind == "views added":
            assert start(command("killed", 1, views=1)).wait(timeout=60) == 0

    process = start(command("whole", 1))
    assert process.wait(timeout=60) == 0, process.stderr
    begin_again()
    chance = random.Random(3)
    killed, deadline = 0, time.monotonic() + 120
    while killed < 5:
        assert time.monotonic() < deadline
        marks = len(list((tmp_path / "killed").glob("*/*-0*.json"))) + chance.choice([0, 1, 2, 3])
        process = start(command("killed", 1 + killed % 2))
        while len(list((tmp_path / "killed").glob("*/*-0*.json"))) < marks and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:  # It came to its end first: from the beginning, then.
            begin_again()
    process = start(command("killed", 2))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert "train/manifest.json" in digest(tmp_path / "killed")
