"""slurm/env.sh: when a job is started again. The ranks are a few lines here, and the jobs run at the same time."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import Job, Slurm

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

HEAD = """#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail
source slurm/env.sh
"""

CRASHES = """run_ranks bash -c '
  echo life >>"$RUN/lives"
  case $(wc -l <"$RUN/lives") in
    2) mkdir -p "$RUN/checkpoints/step-00000020" ;;
    3) mv "$RUN/checkpoints/step-00000020" "$RUN/checkpoints/step-00000010" ;;
  esac
  exit 1'
"""

# Listens late, saves when it is told to, and has nothing to do in its second life.
HEEDS = """run_ranks python -c '
import os, pathlib, signal, sys, time
def heed(*_):
    pathlib.Path(os.environ["IGPT_OUTCOME"]).write_text("requeue")
    sys.exit()
lives = pathlib.Path(os.environ["RUN"], "lives-" + os.environ["RANK"])
lives.open("a").write("life ")
if lives.read_text() == "life ":
    time.sleep(7)
    signal.signal(signal.SIGUSR1, heed)
    signal.signal(signal.SIGTERM, heed)
    pathlib.Path(os.environ["RUN"], "listens").touch()
    time.sleep(600)
'
"""

Jobs = dict[str, tuple[Job, Path]]


@pytest.fixture(scope="module")
def jobs(running_cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Name -> job and run directory."""
    folder = tmp_path_factory.mktemp("env")
    submitted: Jobs = {}
    for name, script, options in (
        ("noticed early", HEEDS, []),
        ("noticed by the clock", HEEDS, ["--time=1"]),
        ("cancelled", HEEDS, []),
        ("crashing", CRASHES, ["--nodes=1"]),
    ):
        run, job_script = folder / name.replace(" ", "-"), folder / f"{name}.sh"
        job_script.write_text(HEAD + script)
        environment = {"RUN": str(run), "MAX_RESTARTS": "1"}
        job = running_cluster.submit(folder / f"{name}.txt", [*options, str(job_script)], environment)
        submitted[name] = job, run
    early, run = submitted["noticed early"]
    early.until(run.exists)
    for _ in range(10):
        early.notify()
        time.sleep(0.05)
    yield submitted
    running_cluster.tidy()


def test_only_a_new_checkpoint_allows_further_restarts(jobs: Jobs) -> None:
    job, run = jobs["crashing"]
    assert job.end() == "FAILED"
    told = [line for line in job.log.splitlines() if line.startswith(("crashed", "gave up"))]
    assert told == [
        "crashed (the newest checkpoint: none): restart 1 of 1 without a new one",
        "crashed (the newest checkpoint: step-00000020): restart 1 of 1 without a new one",
        f"gave up: 1 restarts without a new checkpoint (the newest: step-00000010); see {run}/log.rank*.txt",
    ], job.log
    assert job.restarts == 2, job.log


def test_a_job_that_a_person_cancels_does_not_come_back(jobs: Jobs) -> None:
    job, run = jobs["cancelled"]
    job.until((run / "listens").exists)
    job.slurm.call("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert "cancelled: not requeued" in job.log
    assert job.restarts == 0


@pytest.mark.parametrize("name", ["noticed early", "noticed by the clock"])
def test_a_notice_is_heeded_once_the_ranks_listen(jobs: Jobs, name: str) -> None:
    job, run = jobs[name]
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1, job.log
    assert "crashed" not in job.log
    assert [(run / f"lives-{rank}").read_text() for rank in range(2)] == ["life life "] * 2
