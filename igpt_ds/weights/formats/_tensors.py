"""Tensors by another program's names, read in parts from safetensors files, or from pickles of torch.save."""

import io
import os
import pickletools
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular

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


class Bare(TensorFiles):
    """The same tensors by longer names: `prefix` before each."""

    def __init__(self, files: TensorFiles, prefix: str):
        self.path, self.files, self._source, self._prefix = files.path, files.files, files, prefix
        self.shapes = {prefix + name: shape for name, shape in files.shapes.items()}

    def part(self, name: str, *where: slice | int) -> Tensor:
        return self._source.part(name.removeprefix(self._prefix), *where)


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
            _require_file(path / file)
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


class PickledFiles(TensorFiles):
    """State dictionaries of torch.save, read with weights_only=True: tensors and plain containers, no code.

    Args:
        files: names in the directory `path`.
        index: name of a tensor -> file, where an index tells it.
    """

    def __init__(self, path: Path, files: Sequence[str], index: Mapping[str, str] | None = None):
        self.path, self.files = path, list(files)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            _require_file(path / file)
            found = _unpickled(path / file)
            wrong = [n for n in found if n in self._tensors or (index or {}).get(n, file) != file]
            if wrong:
                raise UserError(f"{path / file}: holds {wrong[0]}, which is in another file: get the directory anew")
            self._tensors |= found
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}

    def part(self, name: str, *where: slice | int) -> Tensor:
        return self._tensors[name][where]


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: missing: get the directory anew")


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        mapped = _require_plain(path)  # torch's older files cannot be mapped
        found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # the unpickler fails in as many ways as a damaged pickle can ask for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: holds more than tensors, or is damaged; nothing of it was run "
            f"({reason[0][:120]}): save it as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: is no dictionary of tensors: save the model's state_dict as safetensors")
    return {str(name): value for name, value in found.items()}


def _require_plain(path: Path) -> bool:
    """Look at the pickles in a file of torch.save before torch reads them; whether it is of the kind since torch 1.6.

    Torch runs no code of them, but a few bytes can make a key of tuples in tuples whose hash takes for ever.

    Raises:
        ValueError: they are not as torch.save writes them.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            # Torch would take a tar for its oldest kind, and read other pickles than these.
            if tarfile.is_tarfile(path):
                raise ValueError("a tar, as before torch 0.4")
            for _ in range(_PICKLES):
                _look_at(file)
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or any(m.compress_type or m.file_size > size for m in members):
                raise ValueError("no archive as torch.save writes it")
            _look_at(io.BytesIO(archive.read(pickles[0])))
    return True


_PICKLES = 5  # of torch's older kind: magic number, version, system, the dictionary, keys of the storages
_MOST_PARTS = 10_000  # of a tuple with all that is in it; a tensor's has about twenty


def _look_at(pickle: BinaryIO) -> None:
    """Walk through one pickle with the number of parts of what lies on its stack; refuse a tuple of too many."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(pickle):
        if code.name == "MARK":
            marks.append(len(stack))
        elif "PUT" in code.name or code.name == "MEMOIZE":
            memo[len(memo) if code.name == "MEMOIZE" else argument] = stack[-1]
        elif "GET" in code.name:
            stack.append(memo[argument])
        else:
            taken = code.stack_before
            first = len(stack) - len(taken)
            if pickletools.markobject in taken:
                first = marks.pop() - taken.index(pickletools.markobject)
            if first < 0:
                raise ValueError("a pickle that takes more than is there")
            parts = 1 + sum(stack[first:]) if "TUPLE" in code.name else 1
            if parts > _MOST_PARTS:
                raise ValueError("a tuple of more parts than a tensor's")
            stack[first:] = [parts] * len(code.stack_after)
