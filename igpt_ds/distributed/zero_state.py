"""Weights and Adam moments under any ZeRO stage, as a checkpoint holds them.

With engine.py, which alone uses it, the one door to DeepSpeed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from igpt_ds.checkpoint.read import MOMENTS, Shard
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.weights.base import Weights


class ZeroState:
    """The state of a DeepSpeed engine and its Adam on this rank.

    Args:
        deepspeed: DeepSpeed's engine, which holds the network.
        optimizer: the Adam that it was given.
        stage: of ZeRO.
    """

    def __init__(self, deepspeed: Any, optimizer: torch.optim.AdamW, stage: int, place: Ranks, device: torch.device):
        self._deepspeed, self._module, self._optimizer = deepspeed, deepspeed.module, optimizer
        self._stage, self._place, self._device = stage, place, device

    def shards(self) -> Iterator[Shard]:
        """This rank's part of weights and Adam moments, float32: over all ranks each number exactly once.

        The slices that the rank owns; of what ZeRO-0 keeps whole on every rank, parameters dealt to the ranks in turn.
        """
        for index, (name, p) in enumerate(self._module.named_parameters()):
            if self._stage == 0:
                start, stop = 0, p.numel() if index % self._place.world == self._place.rank else 0
            else:
                start, stop = self._slice(p)
            if start < stop:
                shape = tuple(getattr(p, "ds_shape", p.shape))
                yield Shard(name, shape, start, stop, functools.partial(self._values, p, stop - start))

    def _values(self, p: Any, count: int, kind: str) -> Tensor:
        """The rank's elements of a parameter or one of its moments, flat."""
        if self._stage == 3:
            found = safe_get_local_fp32_param(p) if kind == "weight" else safe_get_local_optimizer_state(p, kind)
            return found[:count]
        if self._stage == 0:
            return (p.data if kind == "weight" else self._optimizer.state[p][kind]).reshape(-1)
        return _fragment(p, kind)

    @torch.no_grad()
    def load(self, checkpoint: Weights, weights_only: bool = False, tick: Callable[[], object] = lambda: None) -> None:
        """Take weights, moments and step from a checkpoint made on any number of ranks at any ZeRO stage.

        Args:
            weights_only: leave moments and step as they are at a beginning, and parameters that the checkpoint does not
                have, such as a new class head.
            tick: called after each parameter.
        """
        # Adam counts updates, and skipped steps made none.
        self.create_moments(0 if weights_only else checkpoint.progress.get("updates", checkpoint.step))
        kinds = ("weight",) if weights_only else ("weight", *MOMENTS)
        for name, p in self._module.named_parameters():
            if weights_only and name not in checkpoint.tensors:
                continue
            if self._stage == 3:
                self._load_slice(checkpoint, name, p, kinds)
            else:
                self._load_whole(checkpoint, name, p, kinds)
            tick()
        persistent = self._deepspeed.optimizer.persistent_parameters if self._stage == 3 else []
        if persistent:
            # Small parameters stay gathered between steps: let go of the old ones, gather the slices anew.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        if self._stage == 3:
            # hpZ's copies, which an evaluation may have made, are of the weights that were here before.
            self._deepspeed.optimizer.invalidate_secondary_tensor()
        self._deepspeed.global_steps = 0 if weights_only else checkpoint.step

    def _slice(self, p: Any) -> tuple[int, int]:
        """First and last + 1 element of the flat parameter that this rank owns; the last ranks' may be short."""
        if self._stage == 3:
            part = p.ds_tensor.numel()
            return min(p.ds_numel, part * self._place.rank), min(p.ds_numel, part * (self._place.rank + 1))
        if p._hp_mapping is None:
            return 0, 0
        owned = p._hp_mapping.lp_fragment_address
        return owned.start, owned.start + owned.numel

    def _load_slice(self, checkpoint: Weights, name: str, p: Any, kinds: Sequence[str]) -> None:
        start, stop = self._slice(p)

        def padded(kind: str) -> Tensor:
            values = torch.zeros(p.ds_tensor.numel(), dtype=torch.float32)
            values[: stop - start] = checkpoint.read(name, kind, start, stop)
            return values.to(self._device)

        weight = padded("weight")
        safe_set_local_fp32_param(p, weight)
        p.ds_tensor.copy_(weight)
        for kind in kinds[1:]:
            safe_set_local_optimizer_state(p, padded(kind), kind)

    def _load_whole(self, checkpoint: Weights, name: str, p: Any, kinds: Sequence[str]) -> None:
        whole = checkpoint.read(name, "weight", 0, p.numel())
        p.copy_(whole.view(p.shape))
        if self._stage == 0:
            for kind in kinds[1:]:
                self._optimizer.state[p][kind].copy_(checkpoint.read(name, kind, 0, p.numel()).view(p.shape))
            return
        start, stop = self._slice(p)
        if start < stop:
            _fragment(p, "weight").copy_(whole[start:stop])
            for kind in kinds[1:]:
                _fragment(p, kind).copy_(checkpoint.read(name, kind, start, stop))

    def create_moments(self, updates: int) -> None:
        """Give torch's Adam the state that it would otherwise create at its first step."""
        owner = self._deepspeed.optimizer
        if self._stage == 3:
            flat = owner.fp32_partitioned_groups_flat
        elif hasattr(owner, "fp32_groups_flat_partition"):
            flat = owner.fp32_groups_flat_partition  # stage 1 in bfloat16: an optimiser class of its own
        elif self._stage > 0:
            flat = owner.single_partition_of_fp32_groups
        else:
            flat = list(self._module.parameters())
        for tensor in flat:
            state = self._optimizer.state[tensor]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(tensor)
            # The fused Adam keeps its counter on the GPU, the plain one on the CPU.
            on = tensor.device if self._optimizer.defaults.get("fused") else torch.device("cpu")
            state["step"] = torch.tensor(float(updates), device=on)
        if self._stage in (1, 2):
            # Otherwise linked to the parameters only after the first step.
            owner._lazy_init_hp_params_optimizer_state()


def _fragment(p: Any, kind: str) -> Tensor:
    """What this rank owns of a parameter, or of one of its moments, under ZeRO-1 and 2: a part of the optimiser's own
    float32 memory."""
    return p._hp_mapping.get_hp_fragment(None if kind == "weight" else kind)
