"""How a row of n tokens lies in a shard: as uint16, or as a 9-bit split plane of 9/16 of the bytes.

    uint16     KEY.tokens.npy     uint16 [rows, n]
    packed9    KEY.tokens9.npy    uint8 [rows, n + ceil(n / 8)]

A row of packed9 is the low bytes of its tokens and then their ninth bits, eight to a byte, the first token's in
the lowest bit; the last byte is filled up with zeros. Low bytes and high bits apart are widened and joined by a
few whole-array operations; nine bits laid end to end would have to be shifted one token at a time.

NumPy and the standard library only, as shards.py.
"""

from typing import Protocol

import numpy as np

from igpt_ds.errors import UserError


class Storage(Protocol):
    """One form of storage.

    Attributes:
        name: as the manifest and --storage call it.
        member: the kind of the tar member that holds it.
        dtype: of that member's array.
        colours: tokens are below this.
    """

    name: str
    member: str
    dtype: str
    colours: int

    def width(self, n: int) -> int:
        """Elements that a row of n tokens takes."""

    def pack(self, tokens: np.ndarray) -> np.ndarray:
        """uint16 [rows, n] below `colours` -> dtype [rows, width(n)], C order."""

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        """dtype [rows, width(n)] -> uint16 [rows, n]."""


class _Uint16:
    name, member, dtype, colours = "uint16", "tokens", "<u2", 1 << 16

    def width(self, n: int) -> int:
        return n

    def pack(self, tokens: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(tokens, self.dtype)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        return stored


class _Packed9:
    name, member, dtype, colours = "packed9", "tokens9", "|u1", 1 << 9

    def width(self, n: int) -> int:
        return n + -(-n // 8)

    def pack(self, tokens: np.ndarray) -> np.ndarray:
        high = np.packbits((tokens >> 8).astype(np.uint8), axis=1, bitorder="little")
        return np.concatenate([tokens.astype(np.uint8), high], axis=1)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        high = np.unpackbits(stored[:, n:], axis=1, count=n, bitorder="little").astype(np.uint16)
        high <<= 8
        high |= stored[:, :n]
        return high


STORAGES: dict[str, Storage] = {storage.name: storage for storage in (_Uint16(), _Packed9())}


def storage_for(name: str, colours: int) -> Storage:
    """The form of storage called `name`, for the tokens of a palette of so many colours."""
    if name not in STORAGES:
        raise UserError(f"--storage {name}: no such form: choose from {', '.join(STORAGES)}")
    storage = STORAGES[name]
    if colours > storage.colours:
        raise UserError(
            f"--storage {name}: holds {storage.colours} colours at most, but the palette has {colours}: "
            f"leave it out, or fit a palette with --k {storage.colours}"
        )
    return storage
