"""Runs that meet real faults: what they do, what they say, and that nothing is lost."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from tests.faults.kills import kill_at_random
from tests.faults.ranks import events, losses, ranks, run_to_its_end, whole_steps
from tests.helpers.commands import descendants, finish, pretrain, started
from tests.helpers.ranks import kill_group, quick_start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

TIMEOUT = 3.0  # seconds without progress that are a hang


def words(*sets: str) -> list[str]:
    return [word for each in sets for word in ("--set", each)]


ZERO_3 = ["--ds", "zero3"]  # which tells the ranks the most
SHORT = [*words("training.steps=24", "training.validate_every=12", "checkpoint.every=4"), *ZERO_3]
WATCHED = words(f"health.hang_timeout={TIMEOUT}")


def test_killed_at_random_moments_nothing_is_lost(digits: Path, tmp_path: Path) -> None:
    seen = kill_at_random(digits, tmp_path, count=4, seed=3)
    assert seen.get("resumed", 0) >= 1, seen


def test_any_number_of_ranks_goes_on_with_the_same_losses(digits: Path, tmp_path: Path) -> None:
    """4 -> 2 -> 1 -> 4 -> 3 -> 8 ranks, with other stages, micro-batches and accumulation on the way."""
    whole = words("training.batch=24", "training.steps=30", "training.validate_every=0", "checkpoint.every=100")
    run = tmp_path / "run"
    ways = [
        (4, 5, "zero3", "micro_batch=6"),
        (2, 10, "zero1", "micro_batch=6"),
        (1, 15, "zero0", "micro_batch=12"),
        (4, 20, "zero2", "micro_batch=3"),
        (3, 25, "zero3", "micro_batch=4"),
        (8, 30, "zero3", "micro_batch=3"),
    ]
    for world, end, stage, micro_batch in ways:
        more = words(f"training.stop_at={end}", f"training.{micro_batch}")
        text = run_to_its_end(pretrain(digits, run, *whole, *more, "--ds", stage), world, tmp_path, limit=180)
        assert f"= {world} ranks x" in text
    run_to_its_end(pretrain(digits, tmp_path / "unbroken", *whole, "--ds", "zero0"), 1, tmp_path)
    seen, expected = losses(run), losses(tmp_path / "unbroken")
    assert seen.keys() == expected.keys() == set(range(1, 31))
    assert [seen[s] for s in seen] == pytest.approx([expected[s] for s in seen], rel=1e-5)


@pytest.mark.parametrize(
    ("fault", "doing"),
    [(("stuck-loader", 1, 10), "loading data"), (("stuck-evaluation", 1, 12), "loading validation data")],
    ids=["loader", "evaluation"],
)
def test_a_stuck_rank_is_named_and_the_run_goes_on_when_started_again(
    digits: Path, tmp_path: Path, fault: tuple[str, int, int], doing: str
) -> None:
    run = tmp_path / "run"
    with ranks(pretrain(digits, run, *SHORT, *WATCHED), 2, tmp_path, fault) as running:
        running.until((run / f"struck-{fault[0]}").exists)
        began = time.monotonic()
        assert running.wait() == [1, 1]
        assert time.monotonic() - began < TIMEOUT + 10
        assert f"rank 1 (process {running.processes[1].pid} on " in running.everything()
        assert f"is stuck {doing} at step {fault[2]}" in running.everything()
    for rank in range(2):
        assert "most recent call first" in (run / f"log.rank0000{rank}.txt").read_text()
    assert "in hang" in (run / "log.rank00001.txt").read_text()
    text = run_to_its_end(pretrain(digits, run, *SHORT, *WATCHED), 2, tmp_path, fault)
    assert "resumed from" in text
    assert sorted(losses(run)) == list(range(1, 25))


def test_a_stopped_rank_is_named_and_the_launcher_starts_the_run_again(digits: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--max-restarts=2", "-m", "igpt_ds", "--"]
    length = [*words("training.steps=4000", "training.validate_every=0", "checkpoint.every=5"), *ZERO_3]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, *pretrain(digits, run, *length, *WATCHED)],
            env=quick_start(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(whole_steps(run)) > 0 and (run / "heartbeats" / "rank-00001.json").exists(), output)
        (victim,) = [pid for pid in descendants(process.pid) if rank_of(pid) == "1"]
        kill_pid(victim, signal.SIGSTOP)
        began = time.monotonic()
        wait_for(lambda: any(rank_of(pid) == "1" for pid in descendants(process.pid) if pid != victim), output)
        took = time.monotonic() - began
        assert f"rank 1 (process {victim} on " in output.read_text()
        assert took < TIMEOUT + 10, f"{took:.1f} s"
        wait_for(lambda: "resumed from" in output.read_text(), output)
        (run / "STOP").touch()  # and a person ends it
        assert process.wait(60) == 0, output.read_text()
        assert "stopped by the file STOP" in output.read_text()
        assert not (run / "STOP").exists()
    finally:
        family = descendants(process.pid)
        kill_group(process)
        for pid in family:
            kill_pid(pid, signal.SIGKILL)


def wait_for(happened: Callable[[], bool], output: Path) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


def rank_of(pid: int) -> str | None:
    """The RANK of a training process, by its environment; None for other processes."""
    try:
        if b"pretrain" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")]
    return found[0] if found else None


def kill_pid(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def test_a_non_finite_step_is_skipped_on_all_ranks(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_to_its_end(pretrain(digits, run, *SHORT), 2, tmp_path, ("nan", 1, 9))
    (event,) = events(run, "skipped")
    assert event["step"] == 10
    seen = losses(run)
    assert sorted(seen) == [step for step in range(1, 25) if step != 10]
    assert all(math.isfinite(loss) for loss in seen.values())
    assert Checkpoint.open(list_checkpoints(run / "checkpoints")[-1]).progress["updates"] == 23
    assert events(run, "rollback") == []


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_bad_batches_in_a_row_are_left_out_after_a_rollback(digits: Path, tmp_path: Path, kind: str) -> None:
    length = words("training.steps=60", "training.validate_every=0", "checkpoint.every=5")
    bad = (f"{kind}:4", 0, 33)  # batches 33 to 36, so steps 34 to 37
    run = tmp_path / "run"
    run_to_its_end(pretrain(digits, run, *length), 1, tmp_path, bad)
    (event,) = events(run, "rollback")
    # Steps 34, 35 and 36 are one too many. The newest checkpoint from before is that of step 30; the batches of the
    # three bad steps and of three steps before them are left out.
    assert (event["step"], event["left_out"]) == (30, [30, 36])
    # The fourth bad batch comes alone now: passed over, without a second rollback.
    last = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == 60
    assert last.progress["left_out"] == [[30, 36]]
    # A run that was killed after the rollback, and one that was stopped after it, have decided the same.
    again = tmp_path / "again"
    with ranks(pretrain(digits, again, *length), 1, tmp_path, bad) as running:
        running.until(lambda: (again / "metrics.jsonl").exists() and len(events(again, "rollback")) > 0)
    run_to_its_end(pretrain(digits, again, *length, *words("training.stop_at=50")), 1, tmp_path, bad)
    run_to_its_end(pretrain(digits, again, *length), 1, tmp_path, bad)
    assert losses(again) == losses(run)
    assert events(again, "rollback") == [event]


def test_a_rate_that_is_too_high_ends_with_advice(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    length = words("training.steps=80", "training.validate_every=0", "checkpoint.every=5")
    more = words("health.max_rollbacks=2")
    with ranks(pretrain(digits, run, *length, *more), 1, tmp_path, ("spike:1000", 0, 33)) as running:
        assert running.wait() == [1]
        last = running.text().strip().splitlines()[-1]
    assert "after 2 rollbacks to step 30: lower training.learning_rate" in last
    assert len(events(run, "rollback")) == 2
    assert whole_steps(run)[-1] == 30


def test_a_full_disk_costs_checkpoints_but_not_the_run(small_disk: Path, digits: Path, tmp_path: Path) -> None:
    run, output, filler = small_disk / "run", tmp_path / "output.txt", small_disk / "filler"
    length = words("training.steps=100000", "training.validate_every=0", "checkpoint.every=40", "checkpoint.keep=1")
    with started(pretrain(digits, run, *length, *words("checkpoint.max_failures=1000")), output) as process:
        wait_for(lambda: len(whole_steps(run)) > 0, output)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(512))
        before = whole_steps(run)
        wait_for(lambda: output.read_text().count("going on without this checkpoint") >= 2, output)
        assert before[-1] in whole_steps(run) or whole_steps(run)[-1] > before[-1]
        assert process.poll() is None
        filler.unlink()
        last = whole_steps(run)[-1]
        wait_for(lambda: whole_steps(run)[-1:] > [last + 40], output)
        (run / "STOP").touch()
        assert finish(process, output) == 0, output.read_text()
    steps = sorted(losses(run))
    assert steps == list(range(1, steps[-1] + 1)), "lines that found no room were written later"


@pytest.mark.skipif(shutil.which("chattr") is None, reason="no chattr here (apt install e2fsprogs)")
def test_a_run_directory_that_becomes_read_only_ends_the_run_clearly(digits: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    folders = [str(run), str(run / "checkpoints")]
    length = words("training.steps=100000", "training.validate_every=0", "checkpoint.every=20", "checkpoint.keep=1")
    with started(pretrain(digits, run, *length), output) as process:
        wait_for(lambda: len(whole_steps(run)) > 0, output)
        try:
            # Even for root, and while files in it are open for writing.
            if subprocess.run(["chattr", "+i", *folders], capture_output=True, check=False).returncode:
                pytest.skip("a folder cannot be made immutable here")
            assert finish(process, output) == 2, output.read_text()
            assert whole_steps(run)
        finally:
            subprocess.run(["chattr", "-i", *folders], capture_output=True, check=False)
    last = output.read_text().strip().splitlines()[-1]
    assert "cannot write: not permitted" in last and "3 saves in a row failed" in last


def test_a_save_file_saves_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    length = words("training.steps=100000", "training.validate_every=0", "checkpoint.every=100000")
    with started(pretrain(digits, run, *length), output) as process:
        wait_for(lambda: "  loss " in output.read_text(), output)
        (run / "SAVE").touch()
        wait_for(lambda: len(whole_steps(run)) == 1, output)
        assert not (run / "SAVE").exists()
        saved = whole_steps(run)[0]
        wait_for(lambda: max(losses(run)) > saved + 5, output)
        (run / "STOP").touch()
        assert finish(process, output) == 0, output.read_text()
    assert whole_steps(run)[-1] == max(losses(run))


def test_a_vanished_shard_ends_the_run_and_what_was_saved_stands(digits: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, data)
    length = [*words("training.steps=100000", "training.validate_every=0", "checkpoint.every=5"), *ZERO_3]
    with ranks(pretrain(data, run, *length), 2, tmp_path) as running:
        running.until(lambda: len(whole_steps(run)) > 0)
        shard = data / "train" / "train-00000.tar"
        content = bytearray(shard.read_bytes())
        shard.write_bytes(content[:2000])
        codes = running.wait()
        assert 2 in codes and 0 not in codes, codes
        assert "damaged shard" in running.everything()
    saved = whole_steps(run)
    assert saved
    shard.write_bytes(content)
    more = words(f"training.stop_at={saved[-1] + 20}")
    assert "resumed from" in run_to_its_end(pretrain(data, run, *length, *more), 2, tmp_path)


def test_what_may_differ_is_named_by_allow_change(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_to_its_end(pretrain(digits, run, *SHORT, *words("training.stop_at=4")), 1, tmp_path)
    other = [*pretrain(digits, run, *SHORT), *words("training.batch=8")]
    for arguments, told in (
        (other, "batch was 16, but now is 8: restore it, add --allow-change batch, or choose another RUN"),
        ([*other, "--allow-change", "model"], "--allow-change model: not possible"),
    ):
        with ranks(arguments, 1, tmp_path) as running:
            assert running.wait() == [2]
            assert told in running.text()
    text = run_to_its_end([*other, "--allow-change", "batch"], 1, tmp_path)
    assert "resumed from" in text and "8 = 1 ranks x 8 x 1" in text
