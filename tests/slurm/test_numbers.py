"""slurm/env.sh takes for a number what is one, whoever wrote it. No Slurm is needed: its command is played."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

SCRIPT = """
set -euo pipefail
source slurm/env.sh
requeue() { echo requeued; }
restart_after_crash
"""


def crash(run: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What becomes of a job that crashed."""
    commands = run.parent / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (commands / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "RUN": str(run)}
    return subprocess.run(
        ["bash", "-c", SCRIPT],
        env={"PATH": f"{commands}:/usr/bin:/bin", **slurm, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, whose names sort otherwise than their steps, and what is none."""
    run = tmp_path / "run"
    for name in ("step-99999999", "step-100000000", "step-00000005-before-lr-change", "step-9"):
        (run / "checkpoints" / name).mkdir(parents=True)
    return run


def test_restarts_are_counted_from_the_newest_checkpoint(run: Path) -> None:
    for count in "123":
        told = crash(run).stdout
        assert f"(the newest checkpoint: step-100000000): restart {count} of 3 without a new one\nrequeued\n" in told
    assert crash(run).stdout.startswith("gave up: 3 restarts without a new checkpoint (the newest: step-100000000)")
    (run / "checkpoints" / "step-100000001").mkdir()
    assert "restart 1 of 010" in crash(run, MAX_RESTARTS="010").stdout
    assert (run / ".restarts").read_text() == "step-100000001 1\n"
    (run / ".restarts").write_text("step-100000001 9\n")
    assert "restart 10 of 010" in crash(run, MAX_RESTARTS="010").stdout


@pytest.mark.parametrize(
    "content",
    [
        "x BASH_VERSINFO[$(touch PWN)]",
        "step-00000020 BASH_VERSINFO[$(touch PWN)]",
        "step-BASH_VERSINFO[$(touch${IFS}PWN)] 1",
        "step-100000000 -5",
        "step-100000000 1 2",
        "step-100000000 99999999999999999999",
        "",
        "\0\n",
    ],
)
def test_what_a_file_says_is_never_computed(run: Path, content: str) -> None:
    (run / ".restarts").write_text(content.replace("PWN", str(run / "PWN")))
    done = crash(run)
    assert "restart 1 of 3" in done.stdout and "requeued" in done.stdout, done
    assert f"{run}/.restarts: is no checkpoint and count of restarts: counted anew\n" in done.stderr
    assert not (run / "PWN").exists()
    assert (run / ".restarts").read_text() == "step-100000000 1\n"


def test_a_link_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (run / ".restarts").symlink_to(tmp_path / "precious")
    assert "requeued" in crash(run).stdout
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["MAX_RESTARTS", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"])
@pytest.mark.parametrize("value", ["BASH_VERSINFO[$(touch PWN)]", "-1", "3.5", "many", "9" * 20])
def test_a_variable_that_is_no_number_is_a_line(run: Path, name: str, value: str) -> None:
    done = crash(run, **{name: value.replace("PWN", str(run / "PWN"))})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name} is '") and done.stderr.count("\n") == 1
    assert not (run / "PWN").exists()
