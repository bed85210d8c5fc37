"""Linear probe: what is chosen on validation, what is folded and tested, on cases with known answers; the commands."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt_ds.config.file import to_toml
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import RunError
from igpt_ds.evals import probe
from igpt_ds.evals.probe import Collected, Settings, centred, judge
from igpt_ds.features import classifier_sgd
from igpt_ds.features.cache import Features
from igpt_ds.features.choice import choose
from igpt_ds.features.classifier import Classifier, Rows
from igpt_ds.features.splits import Scored, Splits
from tests.helpers.commands import call
from tests.helpers.models import random_model, save_model, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


# --- choosing --------------------------------------------------------------------------------------------------


def noisy(images: int, seed: int, wrong: float) -> Rows:
    """One telling feature among 60 of noise; a share of the labels is wrong."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, images)
    features = generator.normal(size=(images, 60))
    features[:, 0] += 3.0 * labels
    flipped = np.where(generator.random(images) < wrong, 1 - labels, labels)
    return Rows([(features.astype(np.float32),)], flipped)


def test_the_strength_that_validation_prefers_is_chosen() -> None:
    """With more features than tell anything and wrong labels, little regularisation learns the set by heart."""
    train, validation = noisy(150, 0, wrong=0.2), noisy(2000, 1, wrong=0.0)
    strengths = (1e6, 60.0, 1.0, 1e-3)
    each = [choose(train, validation, 2, (s,), 1, 0, "test").accuracy for s in strengths]
    chosen = choose(train, validation, 2, strengths, 1, 0, "test")
    assert each[1] > max(each[0], each[3]) + 0.1  # the search has something to find
    assert chosen.setting == strengths[int(np.argmax(each))]
    assert chosen.accuracy == pytest.approx(max(each), abs=0.002)
    assert chosen.classifier.accuracy(validation) == chosen.accuracy


def rates_tried(monkeypatch: pytest.MonkeyPatch, accuracies: dict[float, float | None]) -> tuple[list[float], Any]:
    """The rates that a search by SGD tries, and what it ends with, if they have these accuracies (None: diverged)."""
    tried = []
    always_1 = Classifier(np.zeros(1), np.ones(1), np.zeros((1, 2)), np.array([0.0, 1.0]), np.arange(2), True)

    def fit(rows: Rows, classes: int, rate: float, *more: Any) -> Any:
        tried.append(rate)
        return None if accuracies[rate] is None else dataclasses.replace(always_1, mean_D=np.array([rate]))

    monkeypatch.setattr(classifier_sgd, "fit", fit)
    monkeypatch.setattr(Classifier, "accuracy", lambda self, rows: accuracies[float(self.mean_D[0])])
    rows = Rows([(np.zeros((2, 1)),)], np.arange(2))
    return tried, lambda: choose(rows, rows, 2, (), 1, 0, "test")


@pytest.mark.parametrize(
    ("accuracies", "tried", "best"),
    [
        ({30.0: 0.5, 10.0: 0.6, 3.0: 0.55}, [30, 10, 3], 10),
        ({30.0: 0.5, 10.0: 0.4}, [30, 10], 30),
        ({30.0: None, 10.0: None, 3.0: 0.2, 1.0: 0.3, 0.3: 0.3, 0.1: 0.1}, [30, 10, 3, 1, 0.3, 0.1], 1),
        (dict(zip(classifier_sgd.RATES, range(8), strict=True)), list(classifier_sgd.RATES), 0.01),
    ],
)
def test_rates_are_tried_in_order_until_the_accuracy_falls(
    monkeypatch: pytest.MonkeyPatch, accuracies: dict[float, float | None], tried: list[float], best: float
) -> None:
    seen, run = rates_tried(monkeypatch, accuracies)
    assert run().setting == best
    assert seen == tried


def test_divergence_at_every_rate_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = rates_tried(monkeypatch, dict.fromkeys(classifier_sgd.RATES))
    with pytest.raises(RunError, match="diverged at every rate"):
        run()


def test_layers_are_centred_on_the_best() -> None:
    layers = tuple(range(10))
    assert centred(layers, 5, 5) == (3, 4, 5, 6, 7)
    assert centred(layers, 0, 5) == centred(layers, 1, 5) == (0, 1, 2, 3, 4)
    assert centred(layers, 9, 3) == (7, 8, 9)
    assert centred(layers, 5, 2) == (5, 6)
    assert centred((0, 4, 8), 4, 3) == (0, 4, 8)


# --- judging ---------------------------------------------------------------------------------------------------


