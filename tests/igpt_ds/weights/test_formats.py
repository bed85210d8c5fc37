"""Weights from strangers: what is damaged, mismatched or malicious is one line and exit status 2, and nothing runs."""

import io
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt_ds.errors import UserError
from igpt_ds.weights.formats import huggingface, open_weights, single
from tests.igpt_ds.weights.conftest import Refused


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def truncate(path: Path, share: float = 0.6) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_each_format_is_recognised_by_its_content(whole: Path, tmp_path: Path) -> None:
    moved = tmp_path / "no suffix"
    shutil.copy(whole / "out.npz", moved)
    expected = open_weights(whole / "run").weights()
    inside = [whole / "hf" / "model.safetensors", whole / "sharded" / "model-00002-of-00007.safetensors"]
    inside += [whole / "single" / single.FILE, next((whole / "native").glob("checkpoints/step-*"))]
    for path in (moved, *inside, *(whole / name for name in ("hf", "sharded", "single", "native"))):
        found = open_weights(path).weights()
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found), path


def test_parts_are_read_across_rows(whole: Path) -> None:
    expected = open_weights(whole / "run").weights()
    for name in ("hf", "single", "out.npz"):
        weights = open_weights(whole / name)
        for tensor, value in expected.items():
            flat = value.reshape(-1)
            for start, stop in ((0, 1), (3, len(flat)), (len(flat) // 3, len(flat) // 2), (5, 5)):
                assert torch.equal(weights.read(tensor, "weight", start, stop), flat[start:stop]), (name, tensor)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_embd": float("nan")}, "NaN is no number"),
        ({"n_embd": 32.5}, "n_embd is 32.5, no whole number above 0"),
        ({"n_layer": -2}, "n_layer is -2"),
        ({"n_layer": 10**12}, "1000000000000 layers, but"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_head": 5}, "another network"),
        ({"n_layer": 3}, "tensor transformer.h.2.* is missing (and"),
        ({"n_layer": 1}, "tensor transformer.h.1.* is unknown"),
        ({"n_embd": 64}, "lm_head.weight is [16, 32], not [16, 64]"),
        ({"vocab_size": 16}, "lm_head.weight is [16, 32], not [15, 32]"),
        ({"n_positions": 63}, "63 positions are not those of a square image"),
        ({"n_positions": 49}, "tensor transformer.wpe.weight is [64, 32], not [49, 32]"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', not 'quick_gelu'"),
        ({"tie_word_embeddings": True}, "another network"),
        ({"scale_attn_by_inverse_layer_idx": True}, "another network"),
        ({"n_inner": 64}, "n_inner 64"),
        ({"model_type": "gpt2"}, "no run directory and no checkpoint: name a run"),
        ({"igpt_ds": 3}, "no record of ours"),
        ({"igpt_ds": {"version": 9}}, "version 9"),
        ({"igpt_ds": {"version": 1, "step": 1, "identity": {}, "config": {"objective": "x"}}}, "objective"),
        ({"igpt_ds": {"version": 1, "step": 1, "identity": {}, "config": {}}}, "model"),
    ],
    ids=str,
)
def test_configurations_that_are_wrong(copies: Path, refused: Refused, changes: dict[str, object], says: str) -> None:
    edit(copies / "hf" / "config.json", **changes)
    message = refused(copies / "hf")
    for part in says.split("*"):
        assert part in message


def test_a_configuration_that_is_a_pipe_is_not_waited_for(copies: Path, refused: Refused) -> None:
    path = copies / "hf" / "config.json"
    path.unlink()
    os.mkfifo(path)
    signal.alarm(60)
    try:
        assert "no run directory and no checkpoint" in refused(copies / "hf")
    finally:
        signal.alarm(0)


def test_a_record_of_another_network(copies: Path, refused: Refused) -> None:
    record = json.loads((copies / "hf" / "config.json").read_text())["igpt_ds"]
    record["config"]["model"]["heads"] = 2
    edit(copies / "hf" / "config.json", igpt_ds=record)
    assert "its configuration tells" in refused(copies / "hf")


def test_damaged_hugging_face_files(copies: Path, refused: Refused) -> None:
    file = copies / "hf" / "model.safetensors"
    good = file.read_bytes()
    truncate(file)
    assert "no whole safetensors file" in refused(copies / "hf")
    file.write_bytes((1 << 40).to_bytes(8, "little") + good[8:])  # a header longer than the file
    assert "no whole safetensors file" in refused(copies / "hf")
    file.write_bytes(b"")
    assert "no whole safetensors file" in refused(copies / "hf")
    file.write_bytes(good)
    rewrite(file, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    assert "tensor transformer.h.1.mlp.c_fc.weight is missing" in refused(copies / "hf")
    file.write_bytes(good)
    rewrite(file, lambda tensors: tensors.update({"extra": torch.zeros(2)}))
    assert "tensor extra is unknown" in refused(copies / "hf")
    file.write_bytes(good)
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(16, 32, dtype=torch.int64)}))
    assert "of type I64" in refused(copies / "hf")
    file.write_bytes(good)
    rewrite(file, lambda tensors: tensors["transformer.ln_f.weight"].fill_(float("nan")))
    assert "its logits are not finite" in refused(copies / "hf")
    file.unlink()
    assert "holds neither model.safetensors" in refused(copies / "hf")


