"""Weights of any format as a beginning and as a subject: pretrain --from, finetune --from, the evaluations."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds import cli
from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.file import load_config
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.features.extract import load_model
from igpt_ds.run.metrics import read_metrics
from igpt_ds.weights.base import at_resolution, config_of, resize_positions
from igpt_ds.weights.convert import convert
from igpt_ds.weights.formats import open_weights
from tests.helpers.commands import run_command
from tests.helpers.hub import commit_of, hub
from tests.helpers.models import random_model, save_model, small_config
from tests.igpt_ds.loading.test_loader import build

FORMATS = ("run", "single", "hf", "out.npz", "native")


@pytest.fixture(scope="module")
def sources(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small network in each format; and small/, one for 4 x 4 pixels."""
    folder = tmp_path_factory.mktemp("sources")
    palette = Palette.load(digits / "train" / "palette.npy")
    for name, resolution in (("run", 8), ("small", 4)):
        config = small_config("seed=3", resolution=resolution, palette_size=16)
        save_model(random_model(config), config, folder / name, palette.sha256)
        palette.save(folder / name / "palette.npy")
    for name, target in (("single", "safetensors"), ("hf", "hf"), ("out.npz", "npz"), ("native", "native")):
        convert(folder / "run", folder / name, target)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """Run igpt-ds in this process: exit status, stdout, stderr with the log, which stands there without a handler."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, errors = capsys.readouterr()
        log = "".join(f"{message}\n" for message in caplog.messages)
        caplog.clear()
        return status, out, log + errors

    return run


def interpolated(table: np.ndarray, side: int) -> np.ndarray:
    """Bicubic interpolation of a grid to a larger one, one point at a time: Keys' kernel with a = -0.75, as torch's."""
    old = math.isqrt(len(table))
    grid = table.astype(np.float64).reshape(old, old, -1)

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    out = np.zeros((side, side, grid.shape[-1]))
    for y in range(side):
        for x in range(side):
            at_y, at_x = (y + 0.5) * old / side - 0.5, (x + 0.5) * old / side - 0.5
            for j in range(math.floor(at_y) - 1, math.floor(at_y) + 3):
                for i in range(math.floor(at_x) - 1, math.floor(at_x) + 3):
                    value = grid[min(max(j, 0), old - 1), min(max(i, 0), old - 1)]
                    out[y, x] += kernel(at_y - j) * kernel(at_x - i) * value
    return out.reshape(side * side, -1)


def test_positions_are_interpolated_over_the_grid() -> None:
    table = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(resize_positions(table, 6), interpolated(table.numpy(), 6), atol=1e-5)
    torch.testing.assert_close(resize_positions(torch.full((64, 3), 0.25), 4), torch.full((16, 3), 0.25))
    # A plane over the grid stays one, away from the border, whichever way it goes: rows are y, columns x.
    y, x = np.mgrid[:16, :16] / 16
    plane = torch.tensor(np.stack([y, x], -1).reshape(256, 2), dtype=torch.float32)
    smaller = resize_positions(plane, 8).view(8, 8, 2)[2:-2, 2:-2]
    expected = torch.tensor((np.mgrid[:8, :8] / 8 + 1 / 32).transpose(1, 2, 0)[2:-2, 2:-2], dtype=torch.float32)
    torch.testing.assert_close(smaller, expected, atol=1e-5, rtol=0)


def test_weights_at_another_resolution_are_the_same_but_for_the_table(sources: Path) -> None:
    said: list[str] = []
    weights = open_weights(sources / "run")
    assert at_resolution(weights, 8, said.append) is weights and not said
    resized = at_resolution(weights, 6, said.append)
    assert "trained at 8 x 8 pixels" in said[0] and "6 x 6" in said[0]
    model = load_model(config_of(resized), resized)
    assert model(torch.zeros(1, 36, dtype=torch.int64)).logits_BTK.shape == (1, 36, 16)
    before, after = weights.weights(), resized.weights()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"position_embedding"}
    assert torch.equal(after["position_embedding"], resize_positions(before["position_embedding"], 6))
    assert torch.equal(
        resized.read("position_embedding", "weight", 40, 90), after["position_embedding"].flatten()[40:90]
    )


# --- evaluations of a path that is no run --------------------------------------------------------------------------


def test_evaluations_take_every_format(
    sources: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    records = {}
    for name in FORMATS:
        for command, more in (("eval", ()), ("probe", ("--layers", "1", "--regularisation", "1", "--images", "60"))):
            out = tmp_path / name / f"{command}.json"
            status, text, errors = call(command, sources / name, "--data", digits, "--json", out, *more)
            assert status == 0 and str(out) in text and not errors, errors
            records[name, command] = json.loads(out.read_text())
        # Exact weights: exact features. They lie beside the result, but for a run, which keeps its own.
        folder = sources / name if name in ("run", "native") else tmp_path / name
        assert list((folder / "features").iterdir())
        words = ["low-data", sources / name, "--data", digits, "--labels", "4", "--json", tmp_path / name / "low.json"]
        status, _, errors = call(*words, "--layer", "1")
        assert status == 0, errors
        records[name, "low"] = json.loads((tmp_path / name / "low.json").read_text())
    for command, key in (("eval", "nats_per_token"), ("probe", "best_accuracy"), ("low", "labels_per_class")):
        assert len({json.dumps(records[name, command][key]) for name in FORMATS}) == 1
        assert {records[name, command]["step"] for name in FORMATS} == {7}
    for name in FORMATS:
        assert call("sample", sources / name, "--n", "2", "--out", tmp_path / name / "sheet.png")[0] == 0
        assert (tmp_path / name / "sheet.png").read_bytes() == (tmp_path / "run" / "sheet.png").read_bytes()


def test_where_results_go_must_be_told(
    sources: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    before = sorted(path.name for path in sources.rglob("*"))
    for command in ("eval", "probe", "low-data"):
        status, out, errors = call(command, sources / "hf", "--data", digits)
        assert (status, out) == (2, "") and "name a file by --json" in errors and errors.count("\n") == 1
        status, _, errors = call(command, tmp_path / "nowhere", "--data", digits)
        assert status == 2 and "there is nothing" in errors
        status, _, errors = call(command, sources / "hf", "--json", tmp_path / "out.json")
        assert status == 2 and "names no data: give --data" in errors
    status, _, errors = call("low-data", sources / "hf", "--data", digits, "--labels", 4, "--json", tmp_path / "x.json")
    assert status == 2 and "run igpt-ds probe first, or give --layer" in errors
    status, _, errors = call("eval", sources / "hf", "--step", "3", "--data", digits, "--json", tmp_path / "x.json")
    assert status == 2 and "leave --step out" in errors
    assert sorted(path.name for path in sources.rglob("*")) == before


def test_an_unknown_palette_is_taken_on_trust_and_said(
    sources: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    with np.load(sources / "out.npz", allow_pickle=False) as file:
        np.savez(tmp_path / "bare.npz", **{name: array for name, array in file.items() if name.startswith("model/")})
    status, _, errors = call("eval", tmp_path / "bare.npz", "--data", digits, "--json", tmp_path / "out.json")
    assert status == 0 and "its palette is not known: that of" in errors
    status, _, errors = call("sample", tmp_path / "bare.npz", "--out", tmp_path / "out.png")
    assert status == 2 and "no palette.npy" in errors and "--palette FILE" in errors
    out = tmp_path / "mended"
    words = ["convert", tmp_path / "bare.npz", out, "--to", "native", "--palette", digits / "train" / "palette.npy"]
    assert call(*words)[0] == 0
    assert call("sample", out, "--n", "1", "--out", tmp_path / "out.png")[0] == 0


def test_evaluations_at_another_resolution_say_so(
    sources: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    for command, more in (("eval", ()), ("probe", ("--layers", "1", "--regularisation", "1", "--images", "60"))):
        out = tmp_path / f"{command}.json"
        status, _, errors = call(command, sources / "small", "--data", digits, "--json", out, *more)
        assert status == 0 and "its position table is interpolated (bicubic) to 8 x 8" in errors
    assert len(json.loads((tmp_path / "eval.json").read_text())["positions"]["tokens"]) == 64


# --- beginnings ------------------------------------------------------------------------------------------------------


def pretrain(data: Path, run: Path, *more: object) -> list[str]:
    sets = ["--set", "training.steps=3", "--set", "checkpoint.every=1", "--set", "training.validate_every=0"]
    return ["pretrain", str(run), "--preset", "tiny", "--data", str(data), *sets, *map(str, more)]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "world", "ds"), [("hf", 1, "zero3"), ("out.npz", 2, "zero3"), ("run", 1, "zero1")])
def test_a_pre_training_begins_with_weights_of_any_format(
    sources: Path, digits: Path, tmp_path: Path, name: str, world: int, ds: str
) -> None:
    run = tmp_path / "run"
    still = ["--set", "training.learning_rate=1e-30"]  # the weights stay what they were
    # Gone, once the run has begun: going on needs the source no more.
    shutil.copytree(sources, tmp_path / "sources")
    source = tmp_path / "sources" / name
    text = run_command(
        pretrain(digits, run, "--from", source, "--ds", ds, "--set", "training.stop_at=2", *still),
        tmp_path / "1.txt",
        world,
    )
    expected = open_weights(source)
    assert f"begun with the weights of {expected.path}" in text
    shutil.rmtree(tmp_path / "sources")
    text = run_command(pretrain(digits, run, *still), tmp_path / "2.txt", world)
    assert "resumed from" in text and "begun with" not in text
    assert load_config(run / "config.toml").init_from == str(expected.path)
    assert f"ZeRO-{ds[-1]}" in text  # remembered
    last = Checkpoint.open(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == 3 and last.config["init_from"] == last.identity["init_from"] == str(expected.path)
    original = open_weights(sources / "run").weights()
    assert all(torch.equal(value, original[key]) for key, value in last.weights().items())
    # The first loss is that of these weights on the first batch, not that of random ones.
    first = next(line for line in read_metrics(run / "metrics.jsonl") if "loss" in line)
    assert abs(first["loss"] - math.log(16)) > 0.05


def test_a_pre_training_begins_with_a_model_of_the_hub_and_resumes_without(
    sources: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub({"user/small": sources / "hf"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        words = pretrain(digits, tmp_path / "run", "--from", "hf://user/small")
        status, _, errors = call(*words, "--set", "training.stop_at=1")
        assert status == 0, errors
    began = load_config(tmp_path / "run" / "config.toml").init_from
    snapshots = (tmp_path / "cache" / "models--user--small" / "snapshots").resolve()
    assert began == str(snapshots / commit_of(sources / "hf"))
    status, _, errors = call(*words)
    assert status == 0, errors
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000003"


@pytest.mark.distributed
def test_a_pre_training_and_a_fine_tuning_at_another_resolution(sources: Path, digits: Path, tmp_path: Path) -> None:
    still = ["--set", "training.learning_rate=1e-30"]
    text = run_command(pretrain(digits, tmp_path / "run", "--from", sources / "small", *still), tmp_path / "1.txt")
    assert "its position table is interpolated (bicubic) to 8 x 8" in text
    began = open_weights(sources / "small").weights()
    found = open_weights(tmp_path / "run").weights()
    table = began.pop("position_embedding")
    assert torch.equal(found.pop("position_embedding"), resize_positions(table, 8))
    assert all(torch.equal(found[name], value) for name, value in began.items())
    words = ["finetune", tmp_path / "tuned", "--from", sources / "small", "--data", digits, *still]
    text = run_command([*map(str, words), "--set", "training.steps=1"], tmp_path / "2.txt")
    assert "its position table is interpolated (bicubic) to 8 x 8" in text
    tuned = open_weights(tmp_path / "tuned")
    assert config_of(tuned).data.resolution == 8 and tuned.tensors["class_head.weight"]["shape"] == [10, 32]
    assert torch.equal(tuned.weights()["position_embedding"], resize_positions(table, 8))


@pytest.mark.distributed
def test_a_fine_tuning_begins_with_a_hugging_face_directory(sources: Path, digits: Path, tmp_path: Path) -> None:
    words = ["finetune", tmp_path / "run", "--from", sources / "hf", "--data", digits]
    more = ["--set", "training.steps=1", "--set", "training.learning_rate=1e-30"]
    assert "begun with the weights of" in run_command([*map(str, words), *more], tmp_path / "1.txt")
    found, began = open_weights(tmp_path / "run").weights(), open_weights(sources / "run").weights()
    assert all(torch.equal(found[name], value) for name, value in began.items())
    # Going on does not ask for it again, and is not confused by it.
    assert "already at step 1" in run_command([*map(str, words), *more], tmp_path / "2.txt")


def test_beginnings_that_do_not_serve(
    sources: Path, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    def refused(init_from: object, *more: object, run: Path = tmp_path / "new", data: Path = digits) -> str:
        status, out, errors = call(*pretrain(data, run, "--from", init_from, *more))
        assert (status, out) == (2, "") and errors.count("\n") == 1, errors
        return errors

    assert "there is nothing" in refused(tmp_path / "nowhere")
    assert "its model is ModelConfig(layers=2" in refused(sources / "hf", "--set", "model.layers=3")
    assert "its model is" in refused(sources / "hf", "--set", "model.bias=true")
    assert "its objective is next_pixel, but the run's is masked_pixel" in refused(
        sources / "hf", "--set", "objective.name=masked_pixel"
    )
    (tmp_path / "data").mkdir()
    other = build(tmp_path / "data" / "train", [(7, 0), (3, 0)], resolution=8)
    assert Dataset.open(other.path).palette.k
    assert "palette" in refused(sources / "hf", data=tmp_path / "data")
    assert not (tmp_path / "new").exists()
    # A run that has begun otherwise.
    run = tmp_path / "began"
    config = small_config("seed=3", resolution=8, palette_size=16)
    from igpt_ds.config.file import to_toml

    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    assert "began with random weights, not with " in refused(sources / "hf", run=run)
    # Weights alone have no moments to go on with.
    shutil.copytree(sources / "native", tmp_path / "native")
    status, _, errors = call(*pretrain(digits, tmp_path / "native"))
    assert status == 2 and "holds weights without Adam's moments" in errors and "--from" in errors


def test_a_dry_run_names_the_beginning(sources: Path, digits: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = call(*pretrain(digits, Path("unused"), "--from", sources / "hf", "--dry-run"))
    assert status == 0 and f"begins with  {sources / 'hf'}\n" in out
