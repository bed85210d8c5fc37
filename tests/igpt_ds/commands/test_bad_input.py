"""What a user can get wrong before and while pre-training: one line that names it and the remedy, exit status 2.

Most of it is found before any rank is started and is tested in this process; the rest takes a process each.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt_ds import cli
from igpt_ds.atomic import sha256_file
from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed import device
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.planner.choose import Here
from tests.helpers.commands import finish, pretrain, run_command, started, wait_until
from tests.helpers.machines import CPU, V100
from tests.helpers.models import random_model, save_model, small_config

Refused = Callable[..., str]
DIGITS = small_config(resolution=8, palette_size=16)


def one_line(errors: str) -> str:
    """The message, which must be all of stderr."""
    assert errors.startswith("igpt-ds: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    message = errors.removeprefix("igpt-ds: ").rstrip()
    assert message.count(": ") >= 2, f"not of the form name: what is wrong: what to do: {message}"
    return message


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Call igpt-ds in this process, see it refuse, return its message."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, errors = capsys.readouterr()
        assert (end.value.code, out) == (2, ""), errors
        return one_line(errors)

    yield call
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits to damage."""
    shutil.copytree(digits, tmp_path / "data")
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- data ------------------------------------------------------------------------------------------------------


def test_missing_data(refused: Refused, tmp_path: Path) -> None:
    message = refused(*pretrain(tmp_path / "none", tmp_path / "run"))
    assert message.startswith(f"{tmp_path / 'none'}: no such directory: build it with igpt-data shards")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "pretrain --preset tiny --data DATA --dry-run --ranks 3 --set training.batch=1000000000",
        "pretrain --preset tiny --data DATA --dry-run --nodes 99999999999999999999999",
        "pretrain --preset tiny --data DATA --dry-run --nodes 1000000 --gpus-per-node 1000000",
        f"plan xl --images {'9' * 400}",
        "plan xl --nodes 1000000",
        "plan xl --mfu nan",
        "plan xl --mfu 1e-320",
        "plan xl --interconnect 1e-300",
        f"plan xl --nodes {'9' * 5000}",
        "doctor --wait nan",
        "sweep --share nan --out OUT -- pretrain --preset tiny --data DATA",
        "probe RUN --layers 0-999999999",
        f"probe RUN --layers 0-{'9' * 5000}",
        "probe RUN --batch 99999999999",
        "probe RUN --regularisation nan",
        "probe RUN --regularisation 1e-320",
        "probe RUN --masks 1000000000",
        "probe RUN --solver sgd --iterations 99999999999",
        "probe RUN --concatenate 99999999999999999999999",
        "low-data RUN --labels 99999999999",
        f"low-data RUN --labels 4,{'9' * 5000}",
        "low-data RUN --layer 99999999999999999999999 --labels 4",
        "eval RUN --masks 1000000000",
        f"convert RUN OUT --to hf --max-shard-size {'9' * 400}TB",
    ],
    ids=lambda line: line[:50],
)
def test_a_number_is_bounded_before_anything_is_made_of_it(
    refused: Refused, digits: Path, tmp_path: Path, line: str
) -> None:
    save_model(random_model(DIGITS), DIGITS, tmp_path / "RUN", Palette.load(digits / "train" / "palette.npy").sha256)
    places = {"DATA": str(digits), "RUN": str(tmp_path / "RUN"), "OUT": str(tmp_path / "OUT")}
    words = [places.get(word, word) for word in line.split()]
    before = time.monotonic()
    refused(*words, *(["--data", str(digits)] if words[0] in ("probe", "low-data", "eval") else []))
    assert time.monotonic() - before < 60
    assert not (tmp_path / "OUT").exists() and not (tmp_path / "RUN" / "features").exists()


def test_no_data_named(refused: Refused, tmp_path: Path) -> None:
    message = refused("pretrain", str(tmp_path / "run"), "--preset", "tiny")
    assert "add --data DIR" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_half_built_data(refused: Refused, data: Path, tmp_path: Path, split: str) -> None:
    (data / split / "manifest.json").unlink()
    message = refused(*pretrain(data, tmp_path / "run"))
    assert message.startswith(f"{data / split}: ") and "run igpt-data shards again" in message
    assert not (tmp_path / "run").exists()


