"""Weights out and in: what is written means the same to Hugging Face's code and to the released code, bit for bit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, ImageGPTConfig, ImageGPTForCausalImageModeling

import igpt_ds
from igpt_ds.atomic import unfinished
from igpt_ds.checkpoint.read import Checkpoint, Shard
from igpt_ds.config.file import to_tree
from igpt_ds.config.schema import Config
from igpt_ds.config.size import parameter_count
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import RunError, UserError
from igpt_ds.features.extract import load_model
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.run.metrics import read_metrics
from igpt_ds.weights.base import Imported, config_of, palette_of
from igpt_ds.weights.convert import convert, streamed_logits
from igpt_ds.weights.formats import huggingface, open_weights, single
from tests.helpers.checkpoints import on_ranks, save
from tests.helpers.commands import call
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import ROOT, quick_start

PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32))


def digits_config(objective: str = "next_pixel", *more: str) -> Config:
    return small_config(f"objective.name={objective}", "model.heads=4", *more, resolution=8, palette_size=16)


def saved_run(folder: Path, objective: str = "next_pixel", *more: str) -> tuple[Path, ImageGPT]:
    """A run whose gains (and biases) differ from their beginnings."""
    config = digits_config(objective, *more)
    model = random_model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gain", "bias")):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    save_model(model, config, folder, PALETTE.sha256)
    PALETTE.save(folder / "palette.npy")
    return folder, model


def tokens(count: int = 3) -> Tensor:
    return torch.randint(16, (count, 64), generator=torch.Generator().manual_seed(1))


def same(found: dict[str, Tensor], model: ImageGPT) -> bool:
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return all(found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
@pytest.mark.parametrize("target", ["safetensors", "hf", "npz", "native"])
def test_round_trips_are_exact_to_the_bit(tmp_path: Path, objective: str, target: str) -> None:
    run, model = saved_run(tmp_path / "run", objective)
    there, back = tmp_path / "there", tmp_path / "back"
    report = convert(run, there, target, shard_bytes=20_000)  # type: ignore[arg-type]
    convert(there, back, "native")
    original, found = open_weights(run), open_weights(back)
    assert isinstance(found, Checkpoint)
    assert same(found.weights(), model)
    assert (found.step, found.config, found.identity) == (7, original.config, original.identity)
    assert np.array_equal(Palette.load(back / "palette.npy").colours, PALETTE.colours)
    text = report.text()
    assert f"{parameter_count(digits_config(objective)):,}" in text and PALETTE.sha256 in text
    assert ("cannot run it" in text) == (target == "hf" and objective == "masked_pixel")
    assert report.logits is not None and report.logits < 1e-5
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("bias", ["false", "true"])
def test_hugging_face_loads_what_is_written(tmp_path: Path, bias: str, shard_bytes: int) -> None:
    run, ours = saved_run(tmp_path / "run", "next_pixel", f"model.bias={bias}")
    convert(run, tmp_path / "hf", "hf", shard_bytes=shard_bytes)
    theirs, facts = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(facts[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert any(name.endswith("c_fc.bias") and bool(p.any()) for name, p in theirs.named_parameters()) == (
        bias == "true"
    )
    shifted = torch.cat([torch.full((3, 1), 16), tokens()[:, :-1]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(shifted).logits, ours(tokens()).logits_BTK, rtol=0, atol=2e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert np.array_equal(np.asarray(processor.clusters, np.float32), PALETTE.colours)
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    found = np.asarray(processor(image, return_tensors="np")["input_ids"])
    assert np.array_equal(found.reshape(-1), PALETTE.encode(image).reshape(-1))
    if shard_bytes < 10**9:
        files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
        assert len(files) > 2 and all(file.stat().st_size < 30_000 for file in files)


@pytest.mark.parametrize("storage", ["safetensors", "sharded", "bin", "half"])
@pytest.mark.parametrize("biased", [False, True])
def test_directories_that_transformers_writes_are_read(tmp_path: Path, storage: str, biased: bool) -> None:
    torch.manual_seed(0)
    theirs = ImageGPTForCausalImageModeling(
        ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0, 0.2)
            if name.endswith("bias") and not biased:
                parameter.zero_()
    if storage == "half":
        theirs = theirs.bfloat16()
    if storage == "bin":
        theirs.config.save_pretrained(tmp_path / "hf")
        # As the released files: older code stored the causal masks, too.
        masks = {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        }
        torch.save({**theirs.state_dict(), **masks}, tmp_path / "hf" / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if storage == "sharded" else "1GB")
    weights = open_weights(tmp_path / "hf")
    config = config_of(weights)
    assert (config.model.layers, config.model.width, config.model.heads, config.model.bias) == (2, 32, 4, biased)
    assert (config.data.resolution, config.palette_size, config.causal, weights.step) == (8, 16, True, 0)
    assert weights.identity["palette_sha256"] is None and palette_of(weights) is None
    shifted = torch.cat([torch.full((3, 1), 16), tokens()[:, :-1]], dim=1)
    with torch.no_grad():
        expected = theirs.float()(shifted).logits
        torch.testing.assert_close(load_model(config, weights)(tokens()).logits_BTK, expected, rtol=0, atol=3e-5)
        torch.testing.assert_close(streamed_logits(weights, config, tokens()), expected, rtol=0, atol=3e-5)
    if storage == "sharded":
        assert (tmp_path / "hf" / huggingface.INDEX).exists()
    report = convert(tmp_path / "hf", tmp_path / "back", "hf")
    assert f"source by transformers {transformers.__version__}, result by transformers" in report.text()
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], value.float()) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", ["ImageGPTModel", "ImageGPTForImageClassification"])
def test_a_model_without_a_head_over_the_colours_gives_features(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(saved_run(tmp_path / "run")[0], tmp_path / "hf", "hf")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "bare")
    shutil.copy(tmp_path / "hf" / "preprocessor_config.json", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    config.pop("igpt_ds")  # as anybody's
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    bare, whole = igpt_ds.load(tmp_path / "bare"), igpt_ds.load(tmp_path / "hf")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(bare.features(images), whole.features(images))
    tokens = bare.encode(images)
    for refused in (lambda: bare.logits(tokens), lambda: bare.log_likelihood(images), lambda: bare.sample(1)):
        with pytest.raises(UserError, match="no head over the colours"):
            refused()
    monkeypatch.chdir(tmp_path)
    for words in (["sample", "bare", "--out", "x.png"], ["convert", "bare", "x", "--to", "npz"]):
        assert call(monkeypatch, *words) == 2
        assert "no head over the colours" in capsys.readouterr().err


def test_the_model_card_tells_the_training_and_its_code_runs(tmp_path: Path, digits: Path) -> None:
    run = igpt_ds.pretrain("tiny", digits, tmp_path / "run", training={"steps": 2, "batch": 8, "validate_every": 2})
    convert(run, tmp_path / "hf", "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    loss = next(line["val_loss"] for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line)
    assert "2 of 2 steps of 8 images, float32" in text and f"{loss:.4f} nats a token, 67 images" in text
    assert f"{parameter_count(config_of(open_weights(run))):,}" in text and str(tmp_path) not in text
    # Other weights that lie in a run are not its checkpoint, whatever their step is.
    convert(run, run / "exported" / "single", "safetensors")
    convert(run / "exported" / "single", tmp_path / "again", "hf")
    assert "validation loss" not in (tmp_path / "again" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    image = np.zeros((8, 8, 3), np.uint8)
    known: dict[str, Any] = {"FOLDER": str(tmp_path / "hf"), "image": image}
    assert code is not None
    exec(code[1], known)
    model = igpt_ds.load(run)
    expected = model.logits(model.encode(image[None]))
    torch.testing.assert_close(known["logits"].detach(), expected, rtol=0, atol=1e-5)


def test_a_class_head_becomes_hugging_faces(tmp_path: Path, digits: Path) -> None:
    config = digits_config("next_pixel", "finetune.classes=10", f'data.sources=["{digits}"]')
    model = random_model(config)
    with torch.no_grad():
        model.class_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    save_model(model, config, tmp_path / "run", PALETTE.sha256, sources=[str(digits)])
    report = convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert "start it with token 16" in report.text() and "left out" not in report.text()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == "ImageGPTForImageClassification"
    assert theirs.config.id2label == {number: str(number) for number in range(10)}
    shifted = torch.cat([torch.full((3, 1), 16), tokens()[:, :-1]], dim=1)
    with torch.no_grad():
        expected = model.eval()(tokens()).class_logits_BC
        torch.testing.assert_close(theirs(shifted).logits, expected, rtol=0, atol=1e-6)
    assert same(open_weights(tmp_path / "hf").weights(), model)
    # A head on an earlier layer has no place there.
    config = digits_config("next_pixel", "finetune.classes=10", "finetune.layer=1")
    save_model(random_model(config), config, tmp_path / "early", PALETTE.sha256)
    assert "class_head.weight: Hugging Face" in convert(tmp_path / "early", tmp_path / "without", "hf").text()


def released_logits(arrays: dict[str, np.ndarray], tokens_BT: Tensor, layers: int) -> Tensor:
    """The released network in float64, by its published equations and variable names; no masks of BERT."""
    variables = {name.removeprefix("model/"): torch.from_numpy(np.asarray(a, np.float64)) for name, a in arrays.items()}

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gain

    h = variables["wte"][tokens_BT]
    causal = "sos" in variables
    if causal:
        h = torch.cat([variables["sos"].expand(len(h), 1, -1), h[:, :-1]], dim=1)
    h = h + variables["wpe"]
    for layer in range(layers):
        at = {
            name.removeprefix(f"h{layer}/"): value for name, value in variables.items() if name.startswith(f"h{layer}/")
        }
        x = norm(h, at["ln_1/g"])
        q, k, v = (torch.einsum("bsf,hef->bhse", x, at[f"attn/{part}_proj"]) for part in "qkv")
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -1e10)
        h = h + torch.einsum("bhse,hef->bsf", scores.softmax(-1) @ v, at["attn/c_proj"])
        x = norm(h, at["ln_2/g"]) @ at["mlp/c_fc/w"]
        h = h + (x * torch.sigmoid(1.702 * x)) @ at["mlp/c_proj/w"]
    return norm(h, variables["ln_f/g"]) @ variables["wtet"].T


@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_the_released_names_mean_the_released_equations(tmp_path: Path, objective: str) -> None:
    run, model = saved_run(tmp_path / "run", objective)
    convert(run, tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert np.array_equal(arrays.pop("kmeans_centers"), PALETTE.colours)
    assert json.loads(str(arrays.pop("igpt_ds")))["step"] == 7
    assert arrays["model/h1/attn/q_proj"].shape == (4, 8, 32)
    assert ("model/sos" in arrays) == (objective == "next_pixel")
    with torch.no_grad():
        expected = model(tokens()).logits_BTK.double()
    torch.testing.assert_close(released_logits(arrays, tokens(), 2), expected, rtol=0, atol=1e-5)
    # As np.savez of somebody who read the released files: no facts of ours, an optimiser's variables among them.
    more = {"global_step": np.array(131_000), "model/h0/mlp/c_fc/w/Adam": np.zeros(3), "clf/wclf": np.zeros((10, 32))}
    np.savez_compressed(tmp_path / "plain.npz", **{**arrays, **more})
    PALETTE.save(tmp_path / "centres.npy")
    report = convert(tmp_path / "plain.npz", tmp_path / "back", "native", palette_path=tmp_path / "centres.npy")
    assert report.logits == 0
    back = open_weights(tmp_path / "back")
    assert same(back.weights(), model)
    assert config_of(back).objective.name == objective and config_of(back).model.heads == 4
    assert back.identity["palette_sha256"] == PALETTE.sha256


def test_a_tensorflow_checkpoint_is_read_by_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = saved_run(tmp_path / "run")
    convert(run, tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        arrays = {name: array for name, array in file.items() if name.startswith("model/")}
    magic = bytes.fromhex("57fb808b247547db")
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "model.ckpt-1000000.index").write_bytes(b"\0" * 40 + magic)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="which TensorFlow alone reads: install it"):
        open_weights(tmp_path / "tf" / "model.ckpt-1000000")

    class Reader:
        def __init__(self, prefix: str):
            assert prefix == str(tmp_path / "tf" / "model.ckpt-1000000")

        def get_variable_to_shape_map(self) -> dict[str, list[int]]:
            return {name: list(array.shape) for name, array in arrays.items()} | {"beta1_power": []}

        def get_tensor(self, name: str) -> np.ndarray:
            return arrays[name]

    class Train:
        load_checkpoint = Reader

    class TensorFlow:
        train = Train

    monkeypatch.setitem(sys.modules, "tensorflow", TensorFlow)
    for path in (tmp_path / "tf", *(tmp_path / "tf" / f"model.ckpt-1000000{end}" for end in ("", ".index"))):
        weights = open_weights(path)
        assert isinstance(weights, Imported) and same(weights.weights(), model)
    (tmp_path / "tf" / "model.ckpt-2.index").write_bytes(magic)
    with pytest.raises(UserError, match=r"several TensorFlow checkpoints \(model.ckpt-1000000, model.ckpt-2\)"):
        open_weights(tmp_path / "tf")


@pytest.mark.parametrize("world", [1, 3])
def test_slices_of_any_number_of_ranks_become_one_file(tmp_path: Path, world: int) -> None:
    config = digits_config()
    model = random_model(config)

    def shards(rank: int) -> list[Shard]:
        found = []
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1)
            part = -(-len(flat) // world)
            start, stop = min(rank * part, len(flat)), min((rank + 1) * part, len(flat))
            found.append(Shard(name, tuple(parameter.shape), start, stop, lambda kind, part=flat[start:stop]: part))
        return found

    facts = {"identity": {"palette_sha256": PALETTE.sha256}, "config": to_tree(config)}
    on_ranks(world, lambda r, any_rank: save(tmp_path / "checkpoints", 3, shards(r), facts, r, world, any_rank))
    report = convert(tmp_path, tmp_path / "out", "safetensors", step=3)
    assert f"checkpoint of {world} ranks, step 3" in report.text()
    stored = load_file(tmp_path / "out" / single.FILE)
    assert same(stored, model)
    digest = json.loads((tmp_path / "out" / "config.json").read_text())["sha256"]
    assert re.search(rf"sha256 +{digest}  model.safetensors", report.text())


def test_bfloat16_halves_the_file_and_says_what_it_loses(tmp_path: Path) -> None:
    run, model = saved_run(tmp_path / "run")
    for target, name in (("safetensors", single.FILE), ("hf", "model.safetensors")):
        report = convert(run, tmp_path / target, target, precision="bfloat16")  # type: ignore[arg-type]
        assert report.logits is not None and 1e-4 < report.logits < 0.05
        found = open_weights(tmp_path / target).weights()
        assert all(torch.equal(found[key], value.bfloat16().float()) for key, value in model.named_parameters())
        stored = load_file(tmp_path / target / name)
        assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="npz holds float32 alone"):
        convert(run, tmp_path / "x", "npz", precision="bfloat16")


def test_a_class_head_stays_where_there_is_a_place_for_it(tmp_path: Path) -> None:
    run, _ = saved_run(tmp_path / "run", "next_pixel", "finetune.classes=10")
    assert "left out" not in convert(run, tmp_path / "single", "safetensors").text()
    assert open_weights(tmp_path / "single").tensors["class_head.weight"] == {"shape": [10, 32]}
    report = convert(run, tmp_path / "npz", "npz")
    assert re.search("left out +class_head.weight", report.text())
    assert config_of(open_weights(tmp_path / "npz")).finetune is None
    assert "class_head.weight" not in open_weights(tmp_path / "npz").tensors


def test_nothing_is_published_that_is_not_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = saved_run(tmp_path / "run")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(run, tmp_path / "there", "hf")
    monkeypatch.setattr(huggingface, "transposed", lambda matrix: iter([matrix]))  # a mistake in the writer
    with pytest.raises(RunError, match="values differ"):
        convert(run, tmp_path / "out", "hf")
    wrong = {**huggingface._LINEAR, "mlp.up": "mlp.c_proj", "mlp.down": "mlp.c_fc"}
    monkeypatch.setattr(huggingface, "_LINEAR", wrong)
    with pytest.raises((RunError, UserError)):
        convert(run, tmp_path / "out", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


@pytest.mark.parametrize("target", ["npz", "safetensors"])
def test_what_killed_conversions_left_is_cleared(tmp_path: Path, target: str) -> None:
    run, _ = saved_run(tmp_path / "run")
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")
    killed = [unfinished(out), unfinished(out), tmp_path / ".out.tmp"]
    (killed[0] / "inside").mkdir(parents=True)
    killed[1].write_bytes(b"half")
    killed[2].symlink_to(victim)
    convert(run, out, target)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "victim"}
    assert victim.read_text() == "mine"


def test_a_palette_is_taken_only_if_it_fits(tmp_path: Path) -> None:
    run, _ = saved_run(tmp_path / "run")
    Palette(-PALETTE.colours).save(tmp_path / "other.npy")
    Palette(PALETTE.colours[:5]).save(tmp_path / "small.npy")
    with pytest.raises(UserError, match=r"is not the one that .* was trained with"):
        convert(run, tmp_path / "out", "hf", palette_path=tmp_path / "other.npy")
    with pytest.raises(UserError, match="has 5 colours, not 16"):
        convert(run, tmp_path / "out", "hf", palette_path=tmp_path / "small.npy")
    with pytest.raises(UserError, match="biases, which the released code has not"):
        convert(saved_run(tmp_path / "biased", "next_pixel", "model.bias=true")[0], tmp_path / "out.npz", "npz")
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("out*"))


MEASURE = """
import sys, threading, time
from pathlib import Path
from igpt_ds.weights.convert import convert