def test_damaged_shards(copies: Path, refused: Refused) -> None:
    index = copies / "sharded" / huggingface.INDEX
    good = index.read_text()
    content = json.loads(good)
    missing = {**content["weight_map"], "lm_head.weight": "model-00009-of-00007.safetensors"}
    edit(index, weight_map=missing)
    assert "model-00009-of-00007.safetensors: missing" in refused(copies / "sharded")
    edit(index, weight_map={**content["weight_map"], "lm_head.weight": "model-00001-of-00007.safetensors"})
    assert "the index says that lm_head.weight is in model-00001" in refused(copies / "sharded")
    edit(index, weight_map={**content["weight_map"], "lm_head.weight": "../hf/model.safetensors"})
    assert "has no weight_map of file names in this directory" in refused(copies / "sharded")
    index.write_text("{")
    assert "not readable JSON" in refused(copies / "sharded")
    index.write_text(good)
    shutil.copy(
        copies / "sharded" / "model-00001-of-00007.safetensors", copies / "sharded" / "model-00002-of-00007.safetensors"
    )
    assert "is in model-00001-of-00007.safetensors as well" in refused(copies / "sharded")
    (copies / "sharded" / "model-00002-of-00007.safetensors").unlink()
    assert "model-00002-of-00007.safetensors: missing" in refused(copies / "sharded")


@pytest.mark.parametrize(
    "clusters", [[[0.0, 1.0]], [[2.0, 0.0, 0.0]] * 16, "red", [[0.0, 0.0, 0.0]] * 15, [[1.0], [1.0, 0.0]]]
)
def test_a_palette_that_is_none(copies: Path, refused: Refused, clusters: object) -> None:
    edit(copies / "hf" / "preprocessor_config.json", clusters=clusters)
    assert "clusters" in refused(copies / "hf") or "15 colours" in refused(copies / "hf")


def test_another_palette_than_the_recorded_one(copies: Path, refused: Refused) -> None:
    edit(copies / "hf" / "preprocessor_config.json", clusters=[[0.0, 0.0, 0.0]] * 16)
    assert "its palette is not the one that it was trained with" in refused(copies / "hf")


