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

    # Where one of these is missing DeepSpeed asks MPI.
    _TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

    def join(self, hang_timeout: float = 0.0) -> "torch.device":
        """Take the device that is here; nobody is waited for."""
        import torch
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        limit_threads(self.neighbours)
        gpu = self.gpu()
        if not dist.is_initialized():
            told = (self.rank, self.world, self.local_rank, "127.0.0.1", 1)
            os.environ.update(zip(self._TOLD, map(str, told), strict=True))
            dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        self._control = dist.group.WORLD
        return torch.device("cpu") if gpu is None else torch.device("cuda", gpu)

    def leave(self) -> None:
        """Be alone again: nothing is told as one of many, nor waits for the others to speak."""
        super().leave()
        for name in self._TOLD:
            os.environ.pop(name, None)

    def wait_patiently(self, hang_timeout: float = 0.0) -> None:
        """Nobody hangs."""
