"""All weights in one safetensors file by our names, with a config.json that tells the rest.

DIR/model.safetensors   token_embedding, start, position_embedding, blocks.0.attention.qkv.weight, ...
    config.json         format, step, identity, configuration, and the file's sha256
    palette.npy         where it is known
"""

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from igpt_ds.atomic import publish_text
from igpt_ds.checkpoint.safetensors_stream import Precision, Streamed, write_safetensors
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.weights.base import Imported, Weights, chunks
from igpt_ds.weights.formats._facts import imported, read_json, record, stated
from igpt_ds.weights.formats._tensors import SafetensorsFiles

NAME, FOLDER, PRECISIONS = "safetensors", True, ("float32", "bfloat16")
FORMAT = "igpt-weights"
FILE = "model.safetensors"


def recognises(path: Path) -> bool:
    """Whether the directory's config.json says so."""
    return bool(stated(path, "format") == FORMAT)


def read(path: Path) -> Imported:
    """Open the directory."""
    facts = read_json(path / "config.json")
    files = SafetensorsFiles(path, [FILE])
    palette = Palette.load(path / "palette.npy") if (path / "palette.npy").exists() else None

    def rows(name: str, first: int, last: int) -> Tensor:
        return files.part(name, slice(first, last)).float()

    model = (facts.get("config") or {}).get("model") if isinstance(facts.get("config"), dict) else None
    files.require_layers(model["layers"] if isinstance(model, dict) and isinstance(model.get("layers"), int) else 0)
    digest = facts.get("sha256")
    if not isinstance(digest, str):
        raise UserError(f"{path / 'config.json'}: lacks the sha256 of {FILE}: convert it anew")
    found = imported(
        path,
        "one safetensors file",
        facts,
        None,
        rows,
        palette,
        {FILE: {"sha256": digest}},
        {path / FILE: digest},
    )
    files.require({name: tuple(entry["shape"]) for name, entry in found.tensors.items()})
    return found


def write(
    weights: Weights,
    palette: Palette | None,
    folder: Path,
    precision: Precision,
    tick: Callable[[int], object],
    shard_bytes: int,
) -> dict[str, str]:
    """Write the files into the empty `folder`; return file -> sha256."""
    tensors = [
        Streamed(name, tuple(facts["shape"]), lambda name=name: chunks(weights, name))  # type: ignore[misc]
        for name, facts in weights.tensors.items()
    ]
    digest = write_safetensors(folder / FILE, tensors, precision, tick, {"format": "pt"})
    facts = {"format": FORMAT, "dtype": precision, "sha256": digest, **record(weights, palette)}
    publish_text(folder / "config.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
    if palette is not None:
        palette.save(folder / "palette.npy")
    return {FILE: digest}
