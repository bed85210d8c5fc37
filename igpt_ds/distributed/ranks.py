"""The ranks of a launch: which of them this process is, how they meet, and what they tell one another.

What they tell goes between their processors (gloo), so that it never waits for a GPU's queued work. A process that no
launcher started is the only rank; it meets nobody, and every exchange gives its own value back. The doctor alone meets
otherwise, since it must name ranks that never come.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from igpt_ds.cores import share
from igpt_ds.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass
class Ranks:
    """The ranks of a launch.

    Attributes:
        rank: this process's, of `world`.
        local_rank: among those of this machine, which are its `neighbours`, this one among them.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    neighbours: int = 1
    _control: Any = field(default=None, init=False, repr=False)
    _left: bool = field(default=False, init=False, repr=False)

    def join(self) -> "torch.device":
        """Meet the others, unless that is done; return this rank's device.

        Also a single rank gets a process group, which DeepSpeed needs. Ranks meet once: the first to come again would
        find the store of the old meeting, which ends when rank 0 leaves it.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        assert not (self._left and self.world > 1), "ranks meet once in a process"
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
        limit_threads(self.neighbours)
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            if "RANK" not in os.environ:
                os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
                os.environ["MASTER_PORT"] = str(_free_port())
            store = None
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun's store outlives its ranks: restarted ones would meet the addresses of the dead.
                agent, _, _ = next(rendezvous("env://", self.rank, self.world))
                store = dist.distributed_c10d.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", agent)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        if self._control is None and self.world > 1:
            self._control = dist.new_group(backend="gloo")
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def leave(self) -> None:
        """Leave the process group: the last thing that a rank does, since DeepSpeed cannot join a second one."""
        import torch.distributed as dist

        self._control, self._left = None, True
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def meeting(self) -> "Iterator[Ranks]":
        """Join, and leave at the end; a single rank joins only if DeepSpeed is called within."""
        if self.world > 1:
            self.join()
        else:
            limit_threads(1)
        yield self
        self.leave()

    # --- what they tell one another: each call must be made by all of them -----------------------------------------

    def sum(self, values: "list[float]") -> list[float]:
        """The same sums on every rank, added in float64."""
        if self.world == 1:
            return [float(value) for value in values]
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._control)
        found: list[float] = tensor.tolist()
        return found

    def add_up(self, *arrays: "np.ndarray") -> None:
        """Sum float64 arrays over the ranks, in place."""
        if self.world > 1:
            import torch

            for array in arrays:
                torch.distributed.all_reduce(torch.from_numpy(array), group=self._control)

    def least(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._control)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; also a barrier."""
        return self.sum([float(flag)])[0] > 0

    def from_rank_0(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def gather(self, part: "Tensor") -> "list[Tensor]":
        """All ranks' tensors, of one shape, on rank 0; nothing on the others."""
        if self.world == 1:
            return [part]
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(part) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(part, parts, dst=0, group=self._control)
        return parts or []

    def share_rows(self, make: "Callable[[Tensor, int], Tensor]", rows: "Tensor") -> "Tensor | None":
        """Divide rows over the ranks: `make` of all of them in order on rank 0, None on the others.

        Every rank makes equally many, since a step of a divided network is a collective: what is too many is made and
        dropped.

        Args:
            make: called with this rank's rows and the number of the first of them.
        """
        import torch

        count = len(rows)
        share = -(-count // self.world)
        mine = torch.arange(self.rank * share, (self.rank + 1) * share)
        parts = self.gather(make(rows[mine.clamp(max=count - 1)], self.rank * share))
        return torch.cat(parts)[:count] if parts else None


def launched() -> Ranks:
    """Read what the launcher (deepspeed, torchrun, accelerate, or srun with RANK set) put into the environment."""
    if "RANK" not in os.environ:
        if _whole("WORLD_SIZE", "1") > 1:
            raise UserError("WORLD_SIZE is set but RANK is not: start one process a rank through a launcher")
        return Ranks()
    world = _whole("WORLD_SIZE", "1")
    neighbours = next((_whole(name, "1") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), world)
    return Ranks(_whole("RANK", "0"), world, _whole("LOCAL_RANK", "0"), neighbours)


def limit_threads(neighbours: int) -> None:
    """Give this process its share of the cores, where a person has not: ranks that each use all cores wait for one
    another many times longer than they compute."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(share(neighbours))


def _whole(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}: is {text!r} in the environment, no whole number: let a launcher set it")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
