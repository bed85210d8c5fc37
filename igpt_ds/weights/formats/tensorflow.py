"""TensorFlow checkpoints of the released models, read by TensorFlow where it is installed; see _released.py.

PREFIX.index, PREFIX.data-00000-of-00001    named by PREFIX, by the .index file, or by a directory that holds one
"""

import importlib
import os
from pathlib import Path

import numpy as np

from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular
from igpt_ds.weights.base import Imported
from igpt_ds.weights.formats import _released as released

_MAGIC = bytes.fromhex("57fb808b247547db")  # the end of a table, which the index is


def recognises(path: Path) -> bool:
    """Whether there is an index."""
    return bool(_indices(path))


def _indices(path: Path) -> list[Path]:
    """The indices that a path may mean."""
    if path.is_dir():
        candidates = sorted(path.glob("*.index"))
    elif path.suffix == ".index":
        candidates = [path]
    else:
        candidates = [path.with_name(path.name + ".index")]
    return [file for file in candidates if _ends_as_index(file)]


def _ends_as_index(file: Path) -> bool:
    try:
        with open_regular(file) as opened:
            opened.seek(-len(_MAGIC), os.SEEK_END)
            return opened.read() == _MAGIC
    except OSError:
        return False


def read(path: Path) -> Imported:
    """Open a checkpoint."""
    indices = _indices(path)
    if len(indices) > 1:
        prefixes = ", ".join(file.name.removesuffix(".index") for file in indices)
        raise UserError(f"{path}: several TensorFlow checkpoints ({prefixes}): name one of them")
    prefix = indices[0].with_name(indices[0].name.removesuffix(".index"))
    try:
        tensorflow = importlib.import_module("tensorflow")
    except ImportError:
        raise UserError(
            f"{prefix}: a TensorFlow checkpoint, which TensorFlow alone reads: install it (pip install tensorflow), "
            "convert to another format once"
        ) from None
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        full = dict(reader.get_variable_to_shape_map())
    except Exception as error:  # its errors have classes of their own
        raise UserError(f"{prefix}: TensorFlow cannot read it ({_line(error)}): get it anew") from error
    names = {released.plain_name(name): name for name in full}

    def array(name: str) -> np.ndarray:
        try:
            return np.asarray(reader.get_tensor(names[name]))
        except Exception as error:
            raise UserError(f"{prefix}: {name} cannot be read ({_line(error)}): get it anew") from error

    shapes = {name: tuple(int(size) for size in full[long]) for name, long in names.items()}
    facts = indices[0].stat()
    files = {indices[0].name: {"bytes": facts.st_size, "modified": facts.st_mtime_ns}}
    return released.from_variables(prefix, "TensorFlow", shapes, array, None, None, files)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
