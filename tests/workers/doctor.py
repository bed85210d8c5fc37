"""Two ranks of the doctor, and what goes wrong on rank 1: `python -m tests.workers.doctor PORT PORT PORT`.

Rank 0 holds the reports against what was done to rank 1; an exit status other than 0 is a failed test.
"""

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

from igpt_ds.distributed.ranks import launched
from igpt_ds.doctor import machine, ranks, speed
from igpt_ds.doctor.examine import examine
from igpt_ds.doctor.inputs import Request
from igpt_ds.doctor.report import Check, table

RATE = {"rate": 100e9, "peak": None, "kind": "float32"}


def checks(port: str, limit: float, hangs: bool = False) -> dict[str, Check]:
    """An examination at a port of its own; rank 0's checks by name, nothing on rank 1."""
    os.environ["MASTER_PORT"] = port
    outcome = examine(Request(), launched(), None, limit)
    assert outcome.hangs == hangs
    if outcome.report is None:
        return {}
    print(table(outcome.report), flush=True)
    assert outcome.report.ranks == 2
    return {check.name: check for check in outcome.report.checks}


def slow_and_late_and_blind(port: str) -> None:
    """Rank 1 multiplies at a fifth of the speed, its clock is 5 s ahead, and it cannot see its cores."""
    if launched().rank == 1:
        speed.matmul = lambda device: RATE | {"rate": 20e9}
        ranks.time = SimpleNamespace(time=lambda: time.time() + 5, monotonic=time.monotonic, sleep=time.sleep)
        machine.read_cores = lambda: 1 / 0
    found = checks(port, 60)
    if found:
        assert found["ranks"].status == "OK"
        assert found["matmul"].status == "FAIL"
        assert "rank 1 (20% of the median)" in found["matmul"].value
        assert "rank 0" not in found["matmul"].value
        assert found["clock_ranks"].status == "WARN"
        assert "rank 1 is 5 s ahead" in found["clock_ranks"].value
        assert found["threads"].status == "FAIL"
        assert "ZeroDivisionError" in found["threads"].value
        assert found["all_reduce"].status == "OK"
        assert "gloo: right" in found["all_reduce"].value


def one_hangs_in_a_collective(port: str) -> None:
    """Rank 1 never gets to the sum in which rank 0 waits for it; both come back and tell."""
    if launched().rank == 1:
        speed.all_reduce = lambda *_: time.sleep(600)
    found = checks(port, 6, hangs=launched().rank == 1)
    if found:
        assert found["all_reduce"].status == "FAIL"
        assert "rank 0" in found["all_reduce"].value  # which waited until gloo gave up
        assert "rank 1" in found["all_reduce"].value
        assert found["ranks"].status == "OK"


def one_does_not_come(port: str) -> None:
    """Rank 1 is not there at all."""
    if launched().rank == 0:
        found = checks(port, 2)
        assert found["ranks"].status == "FAIL"
        assert found["ranks"].value == "rank 1 of 2 missing at the start after 2 s"
        assert found["versions"].status == "OK"  # its own node is looked at all the same


def main(ports: list[str]) -> None:
    fast: Any = lambda device: RATE  # noqa: E731
    speed.matmul = fast
    for case, port in zip((slow_and_late_and_blind, one_hangs_in_a_collective, one_does_not_come), ports, strict=True):
        case(port)


if __name__ == "__main__":
    main(sys.argv[1:])
