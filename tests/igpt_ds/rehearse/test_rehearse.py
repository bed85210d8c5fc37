"""The command, as a person calls it: ranks of jobs of 8 and 64 on this processor, and what it refuses."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import load_config
from igpt_ds.config.size import parameter_count
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.rehearse import job
from tests.helpers.commands import call, finish, started, wait_until
from tests.helpers.models import small_config

pytestmark = pytest.mark.timeout(300)
TINY = ["tiny", "--set", "data.resolution=8", "--set", "data.palette_size=512", "--set", "training.batch=64"]
LIMIT = 240.0  # seconds that a command has on a machine that is busy
SMALL = ["s", "--resolution", "8", "--set", "training.batch=64"]
# Blocks are gathered six at a time, and no message ends within a block: in which order the parameters of such a one are
# waited for is chance, and with it whether a message more is held.
SIX = 6 * 12 * 512**2
GATHERED = {"stage3_prefetch_bucket_size": SIX, "stage3_max_live_parameters": 3 * SIX, "stage3_max_reuse_distance": SIX}


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-3 for iGPT-S."""
    tree = load_ds_config("zero3")
    tree["zero_optimization"] |= GATHERED
    path = tmp_path_factory.mktemp("ds") / "even.json"
    path.write_text(json.dumps(tree))
    return path


def left_in(folder: Path) -> list[str]:
    """Names of what lies there, without the cache that torch makes when it is loaded."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("torchinductor"))


def rehearsed(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The record and the text of `igpt-ds rehearse`, and that stderr told of progress."""
    out, err, record = folder / "out", folder / "err", folder / "record.json"
    arguments = ["rehearse", *words, "--steps", "1", "--json", str(record)]
    with started(arguments, out, errors=err) as process:
        status = finish(process, err, LIMIT)
    assert status == 0, err.read_text()
    told = err.read_text().splitlines()
    assert told[1].startswith("building rank") and told[-1].startswith("saving"), told
    assert len(told) == 7, told  # what was decided, the building, four steps, and the save: nothing of libraries
    return json.loads(record.read_text()), out.read_text()


@pytest.mark.parametrize(
    "words",
    [
        [*TINY, "--nodes", "1", "--ds", "zero0"],
        [*TINY, "--nodes", "1", "--ds", "zero2"],
        [*TINY, "--nodes", "8", "--ds", "zero3"],
        [*SMALL, "--nodes", "1", "--ds", "zero2", "--set", "training.batch=16", "--set", "training.micro_batch=1"],
        [*SMALL, "--nodes", "8", "--ds", "zero1"],
        [*SMALL, "--nodes", "8", "--ds", "EVEN"],
    ],
    ids=" ".join,
)
def test_memory_is_within_5_percent_of_the_plan(words: list[str], even: Path, tmp_path: Path) -> None:
    record, text = rehearsed(tmp_path, *(str(even) if word == "EVEN" else word for word in words))
    assert record["measured_over_planned"] == pytest.approx(1, rel=0.05)
    found, planned, ranks = record["bytes"], record["planned_bytes"], record["job"]["ranks"]
    assert found["peak"] / planned["peak"] == record["measured_over_planned"]
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    config, stage = load_config(words[0], [*overrides, "data.resolution=8"]), record["rehearsed"]["zero_stage"]
    # Closed forms, up to what is added to each parameter so that every rank has a part of one size.
    with torch.device("meta"):
        sizes = [p.numel() for p in ImageGPT(config).parameters()]
    count, part, padding = sum(sizes), sum(sizes) / ranks, 4 * len(sizes)
    assert found["parameters"] == pytest.approx(4 * (part if stage == 3 else count), rel=1e-3, abs=padding)
    assert found["master"] == pytest.approx(4 * part if stage else 0, rel=1e-3, abs=padding)
    assert found["moments"] == pytest.approx(8 * (part if stage else count), rel=1e-3, abs=2 * padding)
    # What ZeRO-0 keeps whole is dealt to the ranks. A file has a header of names, and the state of torch's generator.
    saved = 12 * (sum(sizes[ranks - 1 :: ranks]) if stage == 0 else part)
    assert saved <= record["save_bytes"] + 3 * padding <= 1.001 * saved + 3 * padding + 8192 + 512 * len(sizes)
    assert f"Measured / planned: {record['measured_over_planned']:.3f}." in text