def test_damaged_single_files(copies: Path, refused: Refused) -> None:
    folder = copies / "single"
    good = (folder / single.FILE).read_bytes()
    (folder / single.FILE).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "its sha256 is not the one recorded" in refused(folder)
    (folder / single.FILE).write_bytes(good[:-8])
    assert "no whole safetensors file" in refused(folder)
    (folder / single.FILE).write_bytes(good)
    rewrite(folder / single.FILE, lambda tensors: tensors.pop("start"))
    assert "tensor start is missing" in refused(folder)
    (folder / single.FILE).write_bytes(good)
    config = json.loads((folder / "config.json").read_text())["config"]
    edit(folder / "config.json", config={**config, "model": {**config["model"], "layers": 10**12}})
    assert "1000000000000 layers, but" in refused(folder)
    edit(folder / "config.json", config={**config, "model": {**config["model"], "width": 2 * 10**12}})
    assert "model.width must be at most 1048576" in refused(folder)
    edit(folder / "config.json", config=None)
    assert "its facts are no record" in refused(folder)
    edit(folder / "config.json", sha256=None)
    assert "lacks the sha256" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json beside it" in refused(folder / single.FILE)
    assert "no run directory and no checkpoint" in refused(folder)
    shutil.copy(copies / "hf" / "config.json", folder / "config.json")
    shutil.copy(copies / "hf" / "model.safetensors", folder / "model.safetensors")
    (folder / "other.safetensors").write_bytes(good)
    assert "the config.json beside it is of model.safetensors" in refused(folder / "other.safetensors")


def test_damaged_npz_files(copies: Path, refused: Refused) -> None:
    path = copies / "out.npz"
    good = path.read_bytes()
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)

    def saved(**changes: np.ndarray | None) -> Path:
        changed = {**arrays, **{name.replace("__", "/"): array for name, array in changes.items()}}
        np.savez(path, **{name: array for name, array in changed.items() if array is not None})
        return path

    path.write_bytes(good[: len(good) // 2])
    assert "no run directory and no checkpoint" in refused(path)  # an archive's table stands at its end
    middle = len(good) // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    assert "Bad CRC-32" in refused(path) or "no whole .npz" in refused(path)
    assert "model/sos" in arrays
    assert "h0/mlp/c_fc/w is [32, 64], not [32, 128]" in refused(saved(model__h0__mlp__c_fc__w=np.zeros((32, 64))))
    assert "ln_f/g is missing" in refused(saved(model__ln_f__g=None))
    assert "h2/attn/q_proj is missing (and" in refused(saved(model__h9__ln_1__g=np.zeros(32)))
    assert "extra is unknown" in refused(saved(extra=np.zeros(3)))
    assert "has no wpe, wte and h0/attn/q_proj" in refused(saved(model__wte=None))
    assert "its tensors are of" in refused(saved(model__sos=None))  # the record tells of a start vector
    assert "not readable JSON" in refused(saved(igpt_ds=np.array("{")))
    assert "kmeans_centers: palette" in refused(saved(kmeans_centers=np.zeros((16, 4), np.float32)))
    assert "igpt_ds cannot be read (more than" in refused(saved(igpt_ds=np.array("x" * (1 << 23))))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for header in (b"{" * 20, b"9" * 20, b"(((1,),", b"-" * 9000):  # NumPy reads it as Python
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**members, "model/sos.npy": npy}.items():
                archive.writestr(name, data)
        assert "its header cannot be read" in refused(path)


def test_damaged_runs(copies: Path, refused: Refused) -> None:
    rank = next((copies / "native").glob("checkpoints/step-*/rank-00000.safetensors"))
    good = rank.read_bytes()
    rank.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "damaged: its sha256" in refused(rank.parent)
    assert "no checkpoint in it is whole" in refused(copies / "native")
    truncate(rank)
    assert "missing or cut short" in refused(rank.parent)
    shutil.rmtree(rank.parent)
    assert "nothing is saved yet" in refused(copies / "native")
    assert "there is nothing" in refused(copies / "nowhere")
    (copies / "text").write_text("hello")
    assert "name a run, one of its checkpoints" in refused(copies / "text")
    with pytest.raises(UserError, match=r"no checkpoint of step 3: choose one of those there: 7"):
        open_weights(copies / "run", step=3)
    with pytest.raises(UserError, match="leave --step out"):
        open_weights(copies / "hf", step=3)
