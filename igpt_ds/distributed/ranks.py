"""The ranks of a launch: which of them this process is, how they meet, and what they tell one another.

What they tell goes between their processors (gloo), so that it never waits for a GPU's queued work. A process that no
launcher started is the only rank; it meets nobody, and every exchange gives its own value back. The doctor alone meets
otherwise, since it must name ranks that never come.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from igpt_ds.cores import share
from igpt_ds.errors import RunError, UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

T = TypeVar("T")

_AGENT_ANSWERS = 30.0  # seconds
_MEETING = timedelta(minutes=10)
_REMEDY = "start it through a launcher, which sets them all, or unset RANK and WORLD_SIZE"


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
    _named: list[str] = field(default_factory=list, init=False, repr=False)  # variables that DeepSpeed asked for

    def join(self, hang_timeout: float = 900.0) -> "torch.device":
        """Meet the others, unless that is done; return this rank's device.

        Also a single rank gets a process group, which DeepSpeed needs. Ranks meet once: the first to come again would
        find the store of the old meeting, which ends when rank 0 leaves it.

        Args:
            hang_timeout: see `wait_patiently`.

        Raises:
            UserError: there is no GPU for this rank alone, but there are some.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not named in __all__

        assert not (self._left and self.world > 1), "ranks meet once in a process"
        gpu = self.gpu()
        if gpu is not None:
            torch.cuda.set_device(gpu)
        limit_threads(self.neighbours)
        if not dist.is_initialized():
            store = TCPStore("127.0.0.1", 0, is_master=True) if self.world == 1 else self._store()
            if gpu is not None and torch.cuda.device_count() == 1:
                self._require_own_gpu(store, str(torch.cuda.get_device_properties(gpu).uuid))
            if self.world == 1:
                # Nobody is met, but where one of these is missing DeepSpeed asks MPI.
                alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
                for name, value in {**alone, "MASTER_PORT": str(store.port)}.items():
                    if name not in os.environ:
                        os.environ[name] = value
                        self._named.append(name)
            backend, timeout = "gloo" if gpu is None else "nccl", _longer_than(hang_timeout)
            store.set_timeout(timeout)  # where NCCL's ranks meet, at their first collective
            with self._met():
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        if self._control is None and self.world > 1:
            self._control = dist.new_group(backend="gloo", timeout=_longer_than(hang_timeout))
        return torch.device("cpu") if gpu is None else torch.device("cuda", gpu)

    def gpu(self) -> int | None:
        """Which of the GPUs that this process sees is this rank's: that of its number, or the only one, where a
        scheduler shows each rank its own alone. None: it sees none."""
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if 1 < seen <= self.local_rank:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank} on its machine, but there are {seen} GPUs: start one "
                "rank a GPU (deepspeed --num_gpus, torchrun --nproc-per-node, sbatch --ntasks-per-node)"
            )
        return min(seen - 1, self.local_rank) if seen else None

    def _require_own_gpu(self, store: Any, gpu: str) -> None:
        """Refuse ranks that all see the same only GPU: NCCL would say so in many lines.

        Args:
            store: where the ranks meet, which they have not yet.
            gpu: what tells this rank's GPU from all others.
        """
        store.set(f"gpu/{self.rank}", gpu)
        everyones = store.multi_get([f"gpu/{rank}" for rank in range(self.world)])
        for rank, theirs in enumerate(everyones):
            if theirs in everyones[:rank]:
                raise UserError(
                    f"ranks {everyones.index(theirs)} and {rank} see the same only GPU: start one rank a GPU, or show "
                    "each rank another (CUDA_VISIBLE_DEVICES)"
                )

    def _store(self) -> Any:
        """Where ranks meet: rank 0 serves it at MASTER_ADDR:MASTER_PORT, or torchrun's agent does."""
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent, prefix = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", "ranks"
        if agent:
            # The agent's store outlives its ranks: restarted ones would meet the addresses of the dead.
            prefix = f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            if agent:  # it is there before its ranks are
                socket.create_connection((host, port), timeout=_AGENT_ANSWERS).close()
            elif self.rank == 0:
                _require_free(port)
            else:
                socket.getaddrinfo(host, port)
        except OSError as error:
            where = f"MASTER_ADDR, MASTER_PORT: {host}:{port}:"
            if agent:
                raise UserError(
                    f"{where} torchrun does not answer there ({error}): it is gone; or, if its variables are left "
                    "over, unset RANK, WORLD_SIZE and TORCHELASTIC_USE_AGENT_STORE"
                ) from error
            remedy = "choose another port (deepspeed --master_port, torchrun --master-port)"
            raise RunError(f"{where} {error.strerror}: {remedy if self.rank == 0 else 'mend the address'}") from error
        with self._met():
            store, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=_MEETING))
        return PrefixStore(prefix, store)

    @contextmanager
    def _met(self) -> Iterator[None]:
        """Turn what torch says of ranks that cannot meet into a line."""
        from torch.distributed import DistError

        try:
            yield
        except DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{self.world} ranks: did not meet at {where}: {reason}") from error

    def wait_patiently(self, hang_timeout: float = 0.0) -> None:
        """Leave hangs to the watchdog, in all groups that there are: NCCL waits for ten minutes, and then ends its
        rank without telling who hangs.

        Args:
            hang_timeout: seconds without progress after which the watchdog ends a rank; torch's own time-out will be
                longer. 0: torch has none, as long as ranks train. It would run on while a job is suspended, and end
                it when it is resumed.
        """
        if self.world > 1:
            from torch.distributed import ProcessGroup, distributed_c10d

            for group in list(distributed_c10d._world.pg_map):
                if isinstance(group, ProcessGroup):
                    distributed_c10d._set_pg_timeout(_longer_than(hang_timeout), group)

    def leave(self) -> None:
        """Leave the process group: the last thing that a rank of several does."""
        import torch.distributed as dist

        self._control, self._left = None, True
        while self._named:
            os.environ.pop(self._named.pop(), None)
        if dist.is_initialized():
            # Where DeepSpeed was used, it forgets its groups, too: a process may train again.
            door = sys.modules.get("deepspeed.comm.comm")
            (door if door is not None and door.is_initialized() else dist).destroy_process_group()

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
    """Read what the launcher (deepspeed, torchrun, accelerate, or srun with RANK set) put into the environment.

    Raises:
        UserError: a part of it is missing, or contradicts another.
    """
    if "RANK" not in os.environ:
        for name, alone in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            if _whole(name, alone) != alone:
                raise UserError(f"{name} is {os.environ[name]}, but RANK is not set: {_REMEDY}")
        return Ranks()
    rank, world = _whole("RANK"), _whole("WORLD_SIZE")
    if rank >= world:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {world}: {_REMEDY}")
    neighbours = world
    stated = {name: _whole(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ}
    if stated:
        neighbours = min(world, *stated.values())
        if neighbours == 0 or len(set(stated.values())) > 1:
            raise UserError(f"{', '.join(f'{name} is {count}' for name, count in stated.items())}: {_REMEDY}")
    local_rank = _whole("LOCAL_RANK", 0 if world == 1 else None)
    if local_rank >= neighbours:
        raise UserError(f"LOCAL_RANK is {local_rank}, but there are {neighbours} ranks on this machine: {_REMEDY}")
    if world > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"RANK is set, but MASTER_ADDR is not: {_REMEDY}")
        if not 0 < _whole("MASTER_PORT") < 65536:
            raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, not a port: {_REMEDY}")
    return Ranks(rank, world, local_rank, neighbours)


def _longer_than(hang_timeout: float) -> timedelta:
    """A time-out that a rank does not reach which the watchdog ends, after twice `hang_timeout` at the latest."""
    return max(_MEETING, timedelta(seconds=3 * hang_timeout)) if hang_timeout else timedelta(days=3650)


def limit_threads(neighbours: int) -> None:
    """Give this process its share of the cores, where a person has not: ranks that each use all cores wait for one
    another many times longer than they compute."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(share(neighbours))


def _whole(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"RANK is set, but {name} is not: {_REMEDY}")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(f"{name}: is {text!r} in the environment, no whole number: {_REMEDY}")
    return int(text)


def _require_free(port: int) -> None:
    """As torch does, which would tell a port that is taken by lines of its own."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        probe.listen()