def anonymous():  # memory that is no part of a mapped file, bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

convert(Path(sys.argv[1]), Path(sys.argv[2]) / "small", sys.argv[4])  # what is loaded and allocated once
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
convert(Path(sys.argv[3]), Path(sys.argv[2]) / "large", sys.argv[4])
done.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("target", ["safetensors", "npz", "native"])
def test_memory_is_bounded_by_parameters_not_by_the_model(tmp_path: Path, target: str) -> None:
    saved_run(tmp_path / "small-run")
    config = digits_config("next_pixel", "model.width=512", "model.layers=8")
    model = ImageGPT(config)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(p.shape, generator=generator) / 50 for name, p in model.named_parameters()}
    size = sum(value.numel() * 4 for value in weights.values())
    del model
    (tmp_path / "large-run").mkdir()
    save_file(weights, tmp_path / "large-run" / single.FILE)
    facts = {"format": single.FORMAT, "version": 1, "step": 0, "identity": {}, "config": to_tree(config)}
    from igpt_ds.atomic import sha256_file

    facts["sha256"] = sha256_file(tmp_path / "large-run" / single.FILE)
    (tmp_path / "large-run" / "config.json").write_text(json.dumps(facts))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small-run", tmp_path, tmp_path / "large-run", target],
        env=quick_start() | {"MALLOC_MMAP_THRESHOLD_": "262144"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert size > 100e6
    assert int(done.stdout.split()[-1]) < 50e6, "more than a layer and a few blocks"
