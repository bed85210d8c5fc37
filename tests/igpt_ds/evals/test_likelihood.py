"""Likelihood against float64 and closed forms; on several ranks; the command."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_ds.config.file import to_toml
from igpt_ds.config.schema import Config
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.evals.likelihood import Likelihood, likelihood, record, write_images
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import load_objective
from tests.helpers import commands
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import run_ranks

ALONE = Ranks()


def digits_config(objective: str) -> Config:
    return small_config(f"objective.name={objective}", resolution=8, palette_size=16)


def reference(model: ImageGPT, tokens: np.ndarray, mask_BT: torch.Tensor | None) -> np.ndarray:
    """-log p of every token in float64, from the logits of the same network in float64."""
    tokens_BT = torch.from_numpy(tokens.astype(np.int64))
    logits = model.double()(tokens_BT, mask_BT).logits_BTK.detach().numpy()
    model.float()
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens_BT.numpy()[..., None], -1)[..., 0]


def test_equals_a_float64_reference_auto_regressive(digits: Path) -> None:
    config = digits_config("next_pixel")
    model, dataset = random_model(config), Dataset.open(digits / "val")
    found = likelihood(model, config, dataset, ALONE)
    nats = reference(model, dataset.images(), None)
    np.testing.assert_allclose(found.images_I, nats.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.positions_T, nats.mean(0), rtol=1e-5)
    assert found.nats == pytest.approx(nats.mean(), rel=1e-6)
    assert (found.counts_T == dataset.rows).all()
    assert abs(found.nats - math.log(16)) > 0.05  # a blind guess would not show much


def test_equals_a_float64_reference_bert_over_masks(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = digits_config("masked_pixel")
    model, dataset = random_model(config), Dataset.open(digits / "val")
    monkeypatch.setattr("igpt_ds.evals.likelihood._TOKENS", 64 * 7)  # 7 does not divide the images
    found = likelihood(model, config, dataset, ALONE, masks=3, mask_seed=5)
    tokens = dataset.images()
    seeded = small_config("objective.name=masked_pixel", "seed=5", resolution=8, palette_size=16)
    sums, counts, means = np.zeros(64), np.zeros(64), []
    for number in range(3):
        places = torch.arange(dataset.rows) + number * dataset.rows
        mask = load_objective(seeded.objective.name).mask(
            torch.from_numpy(tokens.astype(np.int64)), places, seeded.seed, seeded.objective.mask_rate
        )
        assert mask is not None and mask.any(1).all()
        nats, hidden = reference(model, tokens, mask), mask.numpy()
        sums, counts = sums + (nats * hidden).sum(0), counts + hidden.sum(0)
        means.append((nats * hidden).sum(1) / hidden.sum(1))
    np.testing.assert_allclose(found.images_I, np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(found.positions_T, sums / counts, rtol=1e-5)
    assert np.array_equal(found.counts_T, counts)
    # One mask of the run's own seed is the loss that its validation during training reports.
    one = likelihood(model, config, dataset, ALONE, masks=1, mask_seed=config.seed)
    tokens_BT, places = torch.from_numpy(tokens.astype(np.int64)), torch.arange(dataset.rows)
    mask = load_objective(config.objective.name).mask(tokens_BT, places, config.seed, config.objective.mask_rate)
    with torch.no_grad():
        losses = load_objective(config.objective.name).image_losses(model(tokens_BT, mask).logits_BTK, tokens_BT, mask)
    assert one.nats == pytest.approx(float(losses.double().mean()), rel=1e-6)


def test_an_image_without_a_mask_has_no_loss(digits: Path) -> None:
    config = small_config(
        "objective.name=masked_pixel", "objective.mask_rate=0.01", resolution=8, palette_size=16
    )  # 0.99^64: half of the masks are empty
    dataset = Dataset.open(digits / "val")
    found = likelihood(random_model(config), config, dataset, ALONE)
    empty = int(np.isnan(found.images_I).sum())
    assert 0 < empty < dataset.rows
    assert found.nats == pytest.approx(found.images_I[~np.isnan(found.images_I)].mean())
    assert 0 < np.isnan(found.positions_T).sum() == (found.counts_T == 0).sum()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_a_loss_that_is_not_finite_is_an_error_and_no_missing_value(digits: Path, objective: str, value: float) -> None:
    config, dataset = digits_config(objective), Dataset.open(digits / "val")
    model, tokens = random_model(config), dataset.images()
    colour = 7  # of some images only
    with torch.no_grad():
        model.token_embedding[colour] = value
    touched = np.flatnonzero((tokens[:, :-1] == colour).any(1))
    assert 0 < len(touched) < dataset.rows
    with pytest.raises(RunError, match=r"the loss of \d+ of 67 images is not finite \(images \d") as caught:
        likelihood(model, config, dataset, ALONE, masks=3)
    if objective == "next_pixel":
        named = ", ".join(map(str, touched[:5]))
        assert f"of {len(touched)} of 67" in str(caught.value) and f"(images {named} and" in str(caught.value)


def test_images_none_of_which_is_masked_are_an_error(digits: Path) -> None:
    config = small_config("objective.name=masked_pixel", "objective.mask_rate=1e-9", resolution=8, palette_size=16)
    with pytest.raises(RunError, match="no token of any image is hidden"):
        likelihood(random_model(config), config, Dataset.open(digits / "val"), ALONE)


def test_means_and_standard_errors_by_class(digits: Path) -> None:
    config = digits_config("next_pixel")
    dataset = Dataset.open(digits / "val")
    images = np.arange(dataset.rows) / 100 + 1
    found = Likelihood(images, np.full(64, 1.5), np.full(64, dataset.rows))

    class FakeCheckpoint:
        path, step = Path("x"), 7

    result = record(found, FakeCheckpoint(), config, dataset, None, None)  # type: ignore[arg-type]
    assert result["nats_per_token"] == pytest.approx(images.mean())
    assert result["bits_per_token"] == pytest.approx(images.mean() / math.log(2))
    spread = math.sqrt(((images - images.mean()) ** 2).sum() / (len(images) - 1) / len(images))
    assert result["standard_error"] == pytest.approx(spread)
    labels = dataset.labels()
    assert [c["images"] for c in result["classes"]] == np.bincount(labels, minlength=10).tolist()
    assert result["classes"][3]["name"] == "3"
    assert result["classes"][3]["nats_per_token"] == pytest.approx(images[labels == 3].mean())
    assert result["tokens"] == 64 * dataset.rows


@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_each_images_likelihood_is_written(
    digits: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    run, out = make_run(digits, tmp_path / "run", objective), tmp_path / "images.jsonl"
    assert call("eval", run, "--per-image", out) == 0
    assert f"Each image's: {out}" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    dataset, record = Dataset.open(digits / "val"), json.loads((run / "eval.json").read_text())
    assert [line["id"] for line in lines] == [name.decode() for name in dataset.ids()]
    assert [line["label"] for line in lines] == dataset.labels().tolist()
    nats = [line["nats_per_token"] for line in lines]
    assert np.mean(nats) == pytest.approx(record["nats_per_token"], rel=1e-12)
    assert [line["bits_per_token"] for line in lines] == pytest.approx([each / math.log(2) for each in nats])
    if objective == "next_pixel":
        expected = reference(random_model(digits_config(objective)), dataset.images(), None).mean(1)
        np.testing.assert_allclose(nats, expected, rtol=1e-5)
    # An id that is no text, and an image that was never masked.
    odd = Likelihood(np.array([1.5, math.nan]), np.ones(64), np.ones(64, np.int64))
    unlabelled = type("", (), {"manifest": type("", (), {"classes": None})})
    write_images(odd, unlabelled, np.array([b"a\xff", b"b"]), out)  # type: ignore[arg-type]
    first, second = [json.loads(line) for line in out.read_text().splitlines()]
    assert first == {"id": "a\udcff", "label": None, "nats_per_token": 1.5, "bits_per_token": 1.5 / math.log(2)}
    assert second == {"id": "b", "label": None, "nats_per_token": None, "bits_per_token": None}


@pytest.mark.distributed
def test_two_ranks_find_what_one_does(digits: Path, tmp_path: Path) -> None:
    folder = make_run(digits, tmp_path / "run", "masked_pixel")
    out = tmp_path / "two.json"
    damaged = folder / "checkpoints" / "step-00000008"
    shutil.copytree(folder / "checkpoints" / "step-00000007", damaged)
    (damaged / "checkpoint.json").write_text("{}")
    texts = run_ranks("igpt_ds", ["eval", str(folder), "--json", str(out), "--masks", "2"], world=2, limit=60)
    assert [text.count("step-00000008") for text in texts] == [1, 0], "one rank warns"
    config = digits_config("masked_pixel")
    alone = likelihood(
        random_model(config), config, Dataset.open(digits / "val"), ALONE, masks=2, mask_seed=config.seed
    )
    result = json.loads(out.read_text())
    assert result["nats_per_token"] == pytest.approx(alone.nats, rel=1e-6)
    assert result["positions"]["tokens"] == alone.counts_T.tolist()
    assert (result["masks"], result["mask_seed"], result["images"]) == (2, 0, len(alone.images_I))


def make_run(digits: Path, folder: Path, objective: str) -> Path:
    """A run directory with one checkpoint, of step 7, of a random network."""
    palette = Dataset.open(digits / "train").palette
    config = digits_config(objective)
    save_model(random_model(config), config, folder, palette.sha256, sources=[str(digits)])
    palette.save(folder / "palette.npy")
    (folder / "config.toml").write_text(to_toml(config))
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the console script in this process; its exit status."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> int:
        return commands.call(monkeypatch, *words)

    return run


def test_the_command_writes_what_it_prints(
    digits: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(digits, tmp_path / "run", "next_pixel")
    out = tmp_path / "result.json"
    assert call("eval", run, "--data", digits, "--split", "val", "--json", out) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert f"{result['nats_per_token']:.4f}" in printed and f"{result['bits_per_token']:.4f}" in printed
    assert all(f"{c['nats_per_token']:.4f}" in printed for c in result["classes"])
    manifest = Manifest.load(digits / "val")
    distortion = manifest.palette["distortion"]
    assert f"Palette distortion: {distortion:.4e}" in printed and "no RGB likelihood" in printed
    assert (result["step"], result["palette_distortion"], result["masks"]) == (7, distortion, None)
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.format == "PNG"
    # A manifest that does not record it, of data that something else has built.
    silent = {key: manifest.palette[key] for key in ("k", "sha256")}
    try:
        dataclasses.replace(manifest, palette=silent).save(digits / "val")
        assert call("eval", run, "--step", 7) == 0
    finally:
        manifest.save(digits / "val")
    assert "Palette distortion: unknown" in capsys.readouterr().out
    assert json.loads((run / "eval-7.json").read_text())["palette_distortion"] is None
    # Another split has a file of its own.
    assert call("eval", run, "--split", "train") == 0
    assert json.loads((run / "eval-train.json").read_text())["split"] == "train"


def test_the_command_writes_nothing_of_damaged_weights(
    digits: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(digits, tmp_path / "run", "next_pixel"), digits_config("next_pixel")
    model = random_model(config)
    with torch.no_grad():
        model.token_embedding[7, 0] = math.nan
    save_model(model, config, run, Dataset.open(digits / "train").palette.sha256, step=8, sources=[str(digits)])
    before = sorted(run.iterdir())
    for verb in ("eval", "probe", "low-data"):
        layer = ["--layer", 2] if verb == "low-data" else []
        assert call(verb, run, *layer, *(["--labels", 4] if layer else [])) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "not finite" in line and "images " in line, verb
        assert [path for path in sorted(run.iterdir()) if path.name != "features"] == before


def test_the_command_refuses_what_does_not_fit(
    digits: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(digits, tmp_path / "run", "next_pixel")

    def refused(*words: object) -> str:
        assert call("eval", *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("igpt-ds: "), lines
        return lines[0]

    assert "no run directory" in refused(tmp_path / "nowhere")
    assert "no such directory" in refused(run, "--data", tmp_path / "nowhere")
    assert "no BERT model" in refused(run, "--masks", 3)
    assert "is a directory: choose another path" in refused(run, "--per-image", tmp_path)
    assert "no checkpoint of step 8: choose one of those there: 7" in refused(run, "--step", 8)
    assert "test" in refused(run, "--split", "test")
    folder = tmp_path / "data"
    dataset = Dataset.open(digits / "val")
    for shard in (digits / "val").iterdir():
        (folder / "val").mkdir(parents=True, exist_ok=True)
        (folder / "val" / shard.name).write_bytes(shard.read_bytes())
    other = Palette(-dataset.palette.colours)
    other.save(folder / "val" / "palette.npy")
    manifest = Manifest.load(digits / "val")
    dataclasses.replace(manifest, palette={"k": 16, "sha256": other.sha256}).save(folder / "val")
    assert "another palette" in refused(run, "--data", folder)
