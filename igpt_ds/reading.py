"""Files that others may have written: regular files only, and JSON that cannot surprise its reader.

Whatever is wrong, the functions raise OSError or ValueError and nothing else, so that a caller has two cases to turn
into a line of its own.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MOST_BYTES = 1 << 30  # of a file that is read whole; the manifest of a hundred million images has 10 MB
_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # whole numbers: what 64 bits hold, with a sign or without


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; what is none (a pipe, which would wait for a writer, or a device) is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code, text = (errno.EISDIR, "is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "is no regular file")
        raise OSError(code, text, str(path))
    return open(descriptor, "rb")


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """All bytes of a regular file; more than `most` are a ValueError."""
    with open_regular(path) as file:
        data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # so much memory is taken at once
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """JSON without NaN, infinity and numbers that 64 bits do not hold; a byte order mark is passed over.

    Raises:
        ValueError: whatever is wrong, deep nesting included.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path) -> Any:
    """The JSON in a regular file, as `parse_json`."""
    return parse_json(read_regular(path))


def _whole(text: str) -> int:
    # By its length first: Python takes its time over long ones, and refuses some.
    if len(text) > 20 or not _LEAST <= (value := int(text)) <= _MOST:
        _refuse(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        _refuse(text)
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.20} is no number of 64 bits")
