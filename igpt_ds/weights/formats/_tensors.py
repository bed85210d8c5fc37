"""Tensors by another program's names, read in parts from safetensors files, or from a pickle of torch.save."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_ds.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


class TensorFiles:
    """Named tensors in some files.

    Attributes:
        shapes: name -> shape.
        files: name of each file.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    files: list[str]

    def part(self, name: str, *where: slice | int) -> Tensor:
        """A part of a tensor, in the type that it is stored in. May be a view of the file."""
        raise NotImplementedError

    def require_layers(self, layers: int) -> None:
        """Refuse a number of layers that so few tensors cannot be, before anything of that size is made."""
        if layers > len(self.shapes):
            raise UserError(f"{self.path}: {layers} layers, but {len(self.shapes)} tensors: get it anew")

    def require(self, expected: Shapes, ignored: Sequence[str] = ()) -> None:
        """Hold the tensors against what they should be.

        Args:
            ignored: endings of names that say nothing.
        """
        missing = sorted(set(expected) - set(self.shapes))
        unknown = sorted(n for n in set(self.shapes) - set(expected) if not n.endswith(tuple(ignored) or ("\0",)))
        other = sorted(n for n in set(expected) & set(self.shapes) if expected[n] != self.shapes[n])
        faults = [f"tensor {name} is missing" for name in missing]
        faults += [f"tensor {n} is {list(self.shapes[n])}, not {list(expected[n])}" for n in other]
        faults += [f"tensor {name} is unknown" for name in unknown]
        if faults:
            more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
            raise UserError(f"{self.path}: {faults[0]}{more}: it is no whole Image GPT of this configuration")


class SafetensorsFiles(TensorFiles):
    """One or several safetensors files.

    Args:
        files: names in the directory `path`.
        index: name of a tensor -> file, where an index tells it.
    """

    def __init__(self, path: Path, files: Sequence[str], index: Mapping[str, str] | None = None):
        self.path, self.files = path, list(files)
        self.shapes = {}
        self._handles: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for file in files:
            if not (path / file).is_file():
                raise UserError(f"{path / file}: missing: get the directory anew")
            try:
                handle = safe_open(path / file, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path / file}: no whole safetensors file ({error}): get it anew") from error
            self._handles[file] = handle
            for name in handle.keys():  # noqa: SIM118 - no dict
                found = handle.get_slice(name)
                if found.get_dtype() not in ("F32", "F16", "BF16", "F64", "BOOL", "U8"):
                    raise UserError(f"{path / file}: tensor {name} is of type {found.get_dtype()}: save it as float32")
                if name in self._where:
                    raise UserError(f"{path / file}: tensor {name} is in {self._where[name]} as well: get it anew")
                self._where[name], self.shapes[name] = file, tuple(found.get_shape())
        wrong = sorted(n for n, f in (index or {}).items() if self._where.get(n) != f)
        if wrong:
            raise UserError(f"{path}: the index says that {wrong[0]} is in {(index or {})[wrong[0]]}: get it anew")

    def part(self, name: str, *where: slice | int) -> Tensor:
        try:
            return self._handles[self._where[name]].get_slice(name)[where]
        except SafetensorError as error:
            raise UserError(f"{self.path}: tensor {name} cannot be read ({error}): get it anew") from error


class PickledFile(TensorFiles):
    """A state dictionary of torch.save, read with weights_only=True: tensors and plain containers, no code."""

    def __init__(self, path: Path, file: str):
        self.path, self.files = path, [file]
        try:
            mapped = zipfile.is_zipfile(path / file)  # torch's older files cannot be mapped
            found = torch.load(path / file, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:  # the unpickler fails in as many ways as a damaged pickle can ask for
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{path / file}: holds more than tensors, or is damaged; nothing of it was run "
                f"({reason[0][:120]}): save it as safetensors"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{path / file}: is no dictionary of tensors: save the model's state_dict as safetensors")
        self._tensors: dict[str, Tensor] = {str(name): value for name, value in found.items()}
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}

    def part(self, name: str, *where: slice | int) -> Tensor:
        return self._tensors[name][where]
