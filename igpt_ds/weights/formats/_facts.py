"""What every format that we write tells beside the tensors, and what is concluded where others do not tell it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from igpt_ds.config.file import from_tree, load_config, presets, to_tree
from igpt_ds.config.schema import Config, ModelConfig, identity
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.reading import parse_json, read_regular
from igpt_ds.weights.base import Imported, Weights, shapes_of

VERSION = 1


def record(weights: Weights, palette: Palette | None, class_head: bool = True) -> dict[str, Any]:
    """Step, identity and configuration, as JSON; what makes a round trip complete.

    Weights are given to others: where the data and the first weights lay on this machine is not told.

    Args:
        class_head: whether the format has a place for it; otherwise a fine-tuning becomes a network without one.
    """
    known = palette.sha256 if palette else weights.identity.get("palette_sha256")
    left_out = () if class_head else ("finetune",)
    config = {key: value for key, value in weights.config.items() if key not in left_out}
    return {
        "version": VERSION,
        "step": weights.step,
        "identity": {k: v for k, v in weights.identity.items() if k not in (*left_out, "init_from")}
        | {"palette_sha256": known},
        "config": {**config, "init_from": "", "data": {**config["data"], "sources": [], "weights": []}},
    }


def parse(path: Path, text: str | bytes) -> dict[str, Any]:
    """A JSON object without NaN and infinity."""
    try:
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON ({error}): get it anew") from error
    return content


def stated(path: Path, key: str, file: str = "config.json") -> Any:
    """What a directory's file says under a key; None where there is none that can be read."""
    try:
        content = parse_json(read_regular(path / file))
    except (OSError, ValueError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, as `parse`."""
    try:
        data = read_regular(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): get it anew") from error
    return parse(path, data)


def whole_number(path: Path, facts: Mapping[str, Any], key: str) -> int:
    """A count above 0."""
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}, no whole number above 0: get it anew")
    return value


def side(path: Path, positions: int) -> int:
    """Pixels a side of an image of so many tokens."""
    found = math.isqrt(positions)
    if found * found != positions:
        raise UserError(f"{path}: {positions} positions are not those of a square image: it is no Image GPT")
    return found


def concluded(model: ModelConfig, resolution: int, palette_size: int, objective: str) -> Config:
    """A configuration for weights that come without one: the paper's where it has a model of this shape.

    What is not known then (length, rate, batch) is that of the preset; of iGPT-S, where none has this shape. It
    serves as the beginning of a fine-tuning's defaults only.
    """
    candidates = []
    for name in presets():
        preset = load_config(name)
        shape = (preset.model.layers, preset.model.width, preset.model.heads)
        if shape == (model.layers, model.width, model.heads) and preset.objective.name == objective:
            candidates.append((preset.data.resolution != resolution, name))
    base = load_config(min(candidates)[1] if candidates else "s")
    tree = to_tree(base)
    if not candidates:
        tree["name"] = f"imported-{model.layers}x{model.width}"
    tree["model"] = {"layers": model.layers, "width": model.width, "heads": model.heads, "bias": model.bias}
    tree["data"] |= {"resolution": resolution, "palette_size": palette_size}
    tree["objective"]["name"] = objective
    return from_tree(tree, "imported")


def imported(
    path: Path,
    origin: str,
    told: Mapping[str, Any] | None,
    network: tuple[ModelConfig, int, int, str] | None,
    rows: Callable[[str, int, int], Tensor],
    palette: Palette | None,
    files: dict[str, dict[str, Any]],
    hashes: Mapping[Path, str] | None = None,
) -> Imported:
    """Weights of a format, the tensors being those that the configuration asks for.

    Args:
        told: a `record`, or None where another program wrote the file.
        network: model, resolution, palette size and objective, as the file shows them; None: as it is told.
    """
    if told is not None:
        config, step, facts = _told(path, told)
    else:
        assert network is not None
        config, step = concluded(*network), 0
        facts = {**identity(config), "palette_sha256": palette.sha256 if palette else None}
    found = (config.model, config.data.resolution, config.data.palette_size, config.objective.name)
    if network not in (None, found):
        raise UserError(f"{path}: its configuration tells {found}, its tensors are of {network}: get it anew")
    if palette is not None and palette.k != config.palette_size:
        raise UserError(
            f"{path}: a palette of {palette.k} colours beside a network for {config.palette_size}: get it anew"
        )
    known = facts.get("palette_sha256")
    if palette is not None and known not in (None, palette.sha256):
        raise UserError(f"{path}: its palette is not the one that it was trained with: get it anew")
    tensors = {name: {"shape": list(shape)} for name, shape in shapes_of(config).items()}
    return Imported(path, origin, step, facts, to_tree(config), tensors, files, rows, palette, hashes or {})


def _told(path: Path, told: Mapping[str, Any]) -> tuple[Config, int, dict[str, Any]]:
    if told.get("version") != VERSION:
        raise UserError(f"{path}: version {told.get('version')!r} of its facts is not known: update igpt-ds")
    tree, step, facts = told.get("config"), told.get("step"), told.get("identity")
    if not isinstance(tree, dict) or not isinstance(step, int) or step < 0 or not isinstance(facts, dict):
        raise UserError(f"{path}: its facts are no record of a training: get it anew")
    try:
        config = from_tree(tree, "in its facts")
    except UserError as error:
        raise UserError(f"{path}: {error}: get it anew") from None
    if config.data.resolution is None or config.data.palette_size is None:
        raise UserError(f"{path}: its facts lack the resolution or the palette's size: get it anew")
    return config, step, facts