def test_the_record_is_of_the_job_and_of_the_rank(tmp_path: Path) -> None:
    words = ["--set", "training.activation_checkpointing=full", "--device", "a100", "--interconnect", "ethernet-100g"]
    record, text = rehearsed(tmp_path, *TINY, "--nodes", "8", "--ds", "zero1", *words)
    job, here, seconds = record["job"], record["rehearsed"], record["seconds"]
    assert (job["ranks"], job["nodes"], job["ranks_per_node"], job["device"]) == (64, 8, 8, "A100")
    assert (job["precision"], here["precision"]) == ("bfloat16", "float32")
    assert (here["device"], here["rank"], here["micro_batch"], here["accumulation"]) == ("CPU", 63, 1, 1)
    assert here["activation_checkpointing"] == "full" and here["compile"] is False
    assert job["fits"] and not job["measured"]
    assert job["step_seconds"] == job["planned_seconds"]["step"] > job["planned_seconds"]["messages"] > 0
    assert seconds["step"] > 0 and seconds["computation"] + seconds["host"] == pytest.approx(seconds["step"])
    assert 0 < seconds["save_pause"] <= seconds["save"] and seconds["build"] > 0
    found, phases = record["bytes"], record["bytes"]["phases"]
    assert found["peak"] == found["stays"] + max(phase["peak"] for phase in phases.values())
    assert list(phases) == ["forward", "backward", "optimizer"]
    assert phases["forward"]["end"] > 4 * 64 * 512  # logits, which wait for the backward pass
    for line in ("rank 63 of 64 on CPU: float32, ZeRO-1, recomputation full", "of one A100, planned, times", "fits"):
        assert line in text
    # Values mean nothing, and none is shown.
    assert "loss" not in text and "loss" not in json.dumps(record) and "norm" not in json.dumps(record)
    assert not list(tmp_path.glob("igpt-rehearse-*"))


def test_json_alone_goes_to_the_standard_output_and_nothing_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    small = ["tiny", "--set", "data.resolution=4", "--set", "data.palette_size=8", "--gpus-per-node", "1"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # Stage 1 in bfloat16 is an optimiser that prints much of its memory.
    words = ["rehearse", *small, "--ds", "zero1", "--set", "training.precision=bfloat16", "--steps", "1"]
    with started([*words, "--json", "-"], out, errors=err) as process:
        assert finish(process, err, LIMIT) == 0, err.read_text()
    record = json.loads(out.read_text())
    assert record["parameters"] == parameter_count(small_config())
    assert record["rehearsed"]["precision"] == "bfloat16" and record["job"]["ranks"] == 1
    assert left_in(tmp_path) == ["err", "out"]


def test_what_takes_too_long_is_given_up_in_a_line(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    # The last of 64 ranks, which does not wait for the others to say what is wrong.
    words = ["rehearse", *TINY, "--nodes", "8", "--ds", "zero1", "--steps", "1000", "--limit", "1"]
    with started(words, out, errors=err) as process:
        assert finish(process, err, LIMIT) == 1
    last = err.read_text().splitlines()[-1]
    assert last.startswith("igpt-ds: --limit: 1 s are over (") and "--resolution" in last
    assert not out.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_save_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out, err = tmp_path / "out", tmp_path / "err"
    # A part of some 0.3 GB, which takes a while to write.
    words = ["rehearse", *SMALL, "--set", "training.batch=1", "--nodes", "1", "--gpus-per-node", "1", "--steps", "1"]
    with started([*words, "--ds", "zero0"], out, errors=err) as process:
        wait_until(lambda: bool(list(tmp_path.glob("igpt-rehearse-*/.*/*"))), process, err)
        process.send_signal(number)
        assert finish(process, err, LIMIT) == 130, err.read_text()
    assert err.read_text().rstrip().splitlines()[-1].startswith("saving") and not out.read_text()
    assert left_in(tmp_path) == ["err", "out"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "preset nothing: there is none of this name"),
        (["tiny"], "rehearse: tiny takes resolution and palette_size from its data: add --set data.resolution=32"),
        (["s", "--set", "finetune.patience=3"], "rehearse: igpt-s takes its classes from its data"),
        (["s", "--nodes", "100"], "caps data parallelism at 128 ranks"),
        (["s", "--ds", "none"], "DeepSpeed configuration none: no such file"),
        (["s", "--device", "abacus"], "device abacus: its data sheet is not here"),
        (["s", "--interconnect", "string"], "interconnect string: unknown"),
        (
            ["s", "--set", "training.sequence_parallel=8", "--resolution", "6", "--gpus-per-node", "8"],
            "--resolution 6: training.sequence_parallel=8 does not divide the 6² positions",
        ),
        (["s", "--resolution", "0"], "Invalid value for '--resolution'"),
        (["s", "--steps", "0"], "Invalid value for '--steps'"),
        (["s", "--limit", "nan"], "Invalid value for '--limit'"),
        (
            ["l", "--nodes", "1", "--ds", "zero0", "--resolution", "8"],
            "GiB of this machine's memory by plan, and 8 GiB are free: rehearse smaller images",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(job, "available_bytes", lambda: 8 << 30)
    assert call(monkeypatch, "rehearse", *words) == 2
    told = capsys.readouterr()
    assert line in told.err and told.err.count("\n") == 1 and not told.out


def test_a_launcher_is_not_for_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert call(monkeypatch, "rehearse", *TINY) == 2
    assert "RANK is set, as a launcher does: one process plays all ranks" in capsys.readouterr().err
    assert "WORLD_SIZE" not in os.environ
