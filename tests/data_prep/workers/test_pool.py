"""Where tasks run changes nothing; workers end with their parent; clusters are asked for the right jobs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.palette.count import colour_tasks
from data_prep.shards.build import build
from data_prep.shards.job import Build, begin
from data_prep.shards.task import build_slice
from data_prep.sources import open_source
from data_prep.workers.pool import pool, run
from data_prep.workers.run import Here, OnCluster
from data_prep.workers.slurm import Cluster, batches, minutes
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import RunError, UserError
from igpt_ds.images.transforms import evaluation
from tests.data_prep.shards.test_build import digest
from tests.helpers import tasks
from tests.helpers.places import Meter, build_here, fit_at
from tests.helpers.streams import SETTINGS, Folders

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32))


def test_the_bytes_are_the_same_whatever_runs_the_tasks(photos: Path, tmp_path: Path, palette: Palette) -> None:
    folders, images = Folders(photos, ["china", "flower"]), open_source("image_folder", [str(photos)])
    meters = {}
    for name, source in (("streamed", folders), ("listed", images)):
        build_here(begin(source, tmp_path / name, palette, SETTINGS))
    with pool(3) as processes, ThreadPoolExecutor(3) as threads:
        for kind, executor in (("processes", processes), ("threads", threads)):
            for name, source in (("streamed", folders), ("listed", images)):
                meter = meters[kind, name] = Meter()
                build_here(begin(source, tmp_path / kind, palette, SETTINGS), executor, meter)
                assert digest(tmp_path / kind) == digest(tmp_path / name)
                (tmp_path / kind).rename(tmp_path / f"{kind}-{name}")
    for meter in meters.values():
        # A streamed file is read for each split; two views are of one reading.
        assert meter.shown[-1] == (48, 0, 48)
        assert [each[0] for each in meter.shown] == sorted(each[0] for each in meter.shown)


def test_the_palette_is_the_same_whatever_counts(photos: Path, tmp_path: Path) -> None:
    folders, images = Folders(photos), open_source("image_folder", [str(photos)])
    found = []
    with pool(2) as executor:
        for source, here in ((folders, None), (folders, executor), (images, None), (images, executor)):
            fitted = fit_at(Here(here), source, evaluation(16, crop=True), tmp_path / "p.npy")
            found.append((fitted, (tmp_path / "p.npy").read_bytes()))
            assert [path.name for path in tmp_path.iterdir()] == ["p.npy"]
    assert all(each == found[0] for each in found)
    assert found[0][0] and found[0][0].images == 48


def test_a_sample_is_chosen_by_the_ids(photos: Path, tmp_path: Path) -> None:
    def chosen(share: float) -> set[str]:
        tasks = colour_tasks(
            open_source("image_folder", [str(photos)]), evaluation(16, crop=True), tmp_path, sample=share
        )
        return {name for task in tasks for piece in task.pieces for name in piece.names}

    half = chosen(0.5)
    assert 12 < len(half) < 36
    assert chosen(0.1) < half
    fitted = fit_at(Here(), Folders(photos), evaluation(16, crop=True), tmp_path / "p.npy", k=4, sample=0.5)
    assert fitted and fitted.images == len(half)


def test_tasks_are_counted_and_few_are_in_flight() -> None:
    drawn = 0

    def number(n: int) -> int:
        nonlocal drawn
        drawn += 1
        return n

    class Late(Executor):
        def submit(self, fn: object, /, *args: object, **_: object) -> "Future[object]":
            future: Future[object] = Future()
            future.set_result(fn(*args))  # type: ignore[operator]
            return future

    assert next(iter(run(tasks.double, map(number, range(5000)), Late()))) % 2 == 0
    assert drawn < 300
    seen: list[tuple[int, int]] = []
    with pool(2) as executor:
        assert sorted(run(tasks.double, range(100), executor, lambda *now: seen.append(now))) == list(range(0, 200, 2))
    assert seen[-1][0] <= 100
    seen.clear()
    assert list(run(tasks.double, range(10), None, lambda *now: seen.append(now))) == list(range(0, 20, 2))
    assert seen[-1] == (10, 5)


def test_workers_load_nothing_heavy_and_leave_ctrl_c_to_the_parent() -> None:
    with pool(2) as executor:
        assert list(run(tasks.interrupted, [7], executor)) == [7]
        assert list(run(tasks.loaded, [0], executor)) == [[]]


def test_a_worker_that_dies_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"a worker process died .*: the same command again continues"), pool(2) as both:
        list(run(tasks.die, range(100), both))
    with pytest.raises(UserError, match="image 3: is not one"), pool(2) as both:
        list(run(tasks.refuse, range(100), both))


def wait_for(what: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path("/proc", pid, "status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.helpers.tasks", str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [path.name for path in tmp_path.iterdir()]
        if how == signal.SIGINT:  # as a terminal does it: to all of them
            os.killpg(parent.pid, how)
        else:
            parent.send_signal(how)
        _, errors = parent.communicate(timeout=60)
        wait_for(lambda: not any(alive(pid) for pid in workers))
        assert errors.count("Traceback") == (1 if how == signal.SIGINT else 0), errors
    finally:
        if parent.poll() is None:
            parent.kill()


def test_ctrl_c_is_one_line_and_the_same_command_continues(photos: Path, tmp_path: Path, palette: Palette) -> None:
    palette.save(tmp_path / "p.npy")
    where = [str(photos), "--palette", str(tmp_path / "p.npy"), "--out", str(tmp_path / "d")]
    options = ["--rows-per-shard", "1", "--views", "20", "--workers", "2", "--resolution", "16"]
    command = [sys.executable, "-m", "data_prep", "shards", "image_folder", *where, *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: len(list((tmp_path / "d").glob("*/*.tar"))) > 3)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert (process.returncode, errors.strip()) == (130, "igpt-data: interrupted; the same command again continues")


def test_a_cluster_builds_the_same_bytes_and_only_what_is_missing(
    photos: Path, tmp_path: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("image_folder", [str(photos)])
    build_here(begin(source, tmp_path / "whole", palette, SETTINGS))

    def again(meter: Meter) -> object:
        job = begin(source, tmp_path / "d", palette, SETTINGS)
        # Two processes in one of two jobs.
        return build(job, OnCluster(Cluster(tmp_path / "jobs", workers=2, kind="local"), wait=True), meter)

    monkeypatch.setattr("data_prep.workers.run.MAX_ARRAY", 2)
    meter = Meter()
    built = again(meter)
    assert [manifest.split for _, manifest in built] == ["train", "val"]  # type: ignore[attr-defined]
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")
    assert meter.shown[-1][0] == 0  # nothing was read by this process
    # All marks are there: no job is needed.
    (tmp_path / "d" / "train" / "manifest.json").unlink()
    scripts = sorted((tmp_path / "jobs").iterdir())
    again(Meter())
    assert sorted((tmp_path / "jobs").iterdir()) == scripts
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")


def test_a_cluster_tells_why_it_failed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "jobs", kind="local")
    cluster.submit(tasks.refuse_batch, [[3]], list)
    cluster.wait(lambda: None)
    assert str(cluster.failure("2 of 4 slices are not built")) == (
        "2 of 4 slices are not built: image 3: is not one: mend it"
    )
    silent = Cluster(tmp_path / "other", kind="local")
    assert "ended early: see their logs in" in str(silent.failure("x"))


def test_a_cluster_counts_the_same_palette(photos: Path, tmp_path: Path) -> None:
    source, transform = Folders(photos), evaluation(16, crop=True)
    here = fit_at(Here(), source, transform, tmp_path / "a.npy")

    def again() -> object:
        cluster = Cluster(tmp_path / "b.npy.work", kind="local")
        return fit_at(OnCluster(cluster, wait=True), source, transform, tmp_path / "b.npy")

    assert again() == here
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()
    work = tmp_path / "b.npy.work"
    assert not list(work.glob("counts-*"))
    # A later call reads what was fitted; another k does not take it for its own.
    submitted = sorted(work.iterdir())
    assert again() == here
    assert sorted(work.iterdir()) == submitted


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands called sbatch, squeue and srun, which keep what they are given and give what files beside them say."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": f'n=$(ls {folder}/*.sh 2>/dev/null | wc -l)\n[ ! -e {folder}/refuse ] || {{ echo "sbatch: error: '
        f'invalid partition" >&2; exit 1; }}\ncp "$1" {folder}/$n.sh\necho "Submitted batch job $((70 + n))"',
        "squeue": f"cat {folder}/queue 2>/dev/null || true",
        "srun": "exit 1",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_what_slurm_is_asked_for(photos: Path, tmp_path: Path, palette: Palette, slurm: Path) -> None:
    source = open_source("image_folder", [str(photos)])

    def submit() -> tuple[Cluster, OnCluster]:
        cluster = Cluster(tmp_path / "jobs", 3, 90, {"partition": "cpu", "mem": "8G"}, parallelism=5)
        place = OnCluster(cluster, wait=False)
        assert build(begin(source, tmp_path / "d", palette, SETTINGS), place, Meter()) is None
        return cluster, place

    cluster, place = submit()
    assert cluster.jobs() == ["70", "71"]
    array, last = ((slurm / f"{n}.sh").read_text() for n in (0, 1))
    for line in ("--partition=cpu", "--mem=8G", "--time=90", "--cpus-per-task=3"):
        assert f"#SBATCH {line}\n" in array
    slices = sum(len(plan.pieces) * plan.passes for plan in begin(source, tmp_path / "d", palette, SETTINGS).plans)
    assert place.pending.startswith(f"{slices} of {slices} slices are not built yet: jobs 70, 71; logs in {tmp_path}")
    assert f"#SBATCH --array=0-{slices - 1}%5\n" in array
    assert "#SBATCH --dependency=afterok:70\n" in last
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in last
    assert "#SBATCH --cpus-per-task=1\n" in last
    assert "--array" not in last
    # While they wait or run, nothing is submitted again; another build is refused.
    (slurm / "queue").write_text("12\n70\n")
    submit()
    assert not (slurm / "2.sh").exists()
    other = begin(source, tmp_path / "d", Palette(palette.colours[:5]), SETTINGS, force=True)
    with pytest.raises(UserError, match=r"jobs are still building another dataset"):
        build(other, place, Meter())
    # They ended early.
    (slurm / "queue").write_text("12\n")
    cluster, _ = submit()
    assert cluster.jobs() == ["72", "73"]
    with pytest.raises(UserError, match=rf"{slices} of {slices} slices are not built: jobs 72, 73 ended early"):
        job = begin(source, tmp_path / "d", palette, SETTINGS)
        (slurm / "queue").write_text("73\n")
        cluster.wait = lambda look: look()  # type: ignore[method-assign]
        build(job, OnCluster(cluster, wait=True), Meter())


def test_jobs_outlive_the_process_that_submitted_them(
    photos: Path, tmp_path: Path, palette: Palette, slurm: Path
) -> None:
    """While they are queued nothing else is built there; what is begun after them takes their right away."""
    source = open_source("image_folder", [str(photos)])

    def begun() -> Build:
        return begin(source, tmp_path / "d", palette, SETTINGS, force=True)

    place = OnCluster(Cluster(tmp_path / "d" / "jobs"), wait=False)
    assert build(begun(), place, Meter()) is None
    (slurm / "queue").write_text("70\n")
    task = next(iter(begun().joined().tasks(begun().plans[0])))
    assert build_slice(task).tally.seen  # as a job does it: the lock is gone, the right is not
    with pytest.raises(UserError, match=r"d: jobs 70, 71 are at work there: wait, or end them with scancel"):
        build_here(begun())
    shutil.copytree(tmp_path / "d" / "jobs", tmp_path / "p.npy.work")
    with pytest.raises(UserError, match=r"p\.npy: jobs 70, 71 are at work there"):
        fit_at(Here(), source, evaluation(16, crop=True), tmp_path / "p.npy")
    (slurm / "queue").write_text("12\n")
    build_here(begun())
    before = digest(tmp_path / "d")
    (tmp_path / "d" / "train" / "train-00000.json").unlink()
    with pytest.raises(RunError, match="d/train: this process owns it no longer"):
        build_slice(task)
    assert {**digest(tmp_path / "d"), "train/train-00000.json": before["train/train-00000.json"]} == before


def test_slurm_that_refuses_or_does_not_answer(tmp_path: Path, slurm: Path) -> None:
    (slurm / "refuse").touch()
    cluster = Cluster(tmp_path / "jobs")
    with pytest.raises(UserError, match=r"--executor slurm: cannot submit: .*invalid partition"):
        cluster.submit(tasks.refuse_batch, [[1]], list)
    assert cluster.jobs() == []
    for damaged in ("", "[]", '{"jobs": 1}', '{"jobs":' * 100_000):
        (cluster.folder / "submitted.json").write_text(damaged)
        assert cluster.jobs() == []
    (cluster.folder / "submitted.json").write_text('{"jobs": ["70"]}')
    (slurm / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"squeue: Slurm does not answer .*Unable to contact"):
        cluster.running()


def test_pieces_and_times() -> None:
    assert batches(list(range(5)), 2) == [[0, 1, 2], [3, 4]]
    assert [len(piece) for piece in batches(range(10_000), 1000)] == [10] * 1000
    assert batches([1], 1000) == [[1]]
    times = {"90": 90, "0:30": 1, "02:00:00": 120, "1-00": 1440, "2-01:30": 2970, "1-00:00:01": 1441}
    assert {text: minutes(text) for text in times} == times
    for text in ("", "soon", "0", "-5", "1:2:3:4", "1-"):
        with pytest.raises(UserError, match="--slurm-time"):
            minutes(text)