def test_shard_cut_short(refused: Refused, data: Path, tmp_path: Path) -> None:
    shard = next((data / "train").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size - 1024)
    message = refused(*pretrain(data, tmp_path / "run"))
    assert message.startswith(f"{shard}: ") and "run igpt-data shards again" in message
    assert not (tmp_path / "run").exists()


def test_data_of_another_resolution(refused: Refused, digits: Path, tmp_path: Path) -> None:
    message = refused("pretrain", str(tmp_path / "run"), "--preset", "s", "--data", str(digits))
    assert message.startswith(f"{digits / 'train'}: resolution is 8, but igpt-s takes 32: choose another preset")
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_palette_size(refused: Refused, digits: Path, tmp_path: Path) -> None:
    message = refused(*pretrain(digits, tmp_path / "run", "--set", "data.palette_size=512"))
    assert message.startswith(f"{digits / 'train'}: palette_size is 16, but tiny takes 512")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_token_beyond_the_palette(data: Path, tmp_path: Path, world: int) -> None:
    """Found while training: the shard has the right size, so that it looks sound until the row is read, by one rank."""
    dataset = Dataset.open(data / "train")
    record = dataset.manifest.shards[0]
    shard = data / "train" / f"{record.name}.tar"
    with shard.open("r+b") as file:
        file.seek(record.token_offset + 20 * 64 * 2)
        file.write(np.array([16], "<u2").tobytes())
    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    with started(pretrain(data, tmp_path / "run"), output, world, errors) as process:
        assert finish(process, output) == 2, errors.read_text()
    if world == 1:
        message = one_line(errors.read_text())
    else:
        (line,) = told_by_ranks(errors)
        message = line.removeprefix("igpt-ds: ").removeprefix("[rank 1] ")
    assert message.startswith(f"{shard}: damaged shard (token 16 at row ")
    assert "beyond the palette of 16" in message and "igpt-data shards" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def told_by_ranks(errors: Path) -> list[str]:
    """What the ranks wrote on stderr, without the launcher's own lines; tracebacks are none of it."""
    text = errors.read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("igpt-ds: ")]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["all ranks", "rank 0"])
def test_of_many_ranks_one_speaks_and_all_end(digits: Path, tmp_path: Path, case: str) -> None:
    """What strikes all ranks, and what rank 0 alone finds while the others wait for it."""
    run = tmp_path / "run"
    data = tmp_path / "none" if case == "all ranks" else digits
    if case == "rank 0":
        (tmp_path / "file").write_text("")
        run = tmp_path / "file" / "run"
    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    with started(pretrain(data, run), output, 2, errors) as process:
        wait_until(lambda: bool(told_by_ranks(errors)), process, errors)
        spoken = time.monotonic()
        assert finish(process, output) == 2, errors.read_text()
        assert time.monotonic() - spoken < 29, "the launcher waited its 30 s for a rank that would not end"
    assert len(told_by_ranks(errors)) == 1, errors.read_text()


# --- configuration ---------------------------------------------------------------------------------------------


def test_unknown_preset(refused: Refused, digits: Path, tmp_path: Path) -> None:
    message = refused("pretrain", str(tmp_path / "run"), "--preset", "xxl", "--data", str(digits))
    assert message.startswith("preset xxl: there is none of this name: choose ") and "xl" in message
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_are_told_together(refused: Refused, digits: Path, tmp_path: Path) -> None:
    wrong = ["--set", "training.step=3", "--set", "model.widht=64", "--set", "training.batch=true"]
    message = refused(*pretrain(digits, tmp_path / "run", *wrong))
    assert "unknown key training.step (nearest: training.steps)" in message
    assert "unknown key model.widht (nearest: model.width)" in message
    assert "training.batch must be int, not True" in message
    assert list(tmp_path.iterdir()) == []