def corners(labels: np.ndarray, seed: int, telling: tuple[bool, ...]) -> Features:
    """Features of 3 layers; in a telling one each of 3 classes has a corner of its own, the others are noise."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(len(telling), len(labels), 3)).astype(np.float32)
    layers = noise + 12 * np.eye(3, dtype=np.float32)[labels] * np.array(telling)[:, None, None]
    return Features((0, 1, 2), layers, labels)


@pytest.fixture
def splits(digits: Path) -> Splits:
    """Only their classes and pixels are looked at."""
    return Splits(Dataset.open(digits / "train"), Dataset.open(digits / "val"))


def test_each_layer_is_judged_on_its_own_features_and_validation_is_folded_into_training(splits: Splits) -> None:
    """Class 2 is in the validation and test splits only: a classifier knows it if it was trained on both."""
    generator = np.random.default_rng(1)
    known, held_out = generator.integers(0, 2, 150), generator.integers(0, 2, 60)
    held_out[:20] = 2
    tested = np.repeat([0, 1, 2], 30)
    train, validation, test = (
        corners(labels, seed, (False, True, False)) for seed, labels in enumerate((known, held_out, tested))
    )
    collected = Collected(train, Scored(validation), Scored(test))
    record = judge(collected, splits, small_config(), Settings(strengths=(0.1,), concatenate=(2,)))
    assert [r["layer"] for r in record["layers"]] == [0, 1, 2]
    accuracies = [r["accuracy"] for r in record["layers"]]
    assert max(accuracies[0], accuracies[2]) < 0.55
    assert (record["best_layer"], record["best_accuracy"]) == (1, pytest.approx(40 / 60))
    assert all(r["n"] == 60 and r["regularisation"] == 0.1 for r in record["layers"])
    assert record["test"]["accuracy"] == 1.0
    assert (record["test"]["n"], record["test"]["train_images"], record["test"]["layers"]) == (90, 210, [1])
    (several,) = record["concatenation"]
    assert (several["layers"], several["features"], several["n"]) == ([1, 2], 6, 60)
    assert several["accuracy"] == pytest.approx(40 / 60) and several["test"]["accuracy"] > 0.95
    assert record["masks"] is None and record["untrained"] == []
    assert (
        "test, layer 1, trained on 210 images (validation folded in): 1.0000 (n = 90)"
        in probe.table({**record, "solver": "lbfgs"}).text()
    )


def test_without_a_test_split_none_is_reported(splits: Splits) -> None:
    labels = np.arange(60) % 3
    found = corners(labels, 0, (True, True, False))
    before = corners(labels, 1, (False, False, False))
    record = judge(Collected(found, Scored(found), None, (before, before)), splits, small_config(), Settings())
    assert record["test"] is None
    assert record["best_layer"] == 0  # of equals the first
    assert len(record["untrained"]) == 3 and record["untrained"][0]["accuracy"] < 0.8


def test_masks_are_ensembled_by_the_modal_prediction(splits: Splits) -> None:
    """Of 3 masks a different third each is misleading: every mask is right on two thirds, the majority always."""
    labels = np.arange(60) % 3
    config = small_config("objective.name=masked_pixel")
    telling = (True, False, False)

    def misled(third: int) -> Features:
        wrong = np.where(np.arange(60) // 20 == third, (labels + 1) % 3, labels)
        return dataclasses.replace(corners(wrong, 5 + third, telling), labels=labels)

    masked = [misled(third) for third in range(3)]
    scored = Scored(masked[0], masked, corners(labels, 9, telling))
    record = judge(Collected(corners(labels, 0, telling), scored), splits, config, Settings(masks=3))
    masks = record["masks"]
    assert masks["single"] == pytest.approx([2 / 3] * 3) and masks["single_mean"] == pytest.approx(2 / 3)
    assert masks["single_std"] == pytest.approx(0, abs=1e-12)
    assert (masks["count"], masks["n"], masks["layers"]) == (3, 60, [0])
    assert masks["accuracy"] == masks["unmasked"] == 1.0
    assert record["best_accuracy"] == pytest.approx(2 / 3)
    assert (
        "modal prediction over 3 masks: 1.0000; one mask: 0.6667 ± 0.0000"
        in probe.table({**record, "solver": "lbfgs"}).text()
    )


# --- the commands ----------------------------------------------------------------------------------------------


def make_run(digits: Path, folder: Path, objective: str = "next_pixel") -> Path:
    """A run directory with one checkpoint of a random network."""
    palette = Dataset.open(digits / "train").palette
    config = small_config(f"objective.name={objective}", resolution=8, palette_size=16)
    save_model(random_model(config), config, folder, palette.sha256, sources=[str(digits)])
    palette.save(folder / "palette.npy")
    (folder / "config.toml").write_text(to_toml(config))
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    return make_run(digits, tmp_path / "run")


def with_test_split(digits: Path, folder: Path) -> Path:
    """A copy of the digits whose validation images are the test split, too."""
    shutil.copytree(digits, folder)
    shutil.copytree(folder / "val", folder / "test")
    manifest = Manifest.load(folder / "test")
    Manifest(**{**vars(manifest), "split": "test"}).save(folder / "test")
    return folder


def test_probe_command_writes_what_it_prints(
    run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = run.parent / "result.json", with_test_split(digits, run.parent / "data")
    words = ("--json", out, "--untrained", "--split", "test", "--concatenate", 2, "--regularisation", 1)
    assert call(monkeypatch, "probe", run, "--data", data, *words) == 0
    record = json.loads(out.read_text())
    assert [r["layer"] for r in record["layers"]] == [0, 1, 2]
    assert record["step"] == 7 and record["model"] == "tiny" and record["data"] == str(data)
    images = Dataset.open(digits / "val").rows
    assert record["validation_images"] == images == record["test"]["n"]
    assert record["best_accuracy"] == max(r["accuracy"] for r in record["layers"])
    assert 0.7 < record["pixels"] <= 1
    printed = capsys.readouterr().out
    for result in [*record["layers"], *record["untrained"], *record["concatenation"], record["test"]]:
        assert f"{result['accuracy']:.4f}" in printed
    assert len(record["untrained"]) == 3
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.size == (768, 480)
    # A part of the images and of the layers, of a named checkpoint, by SGD.
    part = ("--images", 40, "--layers", "1-2", "--step", 7, "--solver", "sgd", "--iterations", 20)
    assert call(monkeypatch, "probe", run, *part) == 0
    record = json.loads((run / "probe-7.json").read_text())
    assert (record["train_images"], record["validation_images"], record["untrained"]) == (40, 40, [])
    assert [r["layer"] for r in record["layers"]] == [1, 2] and record["pixels"] is None
    assert all(r["learning_rate"] in classifier_sgd.RATES and r["regularisation"] is None for r in record["layers"])


def test_a_bert_model_is_probed_under_masks(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(digits, tmp_path / "run", "masked_pixel")
    assert call(monkeypatch, "probe", run, "--regularisation", 1, "--masks", 3) == 0
    masks = json.loads((run / "probe.json").read_text())["masks"]
    assert masks["count"] == 3 == len(masks["single"]) and len(set(masks["single"])) > 1
    assert len(list((run / "features").iterdir())) == 5  # train, three masks of val and none


def test_probe_refuses_what_does_not_fit(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert call(monkeypatch, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("igpt-ds: "), lines
        return lines[0]

    assert "no run directory" in refused("probe", tmp_path / "nowhere")
    assert "no such directory" in refused("probe", run, "--data", tmp_path / "nowhere")
    assert "no test/ dataset" in refused("probe", run, "--split", "test")
    assert "no BERT model" in refused("probe", run, "--masks", 5)
    assert "layers 0 to 2" in refused("probe", run, "--layers", "3")
    assert "only 3 layers" in refused("probe", run, "--concatenate", 5)
    assert "belongs to" in refused("probe", run, "--iterations", 5)
    assert "no checkpoint of step 3: choose one of those there: 7" in refused("probe", run, "--step", 3)

    bare = tmp_path / "unlabelled"
    shutil.copytree(digits, bare)
    for split in ("train", "val"):
        manifest = Manifest.load(bare / split)
        Manifest(**{**vars(manifest), "classes": None}).save(bare / split)
    assert "label" in refused("probe", run, "--data", bare)

    split = tmp_path / "other_classes"
    shutil.copytree(digits, split)
    manifest = Manifest.load(split / "val")
    Manifest(**{**vars(manifest), "classes": [*"abcdefghij"]}).save(split / "val")
    assert "classes are not those" in refused("probe", run, "--data", split)

    shutil.rmtree(split / "val")
    assert "no val/" in refused("probe", run, "--data", split)
    assert "damaged" in refused_after_damage(run, refused)


def refused_after_damage(run: Path, refused: Callable[..., str]) -> str:
    """What the probe says when a byte of the only checkpoint has changed."""
    weights = run / "checkpoints" / "step-00000007" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    return refused("probe", run)
