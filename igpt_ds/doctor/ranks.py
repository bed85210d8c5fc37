"""How the ranks meet: through a key-value store, where rank 0 sees who is missing, and never waits for ever.

A collective that one rank does not reach hangs or fails on the others without a name. So every stage of the examination
ends with a `gather`: each rank writes what it has, rank 0 waits for all of it, at most `limit` seconds, and tells all
whether to go on. Collectives (the clocks' barriers, the all-reduce) begin only when every rank is known to be there.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not named in __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.doctor.report import attempt
from igpt_ds.errors import RunError

_BARRIERS = 5


class AbsentError(Exception):
    """Some ranks did not get to the end of a stage; raised on every rank that did.

    Attributes:
        stage: what they were to do.
        ranks: who did not.
    """

    def __init__(self, stage: str, ranks: list[int]) -> None:
        super().__init__(stage, ranks)
        self.stage, self.ranks = stage, ranks


class Group:
    """The ranks that the launcher started.

    Attributes:
        hosts: the host of each rank, once `start` is through.

    Args:
        limit: seconds that rank 0 waits for the others at each stage.

    Raises:
        RunError: no connection to rank 0.
    """

    def __init__(self, where: Ranks, limit: float) -> None:
        self.where, self.limit = where, limit
        self.hosts: list[str] = []
        self._store = _open_store(where, limit)

    def start(self) -> None:
        """Wait until every rank is there.

        Raises:
            AbsentError: some are not.
        """
        self.hosts = self.tell("hosts", self.gather("the start", socket.gethostname()))

    def gather(self, stage: str, value: Any, last: bool = False) -> list[Any]:
        """Every rank's value on rank 0, in order; nothing on the others.

        Args:
            last: only rank 0 waits; the others must not need it any more, since it will end and its store with it.

        Raises:
            AbsentError: a rank has not come within the limit; on all that have.
            RunError: rank 0 itself is gone.
        """
        where = self.where
        with self._rank_0_is_there():
            self._store.set(f"{stage}/{where.rank}", json.dumps(value))
            if where.rank == 0:
                keys = [f"{stage}/{rank}" for rank in range(where.world)]
                self._wait(keys, self.limit)
                absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                self._store.set(f"{stage}/absent", json.dumps(absent))
            else:
                absent = [] if last else self._answer(f"{stage}/absent")
            if absent:
                if not last:
                    self._all_have_heard(stage, absent)
                raise AbsentError(stage, absent)
            return [json.loads(text) for text in self._store.multi_get(keys)] if where.rank == 0 else []

    def _all_have_heard(self, stage: str, absent: list[int]) -> None:
        """The store ends with rank 0, which ends soon: those that are there must have read the bad news."""
        self._store.set(f"{stage}/heard/{self.where.rank}", "yes")
        if self.where.rank == 0:
            there = set(range(self.where.world)) - set(absent)
            self._wait([f"{stage}/heard/{rank}" for rank in sorted(there)], 5.0)

    def tell(self, stage: str, value: Any) -> Any:
        """Rank 0's value on every rank."""
        with self._rank_0_is_there():
            if self.where.rank == 0:
                self._store.set(f"{stage}/told", json.dumps(value))
            return self._answer(f"{stage}/told")

    def label(self, rank: int) -> str:
        return f"{self.hosts[rank]} rank {rank}" if self.hosts else f"rank {rank}"

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its node, which looks at what the node's ranks share."""
        return self.hosts.index(self.hosts[self.where.rank]) == self.where.rank

    @property
    def neighbours(self) -> int:
        """Ranks on this node."""
        return self.hosts.count(self.hosts[self.where.rank])

    def join(self) -> None:
        """Make the process group for collectives between processors; a collective itself.

        Its collectives give up after half the limit, so that a rank that is left alone in one still comes to the
        next `gather` in time.
        """
        where = self.where
        store = PrefixStore("gloo", self._store)
        dist.init_process_group(
            "gloo", store=store, rank=where.rank, world_size=where.world, timeout=timedelta(seconds=self.limit / 2)
        )

    def clock_differences(self) -> list[float]:
        """Seconds that each rank's clock is ahead of the median one; a collective.

        Every rank reads its clock as it leaves a barrier; of some barriers the middle difference counts, since a rank
        may be late at one.
        """
        readings = []
        for _ in range(_BARRIERS):
            dist.barrier()
            clock = torch.zeros(self.where.world, dtype=torch.float64)
            clock[self.where.rank] = time.time()
            dist.all_reduce(clock)
            readings.append(clock - clock.median())
        return torch.stack(readings).median(dim=0).values.tolist()

    def _wait(self, keys: list[str], limit: float) -> bool:
        """Whether all keys are there in time. The store's own `wait` writes a stack trace when they are not."""
        pause, deadline = 0.001, time.monotonic() + limit
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.2)  # a thousand ranks ask one server
        return True

    def _answer(self, key: str) -> Any:
        """What rank 0 writes there, which may wait for another rank before it does."""
        if not self._wait([key], 2 * self.limit):
            raise RuntimeError(f"nothing from rank 0 for {2 * self.limit:.0f} s")
        return json.loads(self._store.get(key))

    @contextlib.contextmanager
    def _rank_0_is_there(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            where = self.where
            raise RunError(
                f"rank {where.rank} on {socket.gethostname()}: rank 0 is gone: see what it printed "
                f"({' '.join(str(error).split())[:100]})"
            ) from error


def _open_store(where: Ranks, limit: float) -> Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT, which rank 0 or torchrun's agent serves."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = where.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _wait_for_port(host, port, limit)
        store = TCPStore(
            host,
            port,
            world_size=None,
            is_master=serves,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,  # would wait without telling for whom
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        what = "cannot serve the others there" if serves else f"no answer within {limit:.0f} s"
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"rank {where.rank} on {socket.gethostname()}: {host}:{port}: {what}: is rank 0 running, and the port free "
            f"and open between the nodes? ({reason})"
        ) from error
    # A restarted job must not read what the attempt before it wrote; the agent's store outlives it.
    return PrefixStore(f"igpt-doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_port(host: str, port: int, limit: float) -> None:
    """Until something listens there. The store's own attempts write stack traces."""
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def within(limit: float, action: Callable[[], Any]) -> tuple[Any, bool]:
    """Do something that may hang, and give up on it.

    Returns:
        What it returned, or {"error": ...}; and whether it hangs still, in a thread that nothing can end.
    """
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(attempt(action)), daemon=True)
    thread.start()
    thread.join(limit)
    if results:
        return results[0], False
    return {"error": f"no end within {limit:.0f} s"}, True
