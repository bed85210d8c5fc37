"""Linear probe: what is chosen on validation, what is folded and tested, on cases with known answers; the commands."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt_ds.config.file import to_toml
from igpt_ds.config.schema import Config
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.evals import probe
from igpt_ds.features import classifier_sgd
from igpt_ds.features.cache import Features
from igpt_ds.features.choice import Choice, Sgd, choose
from igpt_ds.features.classifier import Rows
from igpt_ds.features.probing import Collected, Probe, Settings, centred
from igpt_ds.features.splits import Scored, Splits
from tests.helpers.commands import call
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import run_ranks

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
    each = [choose(train, validation, (s,)).accuracy for s in strengths]
    chosen = choose(train, validation, strengths)
    assert each[1] > max(each[0], each[3]) + 0.1  # the search has something to find
    assert chosen.setting == strengths[int(np.argmax(each))]
    assert chosen.accuracy == pytest.approx(max(each), abs=0.002)
    assert chosen.classifier is not None and chosen.classifier.accuracy(validation) == chosen.accuracy


def chosen_rates(monkeypatch: pytest.MonkeyPatch, accuracies: list[list[float]]) -> list[Choice]:
    """What SGD chooses for each layer if the heads have these accuracies by layer and rate (nan: diverged)."""

    class Played:
        def __init__(self, groups: list[Rows], classes: int, rates: tuple[float, ...], *more: Any) -> None:
            assert rates == classifier_sgd.RATES

        def accuracies(self, groups: list[Rows], rates: int) -> np.ndarray:
            return np.array([each + [math.nan] * (rates - len(each)) for each in accuracies])

        def classifier(self, group: int, rate: int) -> tuple[int, int]:
            return group, rate

    monkeypatch.setattr(classifier_sgd, "fit", Played)
    rows = [Rows([(np.zeros((2, 1)),)], np.arange(2))] * len(accuracies)
    return Sgd(2, 1, 128, 0, Ranks()).choose(rows, rows, "test")


def test_of_all_rates_the_best_is_chosen_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equals the largest; only the best of all layers needs its classifier."""
    nan = math.nan
    found = chosen_rates(monkeypatch, [[0.5, 0.6, 0.55], [nan, nan, 0.2, 0.7, 0.7, 0.1], [0.6, nan]])
    assert [(each.setting, each.accuracy) for each in found] == [(10.0, 0.6), (1.0, 0.7), (30.0, 0.6)]
    assert [each.classifier for each in found] == [None, (1, 3), None]


def test_divergence_at_every_rate_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="diverged at every rate"):
        chosen_rates(monkeypatch, [[0.5], [math.nan]])


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


def probed(collected: Collected, splits: Splits, settings: Settings, config: Config | None = None) -> dict[str, Any]:
    made = Probe(splits, config or small_config(), settings)
    return made.judge(collected, made.choose(collected))


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
    record = probed(collected, splits, Settings(strengths=(0.1,), concatenate=(2,)))
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
    record = probed(Collected(found, Scored(found), None, (before, before)), splits, Settings())
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
    record = probed(Collected(corners(labels, 0, telling), scored), splits, Settings(masks=3), config)
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
    dataclasses.replace(manifest, split="test").save(folder / "test")
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
    assert (record["precision"], record["store"], record["iterations"], record["batch"]) == (
        "float32",
        "float32",
        20,
        128,
    )


def test_the_record_says_how_training_images_were_cut_and_what_chance_gives(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, data = make_run(digits, tmp_path / "run"), tmp_path / "data"
    shutil.copytree(digits, data)
    train, held_out = Dataset.open(data / "train"), Dataset.open(data / "val")
    commonest = np.bincount(train.labels()).argmax()
    for crop in ("random", "centre"):
        dataclasses.replace(train.manifest, transform={"crop": crop}).save(data / "train")
        for words in (["probe", run, "--regularisation", 1], ["low-data", run, "--labels", 3]):
            assert call(monkeypatch, *words, "--data", data) == 0
            record = json.loads((run / f"{str(words[0]).replace('-', '_')}.json").read_text())
            printed = capsys.readouterr().out
            assert record["train_crop"] == crop
            assert record["chance"] == pytest.approx(np.mean(held_out.labels() == commonest))
            assert f"the commonest class alone: {record['chance']:.4f}" in printed
            assert ("not the paper's centre crop" in printed) == (crop == "random")
            warned = [line for line in caplog.messages if "cropped at random" in line]
            caplog.clear()
            assert len(warned) == (crop == "random") and all("--no-augment" in line for line in warned)


@pytest.mark.distributed
def test_ranks_divide_the_heads_and_find_what_one_finds(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two and five ranks for three layers and, side by side, for one group; float16, votes by the best of all heads."""
    run = make_run(digits, tmp_path / "run", "masked_pixel")
    data = with_test_split(digits, run.parent / "data")
    how = ["--solver", "sgd", "--iterations", "60", "--sgd-batch", "32", "--store", "float16", "--concatenate", "2"]
    how += ["--masks", "2"]
    words = [str(run), "--data", str(data), *how, "--split", "test"]
    assert call(monkeypatch, "probe", *words) == 0
    (cache,) = (run / "features").glob("*-train-*")
    assert np.load(cache / "features.npy", mmap_mode="r").dtype == np.float16
    alone = json.loads((run / "probe.json").read_text())
    for world in (2, 5):
        out = run.parent / f"{world}.json"
        texts = run_ranks("igpt_ds", ["probe", *words, "--json", str(out)], world=world, limit=200)
        assert [text.count("written:") for text in texts] == [1] + [0] * (world - 1)
        assert json.loads(out.read_text()) == alone
    assert alone["store"] == "float16" and len({result["learning_rate"] for result in alone["layers"]}) > 1


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
    assert "belong to --solver sgd" in refused("probe", run, "--iterations", 5)
    assert "belong to --solver sgd" in refused("probe", run, "--sgd-batch", 5)
    assert "no checkpoint of step 3: choose one of those there: 7" in refused("probe", run, "--step", 3)

    bare = tmp_path / "unlabelled"
    shutil.copytree(digits, bare)
    for split in ("train", "val"):
        manifest = Manifest.load(bare / split)
        dataclasses.replace(manifest, classes=None).save(bare / split)
    assert "label" in refused("probe", run, "--data", bare)

    split = tmp_path / "other_classes"
    shutil.copytree(digits, split)
    manifest = Manifest.load(split / "val")
    dataclasses.replace(manifest, classes=[*"abcdefghij"]).save(split / "val")
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
