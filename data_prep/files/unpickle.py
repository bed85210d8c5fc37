"""Read a pickle of arrays, lists and strings without running anything that it says.

A pickle is a program: it names any function of any module and has it called. The reader below knows five names, all
of which stand for inert substitutes: NumPy's own are not among them, so that not even its C code sees a state that
the file made up. Everything else is refused. Python's own reader in Python is taken, not the one in C: the latter
allocates a table as large as an index in the file says.
"""

import io
import math
import pickle
from typing import Any

import numpy as np

from igpt_ds.errors import UserError


class _Dtype:
    def __init__(self, kind: object, *_: object) -> None:
        self.kind = kind.decode("latin1") if isinstance(kind, bytes) else kind

    def __setstate__(self, state: object) -> None:
        pass  # byte order and fields: of no meaning for single bytes


class _Array:
    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _new_array(*_: object) -> _Array:
    return _Array()


def _latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The substitute of a known name."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}") from None


def unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    """A pickled dictionary; its text keys and values as bytes, its arrays as `bytes_array` takes them."""
    try:
        found = _Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a made-up pickle makes the reader raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a pickle of plain data ({text}): fetch it again from its publisher") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a pickled dictionary: mend the path")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


def bytes_array(value: object, where: str) -> np.ndarray:
    """An unpickled array of bytes: uint8 of its shape."""
    state = value.state if isinstance(value, _Array) else None
    if isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        whole = isinstance(data, bytes) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if whole and isinstance(dtype, _Dtype) and dtype.kind in {"u1", "B"} and math.prod(shape) == len(data):
            return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise UserError(f"{where}: not an array of bytes: fetch it again from its publisher")
