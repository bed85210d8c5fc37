"""The share of cores: what binds, and that no more threads are started than the work has use for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from igpt_ds import cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores, no Slurm."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_what_binds(machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    groups = {"root": tmp_path, "membership": tmp_path / "membership"}
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    assert [cores.share(n, **groups) for n in (1, 3, 16, 40)] == [16, 5, 1, 1]
    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    assert cores.share(1, **groups) == 16
    (tmp_path / "outer" / "cpu.max").write_text("650000 100000\n")
    assert [cores.share(n, **groups) for n in (1, 2, 8)] == [6, 3, 1]
    old = tmp_path / "cpu" / "job"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job\n4:memory:/elsewhere\n")
    assert cores.share(1, **groups) == 16
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    assert cores.share(1, **groups) == 1
    (old / "cpu.cfs_quota_us").unlink()
    # Slurm's cores are a task's: divided if a launcher starts several ranks within one.
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert [cores.share(n, **groups) for n in (1, 4)] == [8, 2]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert cores.share(4, **groups) == 8


def test_threads_by_the_work(machine: None) -> None:
    assert [cores.threads_for(operations) for operations in (0, 2e6, 3.5e8, 1e15)] == [1, 1, 3, cores.share()]


def test_a_small_regression_takes_one_thread(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_info

    from igpt_ds.features.classifier import Rows, fit

    seen = []
    real = LogisticRegression.fit

    def spied(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> object:
        seen.append({pool["num_threads"] for pool in threadpool_info()})
        return real(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", spied)
    generator = np.random.default_rng(0)
    rows = Rows([(generator.normal(size=(1604, 64)),)], generator.integers(0, 10, 1604))
    assert len(list(fit(rows, (1000.0, 100.0)))) == 2
    assert seen == [{1}, {1}]


def test_torchs_threads_wait_asleep_unless_a_person_says_otherwise() -> None:
    script = (
        "import os, sys\nfrom igpt_ds.cli import main\nsys.argv = ['igpt-ds', '--version']\n"
        "try: main()\nexcept SystemExit: pass\nprint(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )

    def said(**more: str) -> str:
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        command = [sys.executable, "-c", script]
        return subprocess.check_output(command, env=kept | more, text=True, timeout=60).splitlines()[-1]

    assert said() == "1000 False"
    assert said(OMP_WAIT_POLICY="ACTIVE") == "None False"
    assert said(GOMP_SPINCOUNT="7") == "7 False"
