"""Activation checkpointing on two ranks under ZeRO-3, eager and compiled: every way trains alike."""

from pathlib import Path

import pytest

from tests.helpers.ranks import recorded
from tests.workers.recomputed import CASES, Recomputed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recomputed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_trains_alike(folder: Path, case: Recomputed) -> None:
    for record in recorded("tests.workers.recomputed", folder, 2, limit=240):
        plain, found = record["none, eager"], record[case.name]
        assert plain["losses"][-1] < plain["losses"][0]
        # What is computed again is the same to the last bit; compiled code may round otherwise.
        closest = 1e-5 if case.compiled else 0
        assert found["losses"] == pytest.approx(plain["losses"], rel=closest, abs=0)
        assert found["norms"] == pytest.approx(plain["norms"], rel=10 * closest, abs=0)
        assert (found["compilations"], found["gaps"]) == (int(case.compiled), 0)
