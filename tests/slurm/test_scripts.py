"""The job scripts other than the pre-training's, and the headers of all."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from igpt_ds.config.file import load_config
from tests.faults.ranks import losses
from tests.helpers.ranks import ROOT
from tests.slurm.conftest import TRAINING, Job, Slurm, reached

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "env.sh")
FEW = ["--set", "training.stop_at=3"]


def accepts(slurm: Slurm, *words: str) -> str:
    """What Slurm says of a job for 8 nodes of 8 GPUs, which it does not start; "" if it refuses."""
    command = ["sbatch", "--test-only", "--partition=wide", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stderr if done.returncode == 0 else ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_header_is_valid(slurm: Slurm, name: str) -> None:
    assert accepts(slurm, f"slurm/{name}")
    # It is understood, too: an eighth more than the script asks for is more than there is.
    if name == "pretrain_xl.sh":
        assert "using 512 processors on nodes wide[1-8]" in accepts(slurm, f"slurm/{name}")
        for more in ("--nodes=9", "--gpus-per-node=9", "--cpus-per-task=9"):
            assert not accepts(slurm, more, f"slurm/{name}"), more


def test_a_sweep_trains_with_each_rate_and_a_run_is_probed_and_fine_tuned(
    slurm: Slurm, digits: Path, tmp_path: Path
) -> None:
    where = {"DATA": str(digits), "RUN": str(tmp_path / "runs"), "RATES": "0.003 0.001"}
    command = ["--array=0-2", "slurm/sweep_lr.sh", *TRAINING, *FEW]
    number = slurm.submit(tmp_path / "log-%a.txt", command, where, nodes=1).number
    jobs = [Job(slurm, f"{number}_{task}", tmp_path / f"log-{task}.txt") for task in range(3)]
    assert [job.end() for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED"], [job.log for job in jobs]
    assert "the array has more tasks than RATES has rates" in jobs[2].log
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lr-0.001", "lr-0.003"]
    for rate in ("0.001", "0.003"):
        run = tmp_path / "runs" / f"lr-{rate}"
        assert reached(run) == 3
        assert load_config(run / "config.toml").training.learning_rate == float(rate)

    run, tuned = tmp_path / "runs" / "lr-0.003", tmp_path / "tuned"
    where = {"DATA": str(digits), "RUN": str(run)}
    probe = slurm.submit(tmp_path / "probe.txt", ["slurm/probe.sh", "--images", "60"], where, nodes=1)
    if "finetune.sh" in SCRIPTS:
        where = {"DATA": str(digits), "FROM": str(run), "RUN": str(tuned)}
        finetune = slurm.submit(tmp_path / "tuned.txt", ["slurm/finetune.sh", *FEW], where, nodes=1)
        assert finetune.end() == "COMPLETED", finetune.log
        assert reached(tuned) == 3
    assert probe.end() == "COMPLETED", probe.log
    assert json.loads((run / "probe.json").read_text())
    assert (run / "probe.png").exists()


def test_an_array_builds_shards_that_are_merged_and_trained_on(
    slurm: Slurm, digits: Path, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    """Three kinds of jobs, submitted at once; each waits for those before it."""
    out, run = tmp_path / "data", tmp_path / "run"
    images = {"SOURCE": "image_folder", "IMAGES": str(digits.parent / "images")}
    where = {"PALETTE": str(digits.parent / "palette.npy"), "OUT": str(out), "PARTITION": "main"}
    size = {"TIME": "30", "CPUS": "1", "MEM": "500M"}
    options = ["--no-crop", "--resolution", "8", "--holdout", "0.1"]
    told = slurm.call("bash", "slurm/build_shards.sh", *options, **images, **where, **size)
    found = re.search(r"2 of 2 slices are not built yet: jobs (\d+), (\d+);", told)
    assert found, told
    builders, merger = found.groups()
    after = [f"--dependency=afterok:{merger}", "--kill-on-invalid-dep=yes"]
    command = [*after, "slurm/pretrain_xl.sh", *TRAINING, *FEW]
    training = slurm.submit(tmp_path / "log.txt", command, {"DATA": str(out), "RUN": str(run)})
    ended = training.end()
    logs = [path.read_text() for path in (out / "jobs").glob("*.err")]
    assert ended == "COMPLETED", [training.log, *logs]
    for number in (f"{builders}_0", f"{builders}_1", merger):
        assert Job(slurm, number, tmp_path).state == "COMPLETED"
    for path in sorted(digits.glob("*/*.tar")) + sorted(digits.glob("*/manifest.json")):
        assert (out / path.relative_to(digits)).read_bytes() == path.read_bytes()
    assert losses(run) == {step: unbroken[step] for step in (1, 2, 3)}
