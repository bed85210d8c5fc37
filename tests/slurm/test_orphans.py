"""Ranks whose step's daemon was killed, as by the kernel when memory runs out, do not train on."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.slurm.conftest import TRAINING, Slurm, rank_processes, reached

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_ranks_end_with_their_step(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = {"DATA": str(digits), "RUN": str(run), "MAX_RESTARTS": "0"}
    long = [*TRAINING, "--set", "training.steps=100000"]
    job = slurm.submit(tmp_path / "log.txt", ["slurm/pretrain_xl.sh", *long], where)
    job.until(lambda: reached(run) > 0)
    ranks = list(rank_processes(run).values())
    assert len(ranks) == 2
    for pid in ranks:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert Path(f"/proc/{parent}/cmdline").read_text().startswith("slurmstepd")
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    job.until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in ranks))
