"""Arrays as .npy bytes, and back: no more memory than the bytes take, whatever their header claims.

NumPy and the standard library only, as shards.py.
"""

import io
from pathlib import Path
from typing import IO

import numpy as np

from igpt_ds.reading import read_regular

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def to_npy(array: np.ndarray) -> bytes:
    """An array as an .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype, as an .npy file begins with them.

    Raises:
        OSError, ValueError: it begins otherwise, or is of a later version.
    """
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"version {version} of the .npy format")
    try:
        return _READERS[version](file)
    except OSError:
        raise
    except Exception as error:  # NumPy parses it as Python, which fails in many ways
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from None


def from_npy(data: bytes, fortran: bool = False) -> np.ndarray:
    """The array of an .npy file, read-only.

    Args:
        fortran: whether its order may be Fortran's.

    Raises:
        ValueError: it is none, of a later version, of Python objects, or not as long as its header says.
    """
    file = io.BytesIO(data)
    shape, turned, dtype = read_header(file)
    if (turned and not fortran) or min(shape, default=0) < 0 or max(shape, default=0) > len(data):
        raise ValueError(f"shape {shape}, Fortran order {turned}")
    # frombuffer refuses Python objects and broken elements, reshape any other wrong length.
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if turned else "C")


def read_npy(path: Path, most: int, fortran: bool = False) -> np.ndarray:
    """The array in a regular file of at most `most` bytes.

    Raises:
        OSError, ValueError: there is none.
    """
    return from_npy(read_regular(path, most), fortran)
