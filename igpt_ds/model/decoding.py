"""The step of one token, made quick on each device; what it computes is the network's own forward pass.

GPU: a step has some dozen small kernels a layer, which take longer to launch one by one than to run. It is captured
as a CUDA graph for each span of the cache and replayed; the shapes are fixed, so that torch.compile applies as well.

CPU: a step reads every weight for a few rows, and torch's matrix product spends more time on packing the weights than
on reading them. They are laid out once for oneDNN, by the operators that torch's own compiler calls (measured in
benchmarks/results/sampling.md); where these are missing the plain product serves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_ds.memory import available_bytes
from igpt_ds.model.transformer import Cache, ImageGPT, Linear

Step = Callable[[Tensor, int], Tensor]


@contextmanager
def one_token_step(model: ImageGPT, cache: Cache) -> Iterator[Step]:
    """Within the context a function (token_B1, position) -> logits [B, K] of that position, valid until the next step.

    token_B1, int64 on the device, stands before the position; the cache is filled up to that token. For that time the
    network is not to be called otherwise.
    """
    if cache.position.device.type == "cuda":
        yield _Graphs(model, cache)
        return
    with _packed(model, len(cache.keys[0])):
        yield lambda token_B1, position: model(token_B1, cache=cache).logits_BTK[:, -1]


class _Graphs:
    """Steps captured once for each span, and replayed."""

    def __init__(self, model: ImageGPT, cache: Cache):
        self._model, self._cache = model, cache
        self._token_B1 = torch.zeros(len(cache.keys[0]), 1, dtype=torch.int64, device=cache.position.device)
        self._pool = torch.cuda.graph_pool_handle()  # one memory for all: they are replayed as they were captured
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, token_B1: Tensor, position: int) -> Tensor:
        self._token_B1.copy_(token_B1)
        span = self._cache.at(position)
        if span not in self._captured:
            self._captured[span] = self._capture()
        graph, logits_BK = self._captured[span]
        graph.replay()
        return logits_BK

    def _step(self) -> Tensor:
        return self._model(self._token_B1, cache=self._cache).logits_BTK[:, -1]

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once for the libraries to set themselves up, which may not be captured. It stores the same keys and values at
        # the same position as the replay will.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BK = self._step()
        return graph, logits_BK


class _PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has laid out for so many rows; it keeps the plain weight as well."""

    def __init__(self, linear: Linear, rows: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        bias = None if self.bias is None else times * self.bias
        if x.shape[1] > 1:
            return F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


@contextmanager
def _packed(model: ImageGPT, rows: int) -> Iterator[None]:
    """Give the network packed linear layers, and its own ones back at the end."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear)
    ]
    offered = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    weights = sum(child.weight.nbytes for _, _, child in layers)
    if not offered or model.token_embedding.dtype != torch.float32 or available_bytes() < 2 * weights:
        yield
        return
    try:
        for parent, name, child in layers:
            setattr(parent, name, _PackedLinear(child, rows))
        yield
    finally:
        for parent, name, child in layers:
            setattr(parent, name, child)
