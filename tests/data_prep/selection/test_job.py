"""A selection in which all is known; and that neither workers, executors, kills nor memory change it."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.selection import embed, verdicts
from data_prep.selection.collections import Collection
from data_prep.selection.file import Selection
from data_prep.selection.job import Selected
from data_prep.selection.pictures import Pictures
from data_prep.sources import open_source
from data_prep.workers import pool as executors
from data_prep.workers.run import Here, OnCluster
from data_prep.workers.slurm import Cluster
from igpt_ds.errors import UserError
from tests.helpers.places import Meter
from tests.helpers.selections import MeanColour, job, make, select, stages
from tests.helpers.streams import Folders

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("known")
    return root, make(root)


@pytest.fixture(scope="module")
def unbroken(known: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The selection made in one process at one go, and what it left in its directory."""
    root = tmp_path_factory.mktemp("unbroken")
    select(known[0], root / "work", root / "out.npz")
    return root / "out.npz"


SAVE = Pictures.save


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 images, so that every part has several; and no pictures, which take most of the time."""
    monkeypatch.setattr(embed, "CHUNK", 7)
    monkeypatch.setattr(Pictures, "save", lambda *_: None)


def kept(selection: Selection) -> set[str]:
    return {name.decode() for part in selection.parts for name in selection.kept(part)}


def test_every_image_has_the_fate_that_it_should(known: tuple[Path, dict[str, str]], unbroken: Path) -> None:
    expected = known[1]
    selection = Selection.open(unbroken)
    assert kept(selection) == {name for name, fate in expected.items() if fate == "kept"}
    assert {**selection.dropped, "kept": selection.images} == Counter(expected.values())
    assert selection.inputs == len(expected)
    assert selection.parts == ["a", "b", "c", "d"]
    assert selection.kept("d") == frozenset()
    settings = selection.settings
    assert (settings["clusters"], settings["clusters_hit"]) == (2, 1)
    # red11 is the last that is kept: its mean colour against that of pure red.
    assert settings["threshold"] == pytest.approx(62 / np.hypot(62, 22), abs=0.01)
    assert settings["unreadable"] == {"empty file": 1, "not an image": 1, "unreadable": 1}
    assert [(each["source"], each["images"]) for each in settings["like"]] == [("folders", 20)]
    digest = hashlib.sha256()
    for path in sorted((known[0] / "test" / "test").iterdir()):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    assert settings["evaluations"][0]["sha256"] == digest.hexdigest()


def test_a_pool_like_itself_is_read_once(known: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    good = job(known[0], tmp_path / "work", clusters=1)
    meters: list[Meter] = []

    def recorded(name: str) -> Any:
        meters.append(Meter())
        return contextlib.nullcontext(meters[-1])

    selected = replace(good, like=[good.pool, good.pool], evaluations=[]).run(tmp_path / "out.npz", Here(), recorded)
    assert selected is not None
    assert meters[0].shown[-1][0] == len(known[1])
    assert selected.selection.dropped["close to evaluation"] == 0
    assert selected.selection.dropped["outside clusters"] == 0


def test_fewer_than_wanted_are_all_that_are_left(known: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, expected = known
    selected = select(root, tmp_path / "work", tmp_path / "all.npz", number=1000)
    assert selected.cut is None
    left = {name for name, fate in expected.items() if fate in {"kept", "below threshold"}}
    assert kept(selected.selection) == left
    # Exactly as many as there are is no different.
    again = select(root, tmp_path / "work", tmp_path / "just.npz", number=len(left))
    assert again.cut is None
    assert kept(again.selection) == left


def test_equally_similar_images_are_taken_in_order(tmp_path: Path) -> None:
    """Grey texture on one red: cosines are equal as the mean colours are."""
    rng = np.random.default_rng(0)
    for part in ("pool/a", "pool/b", "like/a", "test/test"):
        (tmp_path / part).mkdir(parents=True)
        for i in range(9):
            grey = np.kron(rng.permutation(np.repeat([-40, 40], 32)).reshape(8, 8), np.ones((8, 8)))
            pixels = np.array([188, 128, 128]) + grey[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / f"{i}.png")
    selected = select(tmp_path, tmp_path / "work", tmp_path / "out.npz", number=11, clusters=1)
    assert selected.cut is not None
    assert selected.cut.ties == 11
    assert kept(selected.selection) == {f"a/{i}.png" for i in range(9)} | {"b/0.png", "b/1.png"}


def test_other_settings_read_no_image_again(
    known: tuple[Path, dict[str, str]], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(embed, "decode", never)
    work = unbroken.parent / "work"
    selected = select(known[0], work, tmp_path / "few.npz", number=3)
    assert kept(selected.selection) == {"a/again.png", "b/red01.png", "c/red02.png"}
    near = select(known[0], work, tmp_path / "near.npz", number=1000, duplicate_distance=0, evaluation_distance=0)
    assert near.selection.dropped["near duplicate"] == 0
    assert near.selection.dropped["close to evaluation"] == 0
    # And back again: the same bytes as before.
    select(known[0], work, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == unbroken.read_bytes()


def test_a_part_that_is_new_costs_itself_only(
    known: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "grown"
    for name in ("pool/a", "pool/c", "like/0", "test/test"):
        (root / name).mkdir(parents=True)
        for path in (known[0] / name).iterdir():
            (root / name / path.name).write_bytes(path.read_bytes())
    select(root, tmp_path / "work", tmp_path / "first.npz")
    (root / "pool" / "b").mkdir()
    for path in (known[0] / "pool" / "b").iterdir():
        (root / "pool" / "b" / path.name).write_bytes(path.read_bytes())
    read = []
    real = embed.decode
    monkeypatch.setattr(embed, "decode", lambda data: (read.append(data), real(data))[1])
    selected = select(root, tmp_path / "work", tmp_path / "second.npz")
    assert len(read) == len(list((root / "pool" / "b").iterdir()))
    assert selected.selection.parts == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["threads", "two processes"])
def test_executors_change_no_byte(
    kind: str, known: tuple[Path, dict[str, str]], unbroken: Path, tmp_path: Path
) -> None:
    if kind == "threads":
        with ThreadPoolExecutor(3) as threads:
            job(known[0], tmp_path / "work").run(tmp_path / "out.npz", Here(threads), stages)
    else:
        with executors.pool(2) as processes:
            job(known[0], tmp_path / "work").run(tmp_path / "out.npz", Here(processes), stages)
    assert (tmp_path / "out.npz").read_bytes() == unbroken.read_bytes()


def test_jobs_of_a_cluster_change_no_byte(
    known: tuple[Path, dict[str, str]], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr("data_prep.workers.run.MAX_ARRAY", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = OnCluster(Cluster(tmp_path / "jobs", parallelism=2, kind="local"), wait=False)
    again = job(known[0], tmp_path / "work")
    assert again.run(tmp_path / "out.npz", place, stages) is None
    assert not (tmp_path / "out.npz").exists()
    place.wait = True
    assert again.run(tmp_path / "out.npz", place, stages) is not None
    assert (tmp_path / "out.npz").read_bytes() == unbroken.read_bytes()


def test_a_stop_at_any_publication_changes_no_byte(
    known: tuple[Path, dict[str, str]], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    left = 0

    class StopError(Exception):
        pass

    def replaced(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StopError
        real(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    stops = 0
    while not (tmp_path / "out.npz").exists():
        left = 4 + stops % 3  # the largest part publishes four files
        with contextlib.suppress(StopError):
            select(known[0], tmp_path / "work", tmp_path / "out.npz")
        stops += 1
        assert stops < 100
    assert stops > 5
    assert (tmp_path / "out.npz").read_bytes() == unbroken.read_bytes()


def test_kills_at_random_moments_change_no_byte(
    known: tuple[Path, dict[str, str]], unbroken: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.helpers.selections",
        *map(str, (known[0], tmp_path / "work", tmp_path / "out.npz")),
    ]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([*command, "2"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 1.8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    subprocess.run([*command, "1"], cwd=ROOT, timeout=120, check=True)
    selection = Selection.open(tmp_path / "out.npz")
    # These runs have whole parts in a chunk; the images are the same.
    assert kept(selection) == kept(Selection.open(unbroken))
    assert selection.dropped == Selection.open(unbroken).dropped
    assert not list((tmp_path / "work").glob("scratch/*"))


def test_a_second_run_in_the_same_directory_is_refused(known: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    class Second:
        executor = None

        def run(self, *_: object) -> bool:
            with pytest.raises(
                UserError, match=rf"work: in use by process {os.getpid()} on .*: wait for its end, or stop it"
            ):
                select(known[0], tmp_path / "work", tmp_path / "other.npz")
            return False

    assert job(known[0], tmp_path / "work").run(tmp_path / "out.npz", Second(), stages) is None
    assert not (tmp_path / "other.npz").exists()


def test_what_cannot_be_selected_from_is_told(known: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root = known[0]
    good = job(root, tmp_path / "work")
    for name in ("none", "broken/part", "ends/part"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "broken" / "part" / "a.png").write_text("<html>")
    (tmp_path / "ends" / "part" / "a.end").write_text("")

    def folders(name: str, pool: Any = "train") -> Collection:
        return Collection(Folders(tmp_path / name), pool, f"folders {name}")

    class Zero(MeanColour):
        def embed(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((len(images), 3), np.float32)

    for wrong, complaint in [
        (replace(good, pool=folders("none")), "folders none: holds no train images"),
        (replace(good, evaluations=[folders("broken", "test")]), "folders broken: holds no test images"),
        (replace(good, like=[folders("broken")]), "folders broken: not one of its images can be read"),
        (replace(good, pool=folders("ends")), "part: ends badly"),
        (replace(good, settings=replace(good.settings, clusters=1000)), "--clusters 1000: the pool has 47 images"),
        (replace(good, embedder=Zero("zero")), "--embedder zero: gives vectors without a direction"),
    ]:
        with pytest.raises(UserError, match=complaint):
            wrong.run(tmp_path / "out.npz", Here(), stages)
        assert not (tmp_path / "out.npz").exists()


def test_damage_in_the_directory_is_told(known: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    select(known[0], tmp_path / "work", tmp_path / "out.npz")
    for kind in ("embedded-*/*.npz", "scores-*/*.npz", "fates-*.u8"):
        path = sorted((tmp_path / "work").glob(kind))[0]
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="damaged: remove it and give the same command again"):
            select(known[0], tmp_path / "work", tmp_path / "out.npz")
        path.unlink()
        select(known[0], tmp_path / "work", tmp_path / "out.npz")


def test_counts_that_do_not_add_up_are_never_published(
    known: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verdicts.judge

    def one_more(*arguments: Any) -> Any:
        for judged in real(*arguments):
            judged.fates[0] = verdicts.NEAR if judged.fates[0] == verdicts.KEPT else verdicts.KEPT
            yield judged

    calls = iter([real, one_more])

    def judged_in_turn(*arguments: Any) -> Any:
        return next(calls)(*arguments)

    monkeypatch.setattr("data_prep.selection.job.judge", judged_in_turn)
    with pytest.raises(ValueError, match="inputs, but"):
        select(known[0], tmp_path / "work", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_a_listed_source_is_one_part(known: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("data_prep.selection.collections.PIECE", 10)
    root = tmp_path / "images"
    for path in sorted((known[0] / "pool").rglob("*.*")):
        if path.suffix != ".gone":
            (root / path.parent.name).mkdir(parents=True, exist_ok=True)
            (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    good = job(known[0], tmp_path / "work")
    listed = replace(good, pool=Collection(open_source("image_folder", [str(root)]), "train", "image_folder"))
    selected = listed.run(tmp_path / "out.npz", Here(), stages)
    assert isinstance(selected, Selected)
    assert selected.selection.parts == [""]
    assert kept(selected.selection) == {name for name, fate in known[1].items() if fate == "kept"}
    ids = np.load(tmp_path / "out.npz")["ids/0"]
    assert ids.tolist() == sorted(ids.tolist())  # the order of the source


def test_memory_does_not_grow_with_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts against twelve."""
    monkeypatch.setattr(embed, "CHUNK", 32)
    monkeypatch.setattr("data_prep.selection.duplicates.MEMORY", 4096)
    rng = np.random.default_rng(0)
    peaks = []
    for parts in (1, 3, 12):  # the first time loads libraries
        root = tmp_path / str(parts)
        for part in ["like/a", "test/test", *(f"pool/{i:02d}" for i in range(parts))]:
            (root / part).mkdir(parents=True)
            for i in range(32 if part.startswith("pool") else 4):
                pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / f"{i:02d}.png")
        tracemalloc.start()
        select(root, root / "work", root / "out.npz", number=10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1], peaks


def test_progress_and_pictures(
    known: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pictures, "save", SAVE)
    meters: dict[str, Meter] = {}

    def recorded(name: str) -> Any:
        return contextlib.nullcontext(meters.setdefault(name, Meter()))

    selected = job(known[0], tmp_path / "work").run(tmp_path / "out.npz", Here(), recorded)
    assert selected is not None
    assert list(meters) == ["read", "cluster", "score", "find duplicates", "write"]
    assert meters["read"].shown[-1][:2] == (len(known[1]) + 23, 3)
    assert meters["score"].shown[-1] == (len(known[1]) - 3, 0, len(known[1]) - 3)
    for path in selected.pictures:
        with Image.open(path) as image:
            image.load()
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    record = json.loads(np.load(tmp_path / "out.npz")["selection.json"].tobytes())
    assert record["inputs"] == record["kept"] + sum(record["dropped"].values())
