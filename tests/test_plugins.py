"""One file adds an objective, a source, an evaluation, a format of weights or a verb: each is added here, and used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds import objectives
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.file import to_toml
from igpt_ds.dataset.shards import Dataset
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.run.metrics import read_metrics
from igpt_ds.weights.base import config_of
from tests.helpers.models import random_model, save_model, small_config

ROOT = Path(__file__).parents[1]


def call(folder: Path, package: str, *words: object, status: int = 0) -> str:
    """Run a command line whose package has the files of `folder`, too; what it printed, or its errors."""
    program = "data_prep" if package.startswith("data_prep") else "igpt_ds"
    script = (
        f"import sys, {package} as package\n"
        f"package.__path__.append({str(folder)!r})\n"
        f"sys.argv = [{program!r}, *sys.argv[1:]]\n"
        f"from {program}.cli import main\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def add(folder: Path, name: str, text: str) -> Path:
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint, of step 7, of a random network."""
    palette = Dataset.open(digits / "train").palette
    config = small_config(resolution=8, palette_size=16)
    save_model(random_model(config), config, tmp_path / "run", palette.sha256, sources=[str(digits)])
    palette.save(tmp_path / "run" / "palette.npy")
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    return tmp_path / "run"


def test_an_objective_says_whether_it_is_causal(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of next_pixel under another name trains as it does, and sees only what stands before."""
    text = Path(objectives.__file__).with_name("next_pixel.py").read_text()
    folder = add(tmp_path / "objectives", "next_colour", text)
    losses = {}
    for name in ("next_pixel", "next_colour"):
        settings = ("training.steps=3", f"objective.name={name}", "training.log_every=1", "training.validate_every=0")
        words = ["pretrain", tmp_path / name, "--preset", "tiny", "--data", digits]
        words += [word for setting in settings for word in ("--set", setting)]
        text_of_run = call(folder, "igpt_ds.objectives", *words)
        assert f"objective   {name}, 64 tokens" in text_of_run
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["next_colour"] == losses["next_pixel"] and len(losses["next_pixel"]) == 3
    checkpoint = Checkpoint.open(tmp_path / "next_colour" / "checkpoints" / "step-00000003")
    assert "start" in checkpoint.tensors
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(folder)])
    model = ImageGPT(config_of(checkpoint))
    model.load_state_dict(checkpoint.weights())
    tokens = torch.randint(16, (2, 64), generator=torch.Generator().manual_seed(0))
    later = torch.cat([tokens[:, :30], (tokens[:, 30:] + 1) % 16], dim=1)
    logits, others = (model(each).logits_BTK[:, :31] for each in (tokens, later))
    assert torch.equal(logits, others)


def test_an_objective_that_does_not_say_it_is_refused(digits: Path, tmp_path: Path) -> None:
    text = Path(objectives.__file__).with_name("next_pixel.py").read_text()
    folder = add(tmp_path / "objectives", "silent", text.replace("CAUSAL = True\n", ""))
    words = ["pretrain", tmp_path / "run", "--preset", "tiny", "--data", digits, "--set", "objective.name=silent"]
    errors = call(folder, "igpt_ds.objectives", *words, status=2)
    assert errors == (
        "igpt-ds: objective silent: does not say whether it is causal: write CAUSAL = True or False in it\n"
    )
    words[-1] = "objective.name=loud"
    assert "must be one of masked_pixel, next_pixel, silent, not 'loud'" in call(
        folder, "igpt_ds.objectives", *words, status=2
    )


SOURCE = '''"""Squares of one colour each."""

import io
from dataclasses import dataclass

from PIL import Image

from data_prep.sources import Item


@dataclass(frozen=True)
class Squares:
    count: int
    name: str = "squares"
    classes: list[str] | None = None

    def items(self, pool):
        return [Item(str(i), None) for i in range(self.count)] if pool == "train" else []

    def read(self, item_id):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (int(item_id) * 20, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()


def open_source(paths, *, count=None):
    return Squares(int(count or 3))
'''


def test_a_source(tmp_path: Path) -> None:
    folder = add(tmp_path / "sources", "squares", SOURCE)
    palette = tmp_path / "palette.npy"
    images = ("squares", "anywhere", "--option", "count=9", "--no-crop")
    call(folder, "data_prep.sources", "palette", *images, "--k", 9, "--out", palette)
    words = ("--resolution", 8, "--palette", palette, "--holdout", 0, "--out", tmp_path / "data")
    assert "9 images" in call(folder, "data_prep.sources", "shards", *images, *words)
    assert len(np.unique(Dataset.open(tmp_path / "data" / "train").images())) == 9


EVALUATION = '''"""How many colours the first images of a split use."""

import click

from igpt_ds.text import Table

NAME, TITLE = "colour-count", "Colours in use"
HOLDS = {"colours": int, "images": int}
OPTIONS = (click.Option(["--images"], type=int, default=5, help="How many are looked at."),)


def run(subject, *, images):
    """Count colours."""
    _, _, splits = subject.labelled(test=False)
    return {"colours": len(set(splits.validation.images(images).ravel().tolist())), "images": images}


def table(record):
    return Table("", ["images", "colours"], [[str(record["images"]), str(record["colours"])]])


def figure(record):
    from igpt_ds.plots import new

    drawn = new()
    drawn.subplots().bar(["colours"], [record["colours"]])
    return drawn
'''


def test_an_evaluation(run: Path, digits: Path, tmp_path: Path) -> None:
    folder, package = add(tmp_path / "evals", "colour_count", EVALUATION), "igpt_ds.evals"
    assert "colour-count  Count colours." in call(folder, package, "--help")
    assert "How many are looked at." in call(folder, package, "colour-count", "--help")
    printed = call(folder, package, "colour-count", run, "--images", 7)
    record = json.loads((run / "colour_count.json").read_text())
    assert record == {"colours": len(np.unique(Dataset.open(digits / "val").images(7))), "images": 7}
    assert printed.splitlines()[1].split() == ["7", str(record["colours"])]
    assert (run / "colour_count.png").read_bytes().startswith(b"\x89PNG")
    call(folder, package, "report", run)
    assert "<h2>Colours in use</h2>" in (run / "report.html").read_text()
    (run / "colour_count.json").write_text("{}")
    assert "no record of igpt-ds colour-count (colours is missing" in call(folder, package, "report", run, status=2)


FORMAT = '''"""Weights as JSON."""

import json

import torch

from igpt_ds.atomic import publish_text
from igpt_ds.weights.base import whole
from igpt_ds.weights.formats._facts import imported, record

NAME, FOLDER, PRECISIONS = "json", False, ("float32",)


def recognises(path):
    return path.is_file() and path.read_bytes()[:1] == b"{"


def read(path):
    content = json.loads(path.read_text())
    tensors = {name: torch.tensor(values) for name, values in content["tensors"].items()}
    rows = lambda name, first, last: tensors[name][first:last]
    return imported(path, "JSON", content["record"], None, rows, None, {path.name: {}})


def write(weights, palette, place, precision, tick, shard_bytes):
    tensors = {name: whole(weights, name).tolist() for name in weights.tensors}
    publish_text(place, json.dumps({"record": record(weights, palette), "tensors": tensors}))
    return {place.name: "none"}
'''


def test_a_format_of_weights(run: Path, digits: Path, tmp_path: Path) -> None:
    folder, package = add(tmp_path / "formats", "as_json", FORMAT), "igpt_ds.weights.formats"
    out = tmp_path / "weights.json"
    assert "(json, float32)" in call(folder, package, "convert", run, out, "--to", "json")
    probe = ("--images", 20, "--layers", 1, "--regularisation", 1)
    records = []
    for weights, record in ((out, tmp_path / "a.json"), (run, tmp_path / "b.json")):
        call(folder, package, "probe", weights, "--data", digits, "--json", record, *probe)
        records.append(json.loads(record.read_text()))
    assert records[0]["layers"] == records[1]["layers"]
    refused = call(folder, package, "convert", run, tmp_path / "x", "--to", "yaml", status=2)
    assert "--to yaml: no format that is written: choose from hf, json, native, npz, safetensors" in refused


VERB = '''"""Greets."""

import click


@click.command()
def hello() -> None:
    """Say hello."""
    click.echo("hello")
'''


def test_a_verb(tmp_path: Path) -> None:
    folder = add(tmp_path / "commands", "hello", VERB)
    for package in ("igpt_ds.commands", "data_prep.commands"):
        assert "Say hello." in call(folder, package, "--help")
        assert call(folder, package, "hello") == "hello\n"
