"""The formats of weights, one module each, and the one door to all of them: `open_weights`.

A format is recognised by what is in it, not by its name. Whatever it is, nothing in it is ever executed: safetensors
are plain data, .npz is read with allow_pickle=False, torch's pickles with weights_only=True.

A format's module has

    recognises(path) -> bool
    read(path) -> Weights

and, if we write it, too,

    NAME            of --to
    FOLDER          whether it is a directory, which is there and empty when it is written, or one file
    PRECISIONS      that it can hold
    write(weights, palette, place, precision, tick, shard_bytes) -> file -> sha256

and, if another program than ours can compute with it,

    ORIGIN          as its weights say it
    logits(weights, config, tokens_BT) -> logits [B, T, K] or None, and the program's name, or why not
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from igpt_ds.weights.base import Weights

KNOWN = (
    "a run, one of its checkpoints, a Hugging Face ImageGPT directory or hf://user/repo, a safetensors file with its "
    "config.json, an .npz, or a TensorFlow checkpoint"
)


def formats() -> list[ModuleType]:
    """All of them; modules whose names begin with _ are helpers."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]


def written(name: str) -> ModuleType:
    """The format that --to names."""
    found = {module.NAME: module for module in formats() if hasattr(module, "write")}
    if name not in found:
        raise UserError(f"--to {name}: no format that is written: choose from {', '.join(sorted(found))}")
    return found[name]


def open_weights(path: Path, step: int | None = None, verify: bool = True) -> "Weights":
    """Open weights of any format that is known here.

    Args:
        path: of a run directory (its newest whole checkpoint is meant), a checkpoint, or any other format; or a model
            of the hub, see `igpt_ds.hub`.
        step: of a run's checkpoint.
        verify: compare the recorded hashes now; else only sizes are looked at, and the caller verifies.
    """
    from igpt_ds import hub
    from igpt_ds.weights.base import check_shapes
    from igpt_ds.weights.formats import native

    path = hub.local(path)
    if native.is_run(path):
        return native.read_run(path, step, verify)
    if step is not None:
        raise UserError(f"{path}: --step {step}: it is no run directory, which would have several: leave --step out")
    place, reader = _reader(path)
    weights: Weights = reader.read(place)
    if reader is not native:
        if path.is_file() and place.is_dir() and path.name not in weights.files:
            raise UserError(f"{path}: the config.json beside it is of {', '.join(sorted(weights.files))}: name that")
        check_shapes(weights)
    if verify:
        weights.verify()
    return weights


def results_folder(path: Path, json_path: Path | None) -> Path:
    """Where an evaluation of these weights writes: into the run, or beside the file that --json names."""
    from igpt_ds import hub
    from igpt_ds.weights.formats import native

    if native.is_run(path):
        return path
    if json_path is None:
        if hub.repository(path) is None:
            _reader(hub.local(path))  # what is not there at all is told first
        raise UserError(f"{path}: is no run directory, to which the results would be added: name a file by --json")
    return json_path.parent


def _reader(path: Path) -> tuple[Path, ModuleType]:
    """What is to be read, which may be the directory around a file, and who reads it."""
    readers = formats()
    if not path.exists() and not any(reader.recognises(path) for reader in readers):
        raise UserError(f"{path}: no run directory and no checkpoint: there is nothing: mend the path")
    places = [path, path.parent] if path.is_file() and _holds_tensors(path) else [path]
    for place in places:
        for reader in readers:
            if reader.recognises(place):
                return place, reader
    if path.is_file():
        if _is_pickle(path):
            raise UserError(
                f"{path}: is a pickle, which runs code when it is read: name the Hugging Face directory that it "
                "belongs to, or save it as safetensors"
            )
        if len(places) > 1:
            raise UserError(f"{path}: no config.json beside it tells what network it is: put the two into a directory")
    if (path / "config.json").is_file():
        from igpt_ds.weights.formats._facts import read_json

        read_json(path / "config.json")  # tells why it cannot be read
    raise UserError(f"{path}: no run directory and no checkpoint: name {KNOWN}")


def _holds_tensors(path: Path) -> bool:
    """Whether it is a safetensors file, whose description lies beside it, or a Hugging Face pickle's place."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.name.startswith("pytorch_model") and path.suffix == ".bin")


def _is_pickle(path: Path) -> bool:
    import zipfile

    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
