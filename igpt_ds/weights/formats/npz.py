"""An .npz of arrays by the names of the released code (see _released.py): one array a variable, nothing pickled.

Beside the variables, as arrays: `kmeans_centers`, the palette by the name of the released file, float32 [k, 3]; and
`igpt_ds`, our record of the training as JSON. Neither is needed to read the file.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from igpt_ds.atomic import sha256_file, writing
from igpt_ds.checkpoint.safetensors_stream import Precision
from igpt_ds.config.schema import Config
from igpt_ds.dataset.npy import from_npy, read_header
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.memory import available_bytes
from igpt_ds.reading import open_regular
from igpt_ds.weights.base import Imported, Weights, chunks, config_of, transposed, whole
from igpt_ds.weights.formats import _released as released
from igpt_ds.weights.formats._facts import parse, record

NAME, FOLDER, PRECISIONS = "npz", False, ("float32",)
PALETTE, RECORD = "kmeans_centers", "igpt_ds"
_MOST_BESIDE = 1 << 24  # bytes of the palette, and of the record
# What reading a damaged or hostile archive raises.
_DAMAGE = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same weights give the same bytes


def recognises(path: Path) -> bool:
    """Whether it is a zip archive of .npy members."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def read(path: Path) -> Imported:
    """Open a file."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    shape, _, dtype = read_header(file)
                    offset = file.tell()
                if dtype.hasobject:
                    raise UserError(
                        f"{path}: {member.filename} holds pickled objects, which are never read: save plain arrays"
                    )
                if offset + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"{member.filename} is not as long as its header says")
                shapes[released.plain_name(member.filename.removesuffix(".npy"))] = shape
    except _DAMAGE as error:
        raise UserError(f"{path}: no whole .npz of arrays ({error}): get it anew") from error

    def array(name: str) -> np.ndarray:
        return _array(path, name)

    told = palette = None
    if RECORD in shapes:
        shapes.pop(RECORD)
        told = parse(path, str(array(RECORD)))
    if PALETTE in shapes:
        shapes.pop(PALETTE)
        try:
            palette = Palette(array(PALETTE))
        except UserError as error:
            raise UserError(f"{path}: {PALETTE}: {error}") from None
    facts = path.stat()
    files = {path.name: {"bytes": facts.st_size, "modified": facts.st_mtime_ns}}
    return released.from_variables(path, "released names, .npz", shapes, array, told, palette, files)


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            member = next(m for m in members if released.plain_name(m.filename.removesuffix(".npy")) == name)
            most = _MOST_BESIDE if name in (RECORD, PALETTE) else available_bytes()
            if member.file_size > most:  # a few bytes may stand for very many
                raise ValueError(f"more than {most:,} bytes")
            return from_npy(archive.read(member), fortran=True)
    except _DAMAGE as error:
        raise UserError(f"{path}: {name} cannot be read ({error}): get it anew") from error


def write(
    weights: Weights,
    palette: Palette | None,
    path: Path,
    precision: Precision,
    tick: Callable[[int], object],
    shard_bytes: int,
) -> dict[str, str]:
    """Write a file, float32, synced; return its name -> sha256."""
    config = config_of(weights)
    if config.model.bias:
        raise UserError("--to npz: the network has biases, which the released code has not: choose another format")
    with writing(path), zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, shape, blocks in _variables(weights, config):
            with _member(archive, f"model/{name}") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(block.contiguous().reshape(-1).numpy().data)
                    tick(block.numel())
        extra = {RECORD: np.array(json.dumps(record(weights, palette, class_head=False), allow_nan=False))}
        if palette is not None:
            extra[PALETTE] = palette.colours
        for name, value in extra.items():
            with _member(archive, name) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)
    return {path.name: sha256_file(path)}


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # force_zip64: its size is not known before it is written.
    return archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True)


def _variables(weights: Weights, config: Config) -> Iterator[tuple[str, tuple[int, ...], Iterator[Tensor]]]:
    """Released name, shape and values of every variable."""
    model = config.model
    shapes = released.shapes_of(
        model.layers, model.width, model.heads, config.sequence_length, config.palette_size, config.causal
    )
    for ours in weights.tensors:
        if ours in released.TOP:
            theirs = released.TOP[ours]
            yield theirs, shapes[theirs], chunks(weights, ours)
        elif ours != "class_head.weight":
            _, layer, rest = ours.split(".", 2)
            prefix = f"h{layer}/"
            if rest in released.GAINS:
                theirs = prefix + released.GAINS[rest]
                yield theirs, shapes[theirs], chunks(weights, ours)
            elif rest in released.TRANSPOSED:
                theirs = prefix + released.TRANSPOSED[rest]
                yield theirs, shapes[theirs], transposed(whole(weights, ours))
            else:
                size = model.width**2
                for number, projection in enumerate(released.PROJECTIONS):
                    theirs = f"{prefix}attn/{projection}"
                    part = weights.read(ours, "weight", number * size, (number + 1) * size)
                    yield theirs, shapes[theirs], iter([part])
