"""The Python API: every example of docs/api.md runs, and what it gives is what the command line gives."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import igpt_ds
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.evals import evaluate
from igpt_ds.evals import load as evaluation
from tests.helpers.commands import call

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on digits of 8 x 8 pixels."""
    run = tmp_path_factory.mktemp("api") / "run"
    return igpt_ds.pretrain("tiny", digits, run, seed=1, training={"steps": 4, "batch": 8})


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [8, 8, 8, 3]."""
    grey = np.minimum(load_digits().images[:8], 15).astype(np.uint8) * 17
    return np.repeat(grey[..., None], 3, axis=3)


def test_the_import_is_light() -> None:
    code = "import igpt_ds, sys; print('torch' in sys.modules, 'load' in dir(igpt_ds) or igpt_ds.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("False")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = igpt_ds.lode  # type: ignore[attr-defined]


def test_a_training_leaves_the_program_as_it_was(digits: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers], dict(os.environ)
    kernels = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    igpt_ds.pretrain("tiny", digits, tmp_path / "run", training={"steps": 1, "batch": 8})
    assert [signal.getsignal(number) for number in numbers] == before[0]
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & (set(os.environ) - set(before[1]))
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == kernels


def test_a_training_from_python_is_that_of_the_command_line(
    digits: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--set", "seed=1", "--set", "training.steps=4", "--set", "training.batch=8"]
    assert call(monkeypatch, "pretrain", tmp_path / "run", "--preset", "tiny", "--data", digits, *words) == 0
    mine, theirs = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (trained, tmp_path / "run")
    )
    assert mine == theirs and len(mine) == 4


def test_tokens_and_likelihood_are_those_of_the_shards(trained: Path, digits: Path, tmp_path: Path) -> None:
    model = igpt_ds.load(trained)
    held_out = Dataset.open(digits / "val")
    pixels = model.decode(held_out.images())
    assert pixels.shape == (held_out.rows, 8, 8, 3)
    # The palette has every grey of the digits: nothing is lost on the way back.
    assert (model.encode(pixels) == held_out.images()).all()
    evaluate(evaluation("likelihood"), trained, tmp_path / "eval.json", per_image=tmp_path / "images.jsonl")
    each = [json.loads(line)["nats_per_token"] for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(-model.log_likelihood(pixels) / 64, each, rtol=1e-5)
    logits = model.logits(held_out.images()[:3])
    assert tuple(logits.shape) == (3, 64, model.palette.k) == (3, 64, model.config.palette_size)
    log_p = logits.double().log_softmax(-1).numpy()
    chosen = np.take_along_axis(log_p, held_out.images()[:3, :, None].astype(np.int64), axis=2)
    np.testing.assert_allclose(model.log_likelihood(pixels[:3]), chosen.sum((1, 2)), rtol=1e-5)


def test_features_are_the_means_that_the_paper_takes(trained: Path, images: np.ndarray) -> None:
    model = igpt_ds.load(trained)
    found = model.features(images)
    assert found.shape == (8, 3, 32) and found.dtype == np.float32
    pooled: list[np.ndarray] = []
    hook = model.network.blocks[1].norm_attention.register_forward_hook(
        lambda module, inputs, output: pooled.append(output.mean(1).numpy())
    )
    one = model.features(images, 1)
    hook.remove()
    np.testing.assert_allclose(one[:, 0], pooled[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:, 1], one[:, 0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(model.features(images, [1], norm="none"), one)


def test_images_may_be_arrays_pictures_and_paths(trained: Path, images: np.ndarray, tmp_path: Path) -> None:
    model = igpt_ds.load(trained)
    Image.fromarray(images[0]).save(tmp_path / "0.png")
    mixed = [images[0], Image.fromarray(images[0]), tmp_path / "0.png", str(tmp_path / "0.png")]
    tokens = model.encode(mixed)
    assert (tokens == tokens[0]).all() and tokens.shape == (4, 64)
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (model.encode([transparent]) == model.encode(np.full((1, 8, 8, 3), 255, np.uint8))).all()


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((8, 8, 3)), r"image 0: float64 \[8, 8, 3\]: give uint8"),
        (np.zeros((8, 8), np.uint8), "give uint8"),
        ("there/is/none.png", "none.png: cannot be used"),
        (__file__, "test_api.py: cannot be used .*not an image"),
        (np.zeros((8, 9, 3), np.uint8), "image 0: cannot be used .*not square"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(trained: Path, image: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        igpt_ds.load(trained).encode([image])  # type: ignore[list-item]
    assert "\n" not in str(caught.value)


def test_what_makes_no_sense_is_refused(trained: Path, images: np.ndarray) -> None:
    model = igpt_ds.load(trained)
    for refused, complaint in (
        (lambda: model.features(images, 3), "has layers 0 to 2"),
        (lambda: model.features(images, []), "has layers 0 to 2"),
        (lambda: model.complete(images, rows=8), "give 1 to 7"),
        (lambda: model.logits(np.zeros((1, 63), np.int64)), r"takes \[N, 64\]"),
        (lambda: model.logits(np.full((1, 64), 16)), "the model knows 16"),
        (lambda: igpt_ds.load("there/is/none"), "there/is/none"),
        (lambda: igpt_ds.evaluate("prob", trained), "choose from eval, low-data, probe"),
    ):
        with pytest.raises(UserError, match=complaint):
            refused()


def test_drawn_images_are_those_of_the_command_line(
    trained: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = igpt_ds.load(trained)
    assert call(monkeypatch, "sample", trained, "--images", "3", "--seed", "5", "--npz", tmp_path / "a.npz") == 0
    assert (model.sample(3, seed=5) == np.load(tmp_path / "a.npz")["arr_0"]).all()
    completed = model.complete(images[:2], rows=5, seed=1)
    assert (completed[:, :5] == model.decode(model.encode(images[:2]))[:, :5]).all()
    assert not (completed[:, 5:] == images[:2, 5:]).all()


def test_a_pipeline_of_scikit_learn_is_a_probe(trained: Path, images: np.ndarray) -> None:
    features = igpt_ds.Features(trained, layer=1)
    assert features.get_params() == {"where": trained, "layer": 1}
    found = features.fit_transform(images)
    np.testing.assert_array_equal(found, igpt_ds.load(trained).features(images, 1)[:, 0])
    LogisticRegression(max_iter=50).fit(found, np.arange(8) % 2)


def test_every_example_of_the_docs_runs(
    digits: Path, trained: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, target in (("data", digits), ("runs/s", trained)):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).symlink_to(target)
    for name in ("cat", "dog"):
        Image.fromarray(images[0]).save(f"{name}.png")
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    labels = np.arange(8) % 2
    known = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    for block in blocks:
        exec(block, known)
    assert json.loads((Path("runs/tiny") / "probe.json").read_text())["best_layer"] == known["record"]["best_layer"]
