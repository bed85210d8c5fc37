"""Linear probe: features against a plain forward pass, the classifier against an optimum found otherwise."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_ds import cli
from igpt_ds.checkpoint import Checkpoint
from igpt_ds.config import to_toml
from igpt_ds.evals.features import Features, extract, load_model, pixels
from igpt_ds.evals.probe import fit, fit_layers
from igpt_ds.manifest import Manifest
from igpt_ds.objectives import load_objective
from igpt_ds.palette import Palette
from igpt_ds.shards import Dataset
from tests.models import random_model, save_model, small_config


@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_features_are_those_of_one_image_at_a_time(digits: Path, objective: str) -> None:
    config = small_config(f"objective.name={objective}", resolution=8, palette_size=16)
    model, dataset = random_model(config), Dataset.open(digits / "val")
    # 7 does not divide the number of images: the surplus of the last batch must not be counted.
    found = extract(model, config, dataset, "test", batch=7)
    assert found.layers.shape == (3, dataset.rows, 32)
    tokens = torch.from_numpy(dataset.tokens(0).astype(np.int64))
    for image in (0, 1, dataset.rows - 1):
        mask = load_objective(config).mask(tokens[image : image + 1], torch.tensor([image]), config)
        with torch.no_grad():
            features = model(tokens[image : image + 1], mask, features=range(3)).features
        for layer in range(3):
            np.testing.assert_allclose(found.layers[layer, image], features[layer][0], atol=1e-5)
    assert np.array_equal(found.labels, dataset.labels())


def test_pixels_are_the_palettes_colours(digits: Path) -> None:
    dataset = Dataset.open(digits / "val")
    found = pixels(dataset)
    assert found.shape == (dataset.rows, 3 * 64)
    grey = np.rint((found[5].reshape(8, 8, 3) + 1) * 127.5)
    assert np.array_equal(grey, dataset.palette.decode(dataset.tokens(0)[5]).reshape(8, 8, 3))


def test_classifier_is_the_regularised_maximum_of_likelihood() -> None:
    """Against scipy's minimum of  sum_i -log p(y_i | x_i) + |W|² / 2  on standardised features, in float64."""
    from scipy.optimize import minimize

    generator = np.random.default_rng(0)
    centres = generator.normal(size=(4, 6))
    labels, test_labels = generator.integers(0, 4, 300), generator.integers(0, 4, 500)
    train = (centres[labels] + generator.normal(size=(300, 6)) * 1.5) * [1, 10, 0.1, 1, 1, 1] + 3
    test = (centres[test_labels] + generator.normal(size=(500, 6)) * 1.5) * [1, 10, 0.1, 1, 1, 1] + 3
    mean, deviation = train.mean(0), train.std(0)
    x, one_hot = (train - mean) / deviation, np.eye(4)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:24].reshape(6, 4), flat[24:]
        logits = x @ weights + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slope = np.exp(log_p) - one_hot
        value = -(log_p * one_hot).sum() + (weights**2).sum() / 2
        return value, np.concatenate([(x.T @ slope + weights).ravel(), slope.sum(0)])

    best = minimize(loss, np.zeros(28), jac=True, method="BFGS", options={"gtol": 1e-6}).x
    scores = (test - mean) / deviation @ best[:24].reshape(6, 4) + best[24:]
    accuracy, converged = fit(train, labels, test, test_labels)
    assert converged
    assert accuracy == pytest.approx((scores.argmax(1) == test_labels).mean(), abs=2 / 500)
    assert 0.4 < accuracy < 0.95


def test_each_layer_is_judged_on_its_own_features() -> None:
    generator = np.random.default_rng(1)
    labels, other = generator.integers(0, 3, 200), generator.integers(0, 3, 100)

    def layers(y: np.ndarray) -> np.ndarray:
        noise = generator.normal(size=(len(y), 3))
        return np.stack([noise, np.eye(3)[y] * 8 + noise]).astype(np.float32)

    results = fit_layers(Features(layers(labels), labels), Features(layers(other), other), "test")
    assert [result.layer for result in results] == [0, 1]
    assert results[0].accuracy < 0.55 and results[1].accuracy == 1.0


def test_loaded_network_is_the_checkpoints(digits: Path, tmp_path: Path) -> None:
    config = small_config(resolution=8, palette_size=16)
    model = random_model(config, seed=5)
    path = save_model(model, config, tmp_path, "x")
    loaded = load_model(config, Checkpoint.open(path))
    for mine, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert not loaded.training


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """A run directory with one checkpoint of a random network."""
    palette = Dataset.open(digits / "train").palette
    config = small_config(resolution=8, palette_size=16)
    folder = tmp_path / "run"
    save_model(random_model(config), config, folder, palette.sha256, sources=[str(digits)])
    palette.save(folder / "palette.npy")
    (folder / "config.toml").write_text(to_toml(config))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the console script in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["igpt-ds", *map(str, words)])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_probe_command_writes_what_it_prints(
    run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "result.json"
    assert call(monkeypatch, "probe", run, "--data", digits, "--json", out, "--untrained") == 0
    record = json.loads(out.read_text())
    assert [r["layer"] for r in record["layers"]] == [0, 1, 2]
    assert record["step"] == 7
    assert record["validation_images"] == Dataset.open(digits / "val").rows
    assert record["best_accuracy"] == max(r["accuracy"] for r in record["layers"])
    assert 0.7 < record["pixels"] <= 1
    printed = capsys.readouterr().out
    for result in record["layers"] + record["untrained"]:
        assert f"{result['accuracy']:.4f}" in printed
    assert len(record["untrained"]) == 3
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.size == (768, 480)
    # A part of the images, without the untrained network.
    assert call(monkeypatch, "probe", run, "--images", 40) == 0
    part = json.loads((run / "probe.json").read_text())
    assert (part["train_images"], part["validation_images"], part["untrained"]) == (40, 40, [])


def test_a_part_of_the_images_is_the_first(digits: Path) -> None:
    config = small_config(resolution=8, palette_size=16)
    model, dataset = random_model(config), Dataset.open(digits / "val")
    whole, part = (extract(model, config, dataset, "test", images, batch=16) for images in (None, 20))
    assert part.layers.shape == (3, 20, 32)
    np.testing.assert_allclose(part.layers, whole.layers[:, :20], atol=1e-6)
    assert np.array_equal(part.labels, whole.labels[:20])
    assert np.array_equal(pixels(dataset, 20), pixels(dataset)[:20])


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

    assert "damaged" in refused_after_damage(run, refused)


def refused_after_damage(run: Path, refused: Callable[..., str]) -> str:
    """What the probe says when a byte of the only checkpoint has changed."""
    weights = run / "checkpoints" / "step-00000007" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    return refused("probe", run)


def test_sample_command_draws_and_refuses(
    run: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "sheet.png"
    assert call(monkeypatch, "sample", run, "--n", 4, "--out", out) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (134, 134)
    assert call(monkeypatch, "sample", run, "--n", 2, "--complete", digits, "--out", out) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (6 * 66 + 2, 2 * 66 + 2)
    assert call(monkeypatch, "sample", run, "--n", 1, "--out", run / "config.toml" / "x.png") == 2
    assert "cannot write" in capsys.readouterr().err
    assert call(monkeypatch, "sample", run, "--out", out, "--temperature", "nan") == 2
    assert "--temperature nan" in capsys.readouterr().err
    palette = Dataset.open(digits / "train").palette
    Palette(-palette.colours).save(run / "palette.npy")
    assert call(monkeypatch, "sample", run, "--out", out) == 2
    assert "not the palette of" in capsys.readouterr().err
