"""Networks larger than the memory they may take: the same results, and no more memory than that."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import igpt_ds
from igpt_ds.errors import UserError
from igpt_ds.weights.base import config_of
from igpt_ds.weights.formats import open_weights
from igpt_ds.weights.placed import Placement, parse_placement, place
from tests.helpers.commands import call
from tests.helpers.models import random_model, save_model, small_config

ONE_BLOCK = 4 * (12 * 32**2 + 2 * 32)  # bytes, float32
REST = 4 * (16 * 32 * 2 + 32 + 64 * 32 + 32)  # embeddings, start vector, final norm, head


def test_parts_lie_where_they_fit_and_nothing_changes(whole: Path) -> None:
    weights = open_weights(whole / "run")
    depth = config_of(weights).model.layers
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    plain = igpt_ds.load(whole / "run")
    tokens = plain.encode(images)
    for blocks in range(depth + 1):
        room = REST + (1 + blocks) * ONE_BLOCK
        network = place(config_of(weights), weights, "float32", Placement(cpu=room))
        on_disk = [name for name, parameter in network.named_parameters() if parameter.device.type == "meta"]
        assert len({name.split(".")[1] for name in on_disk}) == depth - blocks
        placed = igpt_ds.load(whole / "run", device_map="auto", max_memory=f"cpu={room}")
        torch.testing.assert_close(placed.logits(tokens), plain.logits(tokens), rtol=0, atol=0)
        np.testing.assert_array_equal(placed.features(images), plain.features(images))
        np.testing.assert_array_equal(placed.sample(2, seed=3), plain.sample(2, seed=3))
    with pytest.raises(UserError, match="what stays on the device, and a block, take"):
        place(config_of(weights), weights, "float32", Placement(cpu=REST + ONE_BLOCK - 1))
    half = igpt_ds.load(whole / "run", precision="bfloat16", device_map="auto", max_memory=f"cpu={REST + ONE_BLOCK}")
    expected = igpt_ds.load(whole / "run", precision="bfloat16").features(images)
    np.testing.assert_array_equal(half.features(images), expected)


def test_the_commands_take_it(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = igpt_ds.pretrain("tiny", digits, tmp_path / "run", training={"steps": 2, "batch": 4})
    words = ["--device-map", "auto", "--max-memory", "cpu=0.1MB"]
    for verb, out in (("eval", "eval.json"), ("probe", "probe.json"), ("low-data", "low_data.json")):
        more = ["--labels", "4"] if verb == "low-data" else []
        assert call(monkeypatch, verb, run, *more) == 0
        plain = json.loads((run / out).read_text())
        assert call(monkeypatch, verb, run, *more, *words) == 0
        assert json.loads((run / out).read_text()) == plain
    for more, name in ([], "plain.npz"), (words, "placed.npz"):
        assert call(monkeypatch, "sample", run, "--images", "2", "--npz", tmp_path / name, *more) == 0
    assert (np.load(tmp_path / "plain.npz")["tokens"] == np.load(tmp_path / "placed.npz")["tokens"]).all()


@pytest.mark.parametrize(
    ("device_map", "max_memory", "complaint"),
    [
        (None, "cpu=1GB", "belongs to --device-map auto"),
        ("auto", "cpu", "not of the form gpu=20GiB,cpu=8GiB"),
        ("auto", "cpu=much", "not of the form"),
        ("auto", "tpu=1GB", "not of the form"),
        ("auto", "cpu=1GB,,", "not of the form"),
    ],
)
def test_what_makes_no_sense_is_refused(device_map: str | None, max_memory: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_placement(device_map, max_memory)
    assert parse_placement("auto", "gpu=2GiB, cpu=1MB") == Placement(2 << 30, 10**6)
    assert parse_placement("auto", None) == Placement() and parse_placement(None, None) is None


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A network of 450 MiB within 40 and what a block and libraries take: of memory that is no file's."""
    config = small_config("model.layers=36", "model.width=512", "model.heads=8", resolution=4, palette_size=8)
    save_model(random_model(config), config, tmp_path / "run", "0" * 64)
    code = (
        "import sys, torch, igpt_ds, numpy as np\n"
        "torch.set_num_threads(1)\n"
        "def own():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if 'RssAnon' in line) / 1024\n"
        "small = np.zeros((1, 16), np.int64)\n"
        "from igpt_ds.weights import placed\n"
        "import accelerate.utils, accelerate.hooks\n"
        "before = own()\n"
        "model = igpt_ds.load(sys.argv[1], **(dict(device_map='auto', max_memory='cpu=40MB') if sys.argv[2] else {}))\n"
        "loaded = own()\n"
        "for _ in range(3): model.logits(small)\n"
        "print(loaded - before, own() - before)\n"
    )
    taken = []
    for placed in ("", "yes"):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), placed]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        taken.append([float(word) for word in done.stdout.split()])
    assert taken[0][0] > 450 and max(taken[1]) < 200, taken
