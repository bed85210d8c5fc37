"""One rank of many, alone on this machine."""

import os
from typing import TYPE_CHECKING

from igpt_ds.distributed.ranks import Ranks, limit_threads

if TYPE_CHECKING:
    import torch


class PlayedRanks(Ranks):
    """A rank which is here, while the others are played by torch's fake process group.

    What this rank tells the others, it hears from them.
    """

    def join(self, hang_timeout: float = 0.0) -> "torch.device":
        """Take the device that is here; nobody is waited for."""
        import torch
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        limit_threads(self.neighbours)
        gpu = self.gpu()
        if not dist.is_initialized():
            # Where one of these is missing DeepSpeed asks MPI.
            told = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank, "MASTER_PORT": 1}
            os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"})
            self._named += [*told, "MASTER_ADDR"]  # gone when it leaves: no later line waits for the others to speak
            dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        self._control = dist.group.WORLD
        return torch.device("cpu") if gpu is None else torch.device("cuda", gpu)

    def wait_patiently(self, hang_timeout: float = 0.0) -> None:
        """Nobody hangs."""
