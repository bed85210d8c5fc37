"""slurm/pretrain_xl.sh through what happens on a cluster: two nodes, notices, preemption, a power cut, crashes."""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.ranks import losses
from tests.slurm.conftest import STEPS, TRAINING, Job, Slurm, environment_of, held, noticed, rank_processes, reached

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def submit(slurm: Slurm, digits: Path, folder: Path, more: dict[str, str] | None = None) -> tuple[Job, Path]:
    run = folder / "run"
    environment = {"DATA": str(digits), "RUN": str(run), **(more or {})}
    return slurm.submit(folder / "log.txt", ["slurm/pretrain_xl.sh", *TRAINING], environment), run


def check_ranks(job: Job, processes: dict[str, int]) -> None:
    """Two ranks train, each on a node of its own, and meet on the first."""
    nodes = job.nodes
    assert len(nodes) == len(processes) == 2
    assert len({Path(f"/proc/{pid}/ns/uts").readlink() for pid in processes.values()}) == 2
    assert {environment_of(pid)["MASTER_ADDR"] for pid in processes.values()} == {nodes[0]}


def ended_well(job: Job, run: Path, unbroken: dict[int, float], restarts: int) -> None:
    """The job is done, and nobody can tell from the losses what it went through."""
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == job.log.count("resumed from") == restarts, job.log
    assert losses(run) == unbroken
    assert sorted(unbroken) == list(range(1, STEPS + 1))


def test_two_nodes_train_to_the_end(slurm: Slurm, digits: Path, tmp_path: Path, unbroken: dict[int, float]) -> None:
    job, run = submit(slurm, digits, tmp_path)
    with held(job, run) as processes:
        check_ranks(job, processes)
    ended_well(job, run, unbroken, restarts=0)
    assert "16 = 2 ranks x 8 x 1" in job.log
    assert not list(run.glob(".outcome*"))


def test_a_notice_and_a_job_of_higher_priority_are_survived(
    slurm: Slurm, digits: Path, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    job, run = submit(slurm, digits, tmp_path)
    with held(job, run) as processes:
        job.notify()
        job.until(lambda: all(noticed(pid) for pid in processes.values()))
    job.until(lambda: job.restarts == 1)
    saved = reached(run)
    assert saved < STEPS
    assert f"stopped by SIGUSR1 after step {saved};" in job.log

    with held(job, run, beyond=saved) as processes:
        assert f"at step {saved}\n" in job.log
        all_nodes = ["--partition=urgent", "--exclusive", "--wrap=sleep 1"]
        urgent = slurm.submit(tmp_path / "urgent.txt", all_nodes, nodes=3)
        job.until(lambda: all(noticed(pid) for pid in processes.values()))
    assert urgent.end() == "COMPLETED"
    assert job.restarts == 2
    saved = reached(run)
    assert f"stopped by SIGUSR1 after step {saved};" in job.log

    ended_well(job, run, unbroken, restarts=2)
    assert f"at step {saved}\n" in job.log


def test_after_a_power_cut_another_node_takes_over(
    slurm: Slurm, digits: Path, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    job, run = submit(slurm, digits, tmp_path)
    with held(job, run) as processes:
        first = job.nodes[0]  # where the job's script runs, too
        slurm.cluster("kill_node", first.removeprefix("node"))
        assert not Path(f"/proc/{processes['0']}").exists()
    # Slurm would see it after SlurmdTimeout, and some more.
    slurm.call("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=power")
    job.until(lambda: job.restarts == 1)
    assert reached(run) < STEPS
    job.until(lambda: "resumed from" in job.log)
    check_ranks(job, rank_processes(run))
    assert first not in job.nodes
    ended_well(job, run, unbroken, restarts=1)


def test_crashes_are_restarted_until_there_is_no_progress_and_a_person_goes_on(
    slurm: Slurm, digits: Path, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    # Every Python process imports this module first: while `crash` is there, rank 1 dies whenever it is started.
    crash = tmp_path / "crash"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal\n"
        f"if os.environ.get('RANK') == '1' and pathlib.Path({str(crash)!r}).exists():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(tmp_path), slurm.environment["PYTHONPATH"]])
    job, run = submit(slurm, digits, tmp_path, {"MAX_RESTARTS": "2", "PYTHONPATH": path})
    with held(job, run) as processes:
        crash.touch()
        os.kill(processes["1"], signal.SIGKILL)
    assert job.end() == "FAILED"
    assert job.restarts == 2, job.log
    newest = max(path.name for path in (run / "checkpoints").glob("step-*"))
    told = [line for line in job.log.splitlines() if line.startswith(("crashed", "gave up"))]
    assert told == [
        f"crashed (the newest checkpoint: {newest}): restart 1 of 2 without a new one",
        f"crashed (the newest checkpoint: {newest}): restart 2 of 2 without a new one",
        f"gave up: 2 restarts without a new checkpoint (the newest: {newest}); see {run}/log.rank*.txt",
    ], job.log
    assert job.log.strip().splitlines()[-1] == told[-1]

    # Mended and submitted again, it goes on; and the file STOP ends it for good.
    crash.unlink()
    job, run = submit(slurm, digits, tmp_path)
    job.until(lambda: "resumed from" in job.log)
    (run / "STOP").touch()
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 0
    assert "stopped by the file STOP" in job.log
    seen = losses(run)
    assert int(newest.removeprefix("step-")) < len(seen) < STEPS
    assert seen == {step: loss for step, loss in unbroken.items() if step <= len(seen)}


def test_bad_input_ends_the_job_at_once(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    job, _run = submit(slurm, digits, tmp_path, {"PRESET": "nope"})
    assert job.end() == "FAILED"
    assert job.restarts == 0
    assert "igpt-ds: preset nope: there is none" in job.log
    assert "crashed" not in job.log and "gave up" not in job.log
