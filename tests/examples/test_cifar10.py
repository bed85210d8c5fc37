"""examples/cifar10.sh as it runs for hours, in minutes: other images, a very small network, few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.commands import finish, kill_all

ROOT = Path(__file__).parents[2]
LIMIT = 1500.0  # seconds: some forty commands, on a loaded machine


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """480 cuts of two photographs, 32 x 32, in two classes that a network can tell apart: train/ and test/."""
    for label, photograph in enumerate(load_sample_images().images):
        cuts = photograph[:416, :640].reshape(13, 32, 20, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        for number, cut in enumerate(np.random.default_rng(label).permutation(cuts)[:240]):
            path = tmp_path / "images" / ("train" if number < 190 else "test") / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cut).save(path)
    return tmp_path / "images"


def test_every_part_runs_and_leaves_its_figures(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "SHORT": "1",
        "NETWORKS": "small:2:16:2",
        "SEEDS": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["examples/cifar10.sh", str(images), str(out)]
    output = tmp_path / "output.txt"
    with output.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            assert finish(process, output, LIMIT) == 0, output.read_text()[-3000:]
        finally:
            kill_all(process)
    for name in ("figure2.png", "figure3.png", "figure4.png", "tables.md"):
        assert (out / "paper" / name).stat().st_size > 1000, name
    for run in ("small", "bert"):
        probe = json.loads((out / run / "probe.json").read_text())
        assert len(probe["layers"]) == len(probe["untrained"]) == 3 and probe["test"]["n"] == 100
    for run in ("tuned-4-0", "scratch-4-0", "bert-0-0"):
        assert json.loads((out / run / "result.json").read_text())["n"] == 100
    assert len(list((out / "small").glob("probe-*.json"))) == 2
    table = (out / "paper" / "finetuning.md").read_text()
    assert "| labels per class | 4 | all |" in table and "from BERT, vote of masks" in table
    # All that the pictures are drawn of is kept, and is enough to draw them again.
    subprocess.run(
        [sys.executable, "-m", "igpt_ds", "figures", *sorted((out / "records").iterdir()), "--out", tmp_path / "again"],
        check=True,
        timeout=120,
    )
    assert (tmp_path / "again" / "tables.md").read_text() == (out / "paper" / "tables.md").read_text()
