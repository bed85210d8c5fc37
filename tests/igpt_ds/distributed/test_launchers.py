"""The same run by every launcher gives the same losses; srun's turn is in tests/slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.ranks import losses, run_to_its_end
from tests.helpers.commands import kill_all, pretrain
from tests.helpers.ranks import free_port, quick_start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

LENGTH = ["--set", "training.steps=8", "--set", "training.validate_every=0"]


@pytest.fixture(scope="module")
def by_hand(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of two ranks that no launcher started."""
    folder = tmp_path_factory.mktemp("by_hand")
    run_to_its_end(pretrain(digits, folder / "run", *LENGTH), 2, folder)
    return losses(folder / "run")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_losses_are_those_of_ranks_started_by_hand(
    digits: Path, tmp_path: Path, by_hand: dict[int, float], launcher: str
) -> None:
    port = str(free_port())
    words = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "igpt_ds"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port, "-m", "igpt_ds", "--"],
        "accelerate": [
            *("accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port", port),
            *("--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no", "-m", "igpt_ds"),
        ],
    }[launcher]
    program = str(Path(sys.executable).with_name(words[0]))
    environment = {**quick_start(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [program, *words[1:], *pretrain(digits, tmp_path / "run", *LENGTH)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert process.wait(200) == 0, output.read_text(errors="replace")
    finally:
        kill_all(process)
    assert losses(tmp_path / "run") == by_hand
    assert "= 2 ranks x" in output.read_text()
