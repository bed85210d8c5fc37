"""From a device into the host's memory: the same values through two small buffers, none before it has arrived."""

from typing import Any

import pytest
import torch

from igpt_ds.checkpoint import staging

PIECE = 8


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


class Stream:
    """What a GPU does by and by: copies, each of them at once, or not before somebody waits for it."""

    def __init__(self, eager: bool) -> None:
        self.queue: list[Any] = []
        self.done, self.eager = 0, eager

    def add(self, action: Any) -> None:
        self.queue.append(action)
        if self.eager:
            self.finish(len(self.queue))

    def finish(self, count: int) -> None:
        for action in self.queue[self.done : count]:
            action()
        self.done = max(self.done, count)


@pytest.fixture(params=[True, False], ids=["at once", "late"])
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A GPU in play; the pinned buffers that are made."""
    stream, buffers = Stream(request.param), list[torch.Tensor]()

    class Pinned(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "Pinned":  # type: ignore[override]
            assert non_blocking
            plain, values = self.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor)
            stream.add(lambda: plain.copy_(values))
            return self

    class Event:
        def record(self) -> None:
            self.after = len(stream.queue)

        def synchronize(self) -> None:
            stream.finish(self.after)

    def pinned() -> torch.Tensor:
        buffers.append(torch.empty(PIECE).as_subclass(Pinned))
        return buffers[-1]

    monkeypatch.setattr(staging, "PIECE", PIECE)
    monkeypatch.setattr(staging, "_pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return buffers


@pytest.mark.parametrize("counts", [[], [0], [3], [8], [9], [100], [5, 8, 0, 17, 1, 1, 30]], ids=str)
@pytest.mark.parametrize("on", ["device", "host", "both"])
def test_pieces_are_the_values_in_order(played: list[torch.Tensor], counts: list[int], on: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(count, generator=generator) for count in counts]
    given = [
        value.as_subclass(OnDevice) if on == "device" or (on == "both" and number % 3) else value
        for number, value in enumerate(values)
    ]
    found = []
    for piece in staging.pieces(lambda value=value: value for value in given):
        assert len(piece) <= PIECE
        found.append(piece.as_subclass(torch.Tensor).clone())
    assert torch.equal(torch.cat([torch.empty(0), *found]), torch.cat([torch.empty(0), *values]))
    assert len(played) <= 2 and (on != "host" or not played)


def test_what_is_on_the_host_is_not_copied() -> None:
    value = torch.randn(6, 5)
    (piece,) = staging.pieces([lambda: value])
    assert piece.data_ptr() == value.data_ptr() and piece.shape == (30,)


def test_other_types_become_float32(played: list[torch.Tensor]) -> None:
    value = torch.arange(12, dtype=torch.bfloat16)
    assert torch.equal(torch.cat(list(staging.pieces([lambda: value]))), value.float())
