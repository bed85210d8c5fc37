"""Weights whose author means harm: nothing of them is run, nothing takes for ever, and one line tells it."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt_ds.weights.convert import convert
from igpt_ds.weights.formats import open_weights
from tests.igpt_ds.weights.conftest import Refused
from tests.igpt_ds.weights.test_convert import saved_run
from tests.igpt_ds.weights.test_formats import rewrite


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "beside tensors"])
def test_a_malicious_pytorch_file_is_not_run(copies: Path, refused: Refused, tmp_path: Path, kind: str) -> None:
    file, trap = copies / "hf" / "pytorch_model.bin", Trap(tmp_path / "sprung")
    tensors = load_file(copies / "hf" / "model.safetensors")
    (copies / "hf" / "model.safetensors").unlink()
    if kind == "plain pickle":
        file.write_bytes(pickle.dumps({"transformer.wte.weight": trap}, protocol=2))
    elif kind == "beside tensors":
        torch.save({**tensors, "extra": trap}, file)
    else:
        torch.save({"transformer.wte.weight": trap}, file, _use_new_zipfile_serialization=kind == "zip")
    for path in (copies / "hf", file):
        assert "nothing of it was run" in refused(path)
    (copies / "hf" / "config.json").unlink()
    assert "is a pickle, which runs code when it is read" in refused(file)
    assert not (tmp_path / "sprung").exists()
    torch.save(tensors, file)
    assert not (tmp_path / "sprung").exists()


def nested(depth: int, twice: bool) -> bytes:
    """A dictionary whose key is a tuple in tuples; where each names the one before twice, its hash takes 2^depth."""
    once = b"\x85" * depth
    doubled = b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth)) if twice else once
    return b"\x80\x02}()" + doubled + b"K\x01u."


def zipped(path: Path, pickled: bytes, compress: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["zip", "legacy", "tar"])
@pytest.mark.parametrize(
    "pickled",
    [
        nested(60, twice=True),
        nested(100_000, twice=False),
        b"\x80\x02\x8d" + (1 << 62).to_bytes(8, "little") + b"a.",  # a text longer than the file
        b"\x80\x02\x85.",  # takes what is not there
        b"\x80\x02h\x07.",
        b"\x80\x02u.",
        b"",
    ],
    ids=["named twice", "deep", "long", "underflow", "unknown", "no mark", "empty"],
)
def test_a_pickle_that_would_take_for_ever_is_refused_at_once(
    copies: Path, refused: Refused, kind: str, pickled: bytes
) -> None:
    (copies / "hf" / "model.safetensors").unlink()
    file = copies / "hf" / "pytorch_model.bin"
    if kind == "zip":
        zipped(file, pickled)
    elif kind == "tar":
        with tarfile.open(file, "w") as tar:
            info = tarfile.TarInfo("pickle")
            info.size = len(pickled)
            tar.addfile(info, io.BytesIO(pickled))
    else:
        magic = [pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        file.write_bytes(b"".join(magic) + pickled + pickle.dumps([], protocol=2))
    assert "nothing of it was run" in refused(copies / "hf")


def test_a_pickle_that_unfolds_is_refused(copies: Path, refused: Refused) -> None:
    (copies / "hf" / "model.safetensors").unlink()
    zipped(copies / "hf" / "pytorch_model.bin", b"\x80\x02}." + bytes(1 << 24), zipfile.ZIP_DEFLATED)
    assert "no archive as torch.save writes it" in refused(copies / "hf")


@pytest.mark.parametrize("zip_file", [True, False])
def test_pytorch_files_with_an_index_are_read(copies: Path, refused: Refused, zip_file: bool) -> None:
    folder = copies / "hf"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    index = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if index[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zip_file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    found, expected = open_weights(folder).weights(), open_weights(copies / "native").weights()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert open_weights(folder / files[1]).path == folder
    torch.save(tensors, folder / files[0])
    assert "is in another file" in refused(folder)
    (folder / files[0]).unlink()
    assert f"{files[0]}: missing" in refused(folder)


def test_a_configuration_with_a_byte_order_mark_is_read(copies: Path, refused: Refused) -> None:
    for name in ("hf", "single"):
        config = copies / name / "config.json"
        config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
        assert open_weights(copies / name).step == 7
        config.write_text("{")
        assert "config.json: not readable JSON" in refused(copies / name)


def test_weights_without_the_head_are_told_so(copies: Path, refused: Refused) -> None:
    path = copies / "hf" / "model.safetensors"
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "has no head over the colours" in refused(copies / "hf")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(tensors, path)  # as ImageGPTModel alone
    assert "has no head over the colours" in refused(copies / "hf")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["weights", "weights.index", "weights.npz", "pytorch_model.bin"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, refused: Refused, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "no run directory and no checkpoint" in refused(tmp_path / name)
    (tmp_path / "hf").mkdir()
    os.mkfifo(tmp_path / "hf" / "config.json")
    assert "no run directory and no checkpoint" in refused(tmp_path / "hf")


@pytest.mark.parametrize("target", ["hf", "npz", "safetensors", "native"])
def test_what_is_given_away_does_not_tell_where_things_lay(tmp_path: Path, target: str) -> None:
    run, _ = saved_run(tmp_path / "run", "next_pixel", "data.sources=['/home/me/data']", "init_from=/home/me/old")
    convert(run, tmp_path / "out", target)
    files = [path for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")) if path.is_file()]
    assert files and not any(b"/home/me" in path.read_bytes() for path in files)
    assert open_weights(tmp_path / "out").config["data"]["sources"] == []


def test_a_malicious_npz_is_not_run(copies: Path, refused: Refused, tmp_path: Path) -> None:
    path, trap = copies / "out.npz", Trap(tmp_path / "sprung")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    for name in ("model/wte", "kmeans_centers", "igpt_ds", "extra"):
        np.savez(path, allow_pickle=True, **{**arrays, name: np.array([trap], dtype=object)})
        assert "holds pickled objects, which are never read" in refused(path)
    # A header that lies: plain floats, and a pickle in the data's place.
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (16, 32)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/wte.npy", stream.getvalue() + pickle.dumps(trap))
        for name, array in arrays.items():
            if name != "model/wte":
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    assert "model/wte.npy is not as long as its header says" in refused(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "model.safetensors", "model.npz"])
def test_a_pickle_by_any_name_is_not_run(tmp_path: Path, refused: Refused, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "is a pickle, which runs code when it is read" in refused(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
