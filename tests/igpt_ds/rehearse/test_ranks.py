"""A played rank against a real one: the fake process group changes nothing of what a rank takes."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.ranks import ROOT, quick_start, recorded
from tests.workers.rehearse import NAMES, WORLD

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
Record = dict[str, Any]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What a real rank 0 of two took, by ZeRO stage."""
    found: Record = recorded("tests.workers.rehearse", tmp_path_factory.mktemp("real"), WORLD, limit=400)[0]
    return found


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The same of a played rank."""
    folder = tmp_path_factory.mktemp("played")
    command = [sys.executable, "-m", "tests.workers.rehearse", str(folder), "played"]
    subprocess.run(command, env=quick_start(), cwd=ROOT, check=True, timeout=300)
    (path,) = folder.iterdir()
    found: Record = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_played_rank_takes_what_a_real_one_takes(real: Record, played: Record, name: str) -> None:
    theirs, ours = real[name], played[name]
    assert ours["kinds"] == theirs["kinds"]
    assert ours["part"] == pytest.approx(theirs["part"], rel=0.01)  # a header of file names and numbers
    assert ours["stays"] == pytest.approx(theirs["stays"], rel=0.005)
    assert ours["peak"] == pytest.approx(theirs["peak"], rel=0.02)
    if name != "zero3":  # whose gradients gloo reduces in copies of its own
        for phase in ("forward", "backward"):
            assert ours["phases"][phase]["peak"] == pytest.approx(theirs["phases"][phase]["peak"], rel=0.02), phase
