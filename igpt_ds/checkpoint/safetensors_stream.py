"""safetensors files written a piece at a time: the library wants all tensors of a file in memory, this one block.

The format: a little-endian u64, the length of the header; the header, JSON padded with spaces: tensor name -> type,
shape and first and last + 1 byte; then the tensors' bytes, little-endian, in C order, without a gap.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from igpt_ds.atomic import writing

Precision = Literal["float32", "bfloat16"]
BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8"}
_SYNC = 1 << 27  # bytes, after which what is written is made durable: the last sync then takes no longer than these


@dataclass(frozen=True)
class Streamed:
    """A tensor that is to be written.

    Attributes:
        blocks: gives its values in C order, float32, in pieces of any size, which are valid until the next is given.
        precision: of this tensor alone.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]
    precision: Precision | Literal["uint8"] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def write_safetensors(
    path: Path,
    tensors: Sequence[Streamed],
    precision: Precision,
    tick: Callable[[int], object] = lambda elements: None,
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a new file, synced; return its hex sha256.

    Args:
        precision: of those tensors that have none of their own.
        tick: told the elements as they are written.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        kind = tensor.precision or precision
        end = offset + tensor.elements * BYTES[kind]
        entry = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, unsynced = hashlib.sha256(), 0
    with writing(path), open(path, "xb") as file:
        _put(file, len(text).to_bytes(8, "little") + text, digest)
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                typed = block.to(getattr(torch, tensor.precision or precision)).contiguous().reshape(-1)
                _put(file, typed.view(torch.uint8).numpy().data, digest)
                unsynced += typed.nbytes
                if unsynced >= _SYNC:
                    file.flush()
                    os.fdatasync(file.fileno())
                    unsynced = 0
                written += typed.numel()
                tick(typed.numel())
            assert written == tensor.elements, f"{tensor.name}: {written} elements instead of {tensor.elements}"
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _put(file: BinaryIO, data: "bytes | memoryview", digest: "hashlib._Hash") -> None:
    file.write(data)
    digest.update(data)
