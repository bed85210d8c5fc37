"""The benchmarks for a GPU, rehearsed on the CPU: they must not fail on the day that a GPU is at hand."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_xl
from igpt_ds.commands.rehearse import rehearse
from igpt_ds.config.file import load_config
from igpt_ds.planner.choose import Here
from tests.helpers.models import CAN_COMPILE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def rehearsed(*words: str) -> str:
    """What `python -m benchmarks...` prints."""
    run = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_smoke_test() -> None:
    assert "all is well" in rehearsed("benchmarks.gpu_smoke")


def test_the_sweep_and_the_bare_loop() -> None:
    printed = rehearsed("benchmarks.gpu_xl", "--preset", "tiny", "--micro-batch", "2")
    rows = re.findall(r"micro-batch +2  (\S+) +(\S+) +[\d.]+ s", printed)
    kept = ["full", "selective", "none"]  # from the least memory to the most
    assert rows == [(each, how) for how in ("eager", "compiled")[: 1 + CAN_COMPILE] for each in kept]
    assert re.search(r"best: .*bare loop [\d.]+ s; bare / ours [\d.]+", printed)


def test_what_does_not_fit_is_told_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Here("NVIDIA H100 80GB HBM3", 79 * 2**30, gpu=True, bf16=True, ranks=1, ranks_per_node=1)
    monkeypatch.setattr(gpu, "here", lambda: card)
    monkeypatch.setattr(gpu_xl, "bytes_per_rank", lambda layout, gpu: SimpleNamespace(total=115 * 2**30))
    assert gpu_xl.sweep("s", [1, 2]) == {"setting": None}
    assert "micro-batch 2: at least 115.0 GiB are planned, left out" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "here", lambda: replace(card, memory=2**30))
    assert gpu_xl.sweep("xl", [1]) == {"setting": None}
    assert re.search(r"xl does not fit .*: it takes at least [\d.]+ GiB a rank .*: left out", capsys.readouterr().out)


def test_the_rank_that_is_rehearsed_in_place_of_what_does_not_fit_can_be_asked_for() -> None:
    verb, *words = shlex.split(gpu_xl.REHEARSAL)
    assert verb == "rehearse"
    context = rehearse.make_context("rehearse", words)
    assert (context.params["nodes"], context.params["gpus_per_node"]) == (8, 8)
    config = load_config(context.params["preset"], context.params["overrides"])
    assert (config.sequence_length, config.palette_size) == (4096, 512)


def test_what_of_a_preset_fits_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # iGPT-L in bfloat16 on a card of 40 GiB.
    card = Here("NVIDIA A100-SXM4-40GB", int(39.5 * 2**30), gpu=True, bf16=True, ranks=1, ranks_per_node=1)
    monkeypatch.setattr(gpu, "CUDA", True)
    monkeypatch.setattr(gpu, "here", lambda: card)
    decision = gpu_xl.decided("l")
    settings = gpu_xl.settings_that_fit(decision, [4, 8, 512])
    sizes = [gpu_xl.planned_bytes(decision, setting) for setting in settings]
    assert max(sizes) <= gpu_xl.USABLE * card.memory
    assert {setting.micro_batch for setting in settings} == {4, 8}
    assert "micro-batch 512: at least" in capsys.readouterr().out
    for images in (4, 8):
        least, *others = [s.checkpointing for s in settings if (s.micro_batch, s.compiled) == (images, True)][::-1]
        assert set(others) <= {"selective", "full"}
        before = gpu_xl.KEPT[: gpu_xl.KEPT.index(least)]
        assert all(
            gpu_xl.planned_bytes(decision, gpu_xl.Setting(images, kept, True)) > gpu_xl.USABLE * card.memory
            for kept in before
        )


def test_the_harness_against_a_loop_of_ones_own() -> None:
    printed = rehearsed("benchmarks.gpu_one", "--preset", "tiny")
    assert len(re.findall(r"round \d: ours [\d.]+ s, bare [\d.]+ s a step", printed)) == 2
    assert re.search(r"bare / ours [\d.]+ +target at least 0.97", printed)


@pytest.mark.parametrize(
    ("chosen", "ran", "dtype", "fault"),
    [
        ("EFFICIENT_ATTENTION", "efficient_attention", torch.float32, None),
        ("FLASH_ATTENTION", "flash_attention_for_cpu", torch.float32, None),
        ("CUDNN_ATTENTION", "cudnn_attention", torch.bfloat16, None),
        (
            "EFFICIENT_ATTENTION",
            "efficient_attention",
            torch.bfloat16,
            "not by one of FLASH",
        ),
        ("MATH", "attention_math", torch.float32, "is computed by MATH"),
        ("CUDNN_ATTENTION", "flash_attention", torch.bfloat16, "not as CUDNN_ATTENTION"),
        ("CUDNN_ATTENTION", None, torch.bfloat16, "not as CUDNN_ATTENTION"),
    ],
)
def test_a_kernel_that_falls_back_is_an_error(
    chosen: str, ran: str | None, dtype: torch.dtype, fault: str | None
) -> None:
    module = SimpleNamespace(token_embedding=torch.empty(0, dtype=dtype))
    engine = SimpleNamespace(attention=chosen, module=module)

    def step() -> None:
        if ran is not None:
            with torch.profiler.record_function(f"aten::_scaled_dot_product_{ran}"):
                pass

    with nullcontext() if fault is None else pytest.raises(AssertionError, match=fault):
        assert str(ran) in gpu.require_fused(step, engine)
