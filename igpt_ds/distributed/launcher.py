"""A rank ends when its launcher is gone.

A launcher that is killed cannot end its ranks: they would train on unseen, beside those of the next start. So a thread
of each rank looks every second whether the launchers above it live. Launchers alone count, and a learning-rate search:
a shell, nohup, cron or setsid may end as they like, and what no launcher started is never ended.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from igpt_ds.lock import born

_LOOK_EVERY = 1.0  # seconds
_TIME_TO_STOP = 30.0  # seconds that a rank has which is about to stop on request, as launchers give it
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # what `deepspeed` starts on each machine
_SEARCH = "igpt-ds sweep"
_LAUNCHERS = {
    *("deepspeed", "deepspeed.launcher.runner", _NODE_LAUNCHER, _SEARCH),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
}
# These start also what is no rank.
_STARTERS = {"slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted", "prterun"}


class Process(NamedTuple):
    """A living process: `born` tells it from a later one of the same id."""

    pid: int
    born: int
    words: Sequence[str]

    @property
    def program(self) -> str:
        """The file, script or module that runs."""
        words = list(self.words)
        if self.is_python:
            words.pop(0)
            while len(words) > 1 and words[0].startswith("-"):
                option = words.pop(0)
                if option in ("-m", "-c"):
                    break
                if option in ("-X", "-W"):
                    words.pop(0)
        name = words[0].rpartition("/")[2].partition(":")[0] if words else ""  # "slurmstepd: [12.0]"
        return _SEARCH if name in ("igpt-ds", "igpt_ds") and words[1:2] == ["sweep"] else name

    @property
    def is_python(self) -> bool:
        return bool(self.words) and self.words[0].rpartition("/")[2].startswith("python")


def follow(about_to_stop: Callable[[], bool]) -> None:
    """End this process soon after a launcher above it is gone.

    Args:
        about_to_stop: whether somebody has asked this process to stop; it gets the time to save then, since what
            asks the ranks (Ctrl-C, a lost terminal) ends launchers, too.
    """
    mine = born(os.getpid())
    if mine is None:  # no /proc
        return
    above, names = list(ancestors()), _LAUNCHERS if _alone() else _LAUNCHERS | _STARTERS
    launchers = [process for process in above if process.program in names]
    gone = None if _alone() else _gone_already(above)
    if gone or launchers:
        threading.Thread(target=_watch, args=(launchers, gone, about_to_stop), name="launcher", daemon=True).start()


def ancestors() -> Iterator[Process]:
    """The processes above this one, its parent first."""
    pid = os.getppid()
    while pid > 0:
        since = born(pid)
        if since is None:
            return
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return
        yield Process(pid, since, words)
        pid = parent


def _alone() -> bool:
    return "RANK" not in os.environ


def _gone_already(above: Sequence[Process]) -> str | None:
    """What is missing above a rank of the deepspeed launcher: it was killed while the rank was starting."""
    if "CROSS_SIZE" not in os.environ:  # which that launcher alone sets
        return None
    place = next((i for i, process in enumerate(above) if process.program == _NODE_LAUNCHER), None)
    if place is None:
        return _NODE_LAUNCHER
    local = not any(word.startswith("--node_rank") for word in above[place].words)
    if local and not any(process.is_python for process in above[place + 1 : place + 2]):
        return "deepspeed"
    return None


def _watch(launchers: Sequence[Process], gone: str | None, about_to_stop: Callable[[], bool]) -> None:
    while gone is None:
        time.sleep(_LOOK_EVERY)
        dead = next((process for process in launchers if born(process.pid) != process.born), None)
        gone = f"{dead.program}, process {dead.pid}" if dead else None
    deadline = time.monotonic() + _TIME_TO_STOP
    while about_to_stop() and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY)
    rank = f"rank {os.environ['RANK']}: " if not _alone() else ""
    text = f"igpt-ds: {rank}its launcher ({gone}) is gone, so this process ends; what was saved stands\n"
    # In one piece, since all ranks speak. Nobody may read it any more, and it must not wait for that.
    speaker = threading.Thread(target=os.write, args=(2, text.encode()), daemon=True)
    speaker.start()
    speaker.join(1.0)
    os._exit(1)