def test_unknown_deepspeed_key(refused: Refused, digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_cliping": 1.0}))
    message = refused(*pretrain(digits, tmp_path / "run", "--ds", str(file)))
    assert message.startswith(f"{file}: unknown key gradient_cliping (nearest: gradient_clipping)")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--presett", "tiny"], ["--set"], ["run", "more"]])
def test_unknown_option(refused: Refused, arguments: list[str]) -> None:
    assert "--help" in refused("pretrain", *arguments)


def test_world_size_that_does_not_divide_the_batch(
    refused: Refused, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    message = refused(*pretrain(digits, tmp_path / "run"))
    assert message.startswith("training.batch=16: 3 ranks cannot share it evenly: start 2 or 4 ranks")
    assert "training.batch=15 or 18" in message
    assert list(tmp_path.iterdir()) == []


def test_micro_batch_that_does_not_divide(refused: Refused, digits: Path, tmp_path: Path) -> None:
    message = refused(*pretrain(digits, tmp_path / "run", "--set", "training.micro_batch=3"))
    assert "set training.micro_batch=2 or 4" in message
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_without_zero(refused: Refused, digits: Path, tmp_path: Path) -> None:
    more = ["--ds", "zero0", "--set", "training.precision=bfloat16"]
    message = refused(*pretrain(digits, tmp_path / "run", *more))
    assert message.startswith("training.precision=bfloat16: needs ZeRO stage 1 to 3: choose ")
    assert list(tmp_path.iterdir()) == []


# --- the run directory -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trained")
    run_command(pretrain(digits, folder / "run", "--set", "training.steps=2"), folder / "output.txt")
    return folder / "run"


def test_no_run_named(refused: Refused, digits: Path) -> None:
    assert "RUN: none is named" in refused("pretrain", "--preset", "tiny", "--data", str(digits))


def test_unwritable_run_directory(refused: Refused, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(*pretrain(digits, tmp_path / "file" / "run"))
    assert message.startswith(f"{tmp_path / 'file' / 'run'}: cannot write: ") and "choose another path" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_fresh_does_not_delete_what_is_no_run(refused: Refused, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years")
    message = refused(*pretrain(digits, tmp_path, "--fresh", "--force"))
    assert message.startswith(f"{tmp_path}: is no run directory") and "choose another RUN" in message
    assert (tmp_path / "thesis.txt").read_text() == "five years"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.width=64", "model was {"),
        ("training.batch=8", "batch was 16, but now is 8"),
        ("objective.name=masked_pixel", "objective was {"),
        ("seed=2", "seed was 1, but now is 2"),
    ],
)
def test_going_on_with_another_job(refused: Refused, digits: Path, trained: Path, change: str, named: str) -> None:
    before = contents(trained)
    message = refused(*pretrain(digits, trained, "--set", change))
    assert message.startswith(f"{trained / 'checkpoints' / 'step-00000002'}: {named}")
    assert "choose another RUN" in message
    assert contents(trained) == before


def rebuild_with(palette: Palette, directory: Path) -> None:
    """Give a dataset another palette of the same size, as building it again with that palette would."""
    palette.save(directory / "palette.npy")
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    manifest["palette"]["sha256"] = palette.sha256
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.load(directory).palette["sha256"] == palette.sha256


@pytest.mark.distributed
def test_going_on_with_another_palette(refused: Refused, data: Path, trained: Path, tmp_path: Path) -> None:
    colours = np.ascontiguousarray(Palette.load(data / "train" / "palette.npy").colours[::-1])
    np.save(tmp_path / "reversed.npy", colours)
    for split in ("train", "val"):
        rebuild_with(Palette.load(tmp_path / "reversed.npy"), data / split)
    before = contents(trained)
    message = refused(*pretrain(data, trained))
    assert message.startswith(f"{trained / 'checkpoints' / 'step-00000002'}: palette_sha256 was ")
    assert "choose another RUN" in message
    assert contents(trained) == before


def test_validation_data_of_another_palette(refused: Refused, data: Path, tmp_path: Path) -> None:
    colours = np.ascontiguousarray(Palette.load(data / "train" / "palette.npy").colours[::-1])
    np.save(tmp_path / "reversed.npy", colours)
    rebuild_with(Palette.load(tmp_path / "reversed.npy"), data / "val")
    message = refused(*pretrain(data, tmp_path / "run"))
    assert message.startswith(f"{data / 'val'}: another palette than {data / 'train'}'s: build both")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_only_damaged_checkpoints(digits: Path, trained: Path, tmp_path: Path) -> None:
    """Beginning anew unasked would hide the loss."""
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    os.truncate(file, 1000)
    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    with started(pretrain(digits, tmp_path / "run"), output, errors=errors) as process:
        assert finish(process, output) == 2, errors.read_text()
    message = one_line(errors.read_text())
    assert message.startswith(f"{tmp_path / 'run' / 'checkpoints'}: ")
    assert "whole" in message and "--fresh --force" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


@pytest.mark.distributed
def test_full_disk(small_disk: Path, digits: Path, tmp_path: Path) -> None:
    run, output, errors = small_disk / "run", tmp_path / "output.txt", tmp_path / "errors.txt"
    often = ["--set", "checkpoint.every=2", "--set", "training.steps=20"]
    with started(pretrain(digits, run, *often), output, errors=errors) as process:
        assert finish(process, output) == 2, errors.read_text()
    message = one_line(errors.read_text())
    assert message.startswith(f"{run}/")
    assert "cannot write: the disk is full: free space or choose another disk (3 saves in a row failed" in message
    left = list_checkpoints(run / "checkpoints")
    assert [path.name for path in left] == ["step-00000002", "step-00000004"]
    for path in left:
        opened = Checkpoint.open(path)
        for name, facts in opened.files.items():
            assert sha256_file(path / name) == facts["sha256"]


@pytest.mark.parametrize(
    ("machine", "precision", "message"),
    [
        (V100, "bfloat16", "Tesla V100-SXM2-32GB does not compute in it: set training.precision=float32"),
        (V100, "tf32", "Tesla V100-SXM2-32GB does not compute in it: set training.precision=float32"),
        (CPU, "tf32", "CPU does not compute in it: set training.precision=float32"),
    ],
)
def test_a_precision_that_the_machine_does_not_compute_in(
    refused: Refused,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: Here,
    precision: str,
    message: str,
) -> None:
    # The GPU is played: the refusal must come before anything is done on it.
    monkeypatch.setattr(device, "at_hand", lambda ranks: machine)
    monkeypatch.setattr(device.torch.cuda, "is_tf32_supported", lambda: False)
    monkeypatch.setattr(Ranks, "join", lambda self, hang_timeout: pytest.fail("joined the process group"))
    found = refused(*pretrain(digits, tmp_path / "run", "--set", f"training.precision={precision}"))
    assert found == f"training.precision={precision}: {message}"
    assert not (tmp_path / "run").exists()


def test_a_network_that_does_not_fit_the_machine(
    refused: Refused, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "at_hand", lambda ranks: replace(CPU, memory=2**18))
    message = refused(*pretrain(digits, tmp_path / "run"))
    assert message.startswith("tiny does not fit CPU: it takes at least ")
    assert message.endswith(": take a machine with more memory, or a smaller network")
    assert not (tmp_path / "run").exists()


def test_a_mask_that_hides_less_than_a_pixel(refused: Refused, digits: Path, tmp_path: Path) -> None:
    sets = ("--set", "objective.name=masked_pixel", "--set", "objective.mask_rate=0.01")
    message = refused(*pretrain(digits, tmp_path / "run", *sets))
    assert message.startswith("objective.mask_rate 0.01: hides less than one of 64 pixels")


def test_compiling_without_what_it_needs(
    refused: Refused, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    message = refused(*pretrain(digits, tmp_path / "run", "--set", "training.compile=true"))
    assert message.startswith("training.compile=true: Python.h and no-such-compiler not found: install ")
    assert not (tmp_path / "run").exists()


def test_weights_are_held_against_the_data_named(refused: Refused, digits: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    message = refused(*pretrain(digits, tmp_path / "run", "--set", "data.weights=[1,2]"))
    assert "data.weights is [1, 2]: give one whole number above 0 for each of 1 sources" in message
    both = ["pretrain", run, "--preset", "tiny", "--data", str(digits), "--data", str(tmp_path / "none")]
    assert "no such directory" in refused(*both, "--set", "data.weights=[1,2]")


def test_environment_that_is_no_number(
    refused: Refused, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert refused(*pretrain(digits, tmp_path / "run")).startswith("WORLD_SIZE: is 'many'")
