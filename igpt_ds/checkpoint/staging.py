"""From a device into the host's memory, a piece at a time.

The driver copies into ordinary memory through a small pinned buffer of its own and waits for each part of it. Here one
of two pinned buffers is filled while the other is in use: no more host memory is taken, whatever the tensors' size.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

PIECE = 1 << 23  # elements: 32 MiB of float32


def pieces(tensors: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The elements of tensors one after another: flat on the CPU, float32, at most `PIECE` at a time.

    A piece is valid until the next is asked for; one of a tensor on the CPU is a part of that tensor.

    Args:
        tensors: each is asked for when its turn comes, and let go before the next.
    """
    buffers: list[Tensor] = []
    filled: tuple[Tensor, torch.cuda.Event] | None = None
    turn = 0
    for part in _parts(tensors):
        if part.device.type == "cpu":
            moving = None
        else:
            if turn == len(buffers):
                buffers.append(_pinned())
            # On the current stream: after all that computed the part, and before whatever changes it or takes its
            # memory. What this buffer held is out of use, since another piece has been asked for.
            target = buffers[turn][: len(part)]
            target.copy_(part, non_blocking=True)
            moving = target, torch.cuda.Event()
            moving[1].record()
            turn = 1 - turn
        if filled is not None:
            yield _arrived(*filled)
        if moving is None:
            yield part
        filled = moving
    if filled is not None:
        yield _arrived(*filled)


def _parts(tensors: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor().detach().reshape(-1).float().split(PIECE)


def _pinned() -> Tensor:
    return torch.empty(PIECE, pin_memory=True)


def _arrived(piece: Tensor, event: "torch.cuda.Event") -> Tensor:
    event.synchronize()
    return piece
