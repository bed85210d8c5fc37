"""Configurations from TOML, strictly, and back.

A preset (`presets/NAME.toml`) or a file states the science; `--set section.key=value` changes single facts.
Every fault of a configuration is found in one pass and told together: unknown keys with the nearest valid name, wrong
types, contradictions.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from igpt_ds.config.rules import contradictions
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.reading import read_regular

PRESETS = Path(str(resources.files("igpt_ds.config"))) / "presets"

Override = str | tuple[str, Any]  # "section.key=TOML" as a person writes it, or ("section.key", value)


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(source: str | Path, overrides: Sequence[Override] = ()) -> Config:
    """Read a preset (by name) or a TOML file (by path) and apply overrides."""
    # By the ending: a folder that is called like a preset must not hide it.
    path = Path(source) if Path(source).suffix == ".toml" else PRESETS / f"{source}.toml"
    if not path.is_file():
        raise UserError(f"preset {source}: there is none of this name: choose {', '.join(presets())} or a file.toml")
    try:
        tree = tomllib.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error
    return from_tree(tree, str(source), overrides)


def from_tree(tree: dict[str, Any], origin: str, overrides: Sequence[Override] = ()) -> Config:
    """Build a `Config` from nested dictionaries, with overrides applied; `origin` names them in errors.

    Raises:
        UserError: every fault found, joined in one line.
    """
    for override in overrides:
        _apply(tree, override)
    if isinstance(finetune := tree.get("finetune"), dict) and "start" in finetune:
        tree["init_from"] = finetune.pop("start")  # as version 0.1 called it
    faults: list[str] = []
    config = _build(Config, tree, "", faults)
    if config is not None:
        faults += contradictions(config)
    if faults:
        raise UserError(f"configuration {origin}: " + "; ".join(faults))
    return typing.cast(Config, config)


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries, without what is not set."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` reads back unchanged."""
    import tomli_w

    tree = to_tree(config)
    # TOML wants plain keys before tables.
    tree = {k: v for k, v in tree.items() if not isinstance(v, dict)} | tree
    # It is printed, too: what a terminal would obey or hide is escaped, as TOML does it.
    return "".join(c if c == "\n" or c.isprintable() else f"\\U{ord(c):08x}" for c in tomli_w.dumps(tree))


def _apply(tree: dict[str, Any], override: Override) -> None:
    """Write one `section.key=value` into the tree."""
    key, value = override if isinstance(override, tuple) else _parsed(override)
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {section} is no section: see igpt-ds pretrain --print-config")
    tree[last] = value


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value; the value is TOML, or a bare word for a string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: not of the form section.key=value: write e.g. training.steps=20")
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {"value": text}
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise UserError(f"--set {key:.80}: its value cannot be read ({error}): write a plain one") from None
    if found.keys() != {"value"} or (found["value"] is text and "\n" in text):
        raise UserError(f"--set {key:.80}: its value is more than one line: write a --set for each key")
    return key, found["value"]


def _build(cls: type, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    """An instance of the dataclass `cls`, or None where a value is missing or of the wrong type."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            faults.append(f"unknown key {prefix}{key} (nearest: {prefix}{near[0]})")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], prefix + name, faults)
        elif field.default is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]):
                values[name] = _build(typing.cast(type, hints[name]), {}, f"{prefix}{name}.", faults)
            else:
                faults.append(f"{prefix}{name} is missing")
                values[name] = None
    # TOML has no null: None is the mark of a fault.
    return None if None in values.values() else cls(**values)


def _convert(hint: Any, value: Any, name: str, faults: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(typing.cast(type, hint), value, f"{name}.", faults)
        faults.append(f"{name} must be a section, not {_short(value)}")
        return None
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):  # `X | None`, or a word | X
        first, *others = typing.get_args(hint)
        words = typing.get_args(first) if typing.get_origin(first) is Literal else ()
        if value in words:
            return value
        found = _convert(others[0] if words else first, value, name, faults)
        if words and found is None:
            faults[-1] += f" (or {', '.join(words)})"
        return found
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        faults.append(f"{name} must be one of {', '.join(typing.get_args(hint))}, not {_short(value)}")
        return None
    if origin is tuple:
        if isinstance(value, list):
            items = tuple(_convert(typing.get_args(hint)[0], item, name, faults) for item in value)
            return None if None in items else items
        faults.append(f"{name} must be a list, not {_short(value)}")
        return None
    # bool is an int in Python, but `steps = true` is a mistake.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not (-(2**63) <= value < 2**64 if isinstance(value, int) else math.isfinite(value)):
        faults.append(f"{name} must be a finite number of 64 bits, not {_short(value)}")
        return None
    if hint is float and number:
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    faults.append(f"{name} must be {hint.__name__}, not {_short(value)}")
    return None


def _short(value: Any) -> str:
    """A wrong value as a message shows it."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):
        return "what is nested too deep or too long"
