"""The benchmarks for a GPU, rehearsed on the CPU: they must not fail on the day that a GPU is at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import CAN_COMPILE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def rehearsed(*words: str) -> str:
    """What `python -m benchmarks...` prints."""
    run = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_smoke_test() -> None:
    assert "all is well" in rehearsed("benchmarks.gpu_smoke")


def test_the_sweep_and_the_bare_loop() -> None:
    printed = rehearsed("benchmarks.gpu_xl", "--preset", "tiny", "--micro-batch", "2")
    rows = re.findall(r"micro-batch +2  (\S+) +(\S+) +[\d.]+ s", printed)
    assert rows == [(kept, how) for how in ("eager", "compiled")[: 1 + CAN_COMPILE] for kept in ("full", "selective")]
    assert re.search(r"best: .*bare loop [\d.]+ s; bare / ours [\d.]+", printed)
