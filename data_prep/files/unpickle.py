"""Read a pickle of arrays, lists and strings without running anything that it says.

A pickle is a program: it names any function of any module and has it called. The reader below knows five names, all
of which stand for inert substitutes: NumPy's own are not among them, so that not even its C code sees a state that
the file made up. Everything else is refused. Python's own reader in Python is taken, not the one in C: the latter
allocates a table as large as an index in the file says.

A program may also be long, or small and ask for much. So only the operations that such data need are known, the keys of
dictionaries are text (a nest of tuples takes for ever to hash), and operations and bytes made are counted.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from igpt_ds.errors import UserError

_OPERATIONS = (
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "LONG1", "BININT", "BININT1",
    "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST",
    "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GET", "BINGET",
    "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE",
)  # fmt: skip
_MOST_READS = 4_000_000  # CIFAR-100's training images take half a million
_MOST_AXES = 4


class _Dtype:
    def __init__(self, kind: object, *_: object) -> None:
        if not isinstance(kind, str | bytes) or len(kind) > 8:
            raise pickle.UnpicklingError("an array of what is no number")
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


class _Counted(io.BytesIO):
    """The file, read in not too many pieces: each operation takes one or more."""

    left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("too many operations")
        return super().read(size)


class _Operations(dict[int, Any]):
    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"operation {code}, which plain data has no use for")


class _Reader(pickle._Unpickler):
    # Of the class above, whose stubs do not tell.
    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        super().__init__(_Counted(data), encoding="bytes")
        self._to_encode = len(data)

    def find_class(self, module: str, name: str) -> Any:
        """The substitute of a known name."""
        try:
            known = _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}") from None
        return self._encoded if known is _latin1 else known

    def _encoded(self, text: object, encoding: object) -> bytes:
        found = _latin1(text, encoding)
        self._to_encode -= len(found)  # a text may be named again and again
        if self._to_encode < 0:
            raise pickle.UnpicklingError("it repeats itself")
        return found

    def _frame(self) -> None:
        self.read(8)  # its length, by which pieces would be read uncounted

    def _new_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._update(pairs)

    def _set_item(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, pairs: list[Any]) -> None:
        keys, values = pairs[::2], pairs[1::2]
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str | bytes) for key in keys):
            raise pickle.UnpicklingError("a key that is no text")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise pickle.UnpicklingError("a state of what has none")
        self.stack[-1].__setstate__(state)

    dispatch = _Operations(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS}
        | {
            pickle.FRAME[0]: _frame,
            pickle.DICT[0]: _new_dict,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.BUILD[0]: _build,
        }
    )


def unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    """A pickled dictionary; its text keys as bytes, its arrays as `bytes_array` takes them."""
    try:
        found = _Reader(data).load()
        if isinstance(found, dict):
            return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
    except Exception as error:  # a made-up pickle makes the reader raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a pickle of plain data ({text}): fetch it again from its publisher") from error
    raise UserError(f"{where}: not a pickled dictionary: mend the path")


def bytes_array(value: object, where: str) -> np.ndarray:
    """An unpickled array of bytes: uint8 of its shape."""
    state = value.state if isinstance(value, _Array) else None
    if isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        axes = shape if isinstance(shape, tuple) and len(shape) <= _MOST_AXES else (None,)
        whole = isinstance(data, bytes) and all(type(n) is int and n >= 0 for n in axes)
        if whole and isinstance(dtype, _Dtype) and dtype.kind in {"u1", "B"} and math.prod(shape) == len(data):
            return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise UserError(f"{where}: not an array of bytes: fetch it again from its publisher")
