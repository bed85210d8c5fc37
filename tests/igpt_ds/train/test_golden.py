"""The tiny preset's losses, recorded: a change that moves them changes the science.

20 steps in one process, seed 1, on digits built here. They agree within 1e-6 relative and not to the last bit,
since the kernels of torch's matrix products differ between processors and round otherwise. To record them anew
after a change that is meant to move them:

    python -m tests.igpt_ds.train.test_golden
"""

import json
import tempfile
from pathlib import Path

import pytest

from igpt_ds.run.metrics import read_metrics
from tests.helpers.commands import pretrain, run_command

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def losses(data: Path, folder: Path) -> list[float]:
    """Nats a token of steps 1 to 20."""
    run = folder / "run"
    run_command(pretrain(data, run, "--set", "training.steps=20"), folder / "output.txt")
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.distributed
def test_losses_are_the_recorded_ones(digits: Path, tmp_path: Path) -> None:
    recorded = json.loads(GOLDEN.read_text())["losses"]
    assert losses(digits, tmp_path) == pytest.approx(recorded, rel=1e-6, abs=0)


if __name__ == "__main__":
    from tests.conftest import build_digits

    with tempfile.TemporaryDirectory() as here:
        content = {
            "what": "python -m tests.igpt_ds.train.test_golden: preset tiny, 20 steps, seed 1, nats a token",
            "losses": losses(build_digits(Path(here)), Path(here)),
        }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
