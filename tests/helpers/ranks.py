"""Start the ranks of a worker module as plain processes, with an end in any case.

No launcher: a test knows the ids of the processes that it started, and ends these and no others. Python's start
and DeepSpeed's import take seconds, so one group of ranks should do many checks.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt_ds.distributed.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quick_start() -> dict[str, str]:
    """This process's environment for a rank: one thread, no GPU, no compiler, no launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def run_ranks(module: str, arguments: list[str], world: int, limit: float) -> list[str]:
    """Run `python -m module arguments` as `world` ranks and wait; what each of them wrote.

    Args:
        limit: seconds after which all of them are killed.

    Raises:
        AssertionError: a rank failed or the time was up; with what every rank wrote.
    """
    shared = quick_start() | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),  # else DeepSpeed asks numactl, a process of its own, for every gradient bucket
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.txt" for rank in range(world)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                ranks.append(process)
            ended = _all_ended(ranks, time.monotonic() + limit)
        finally:
            for process in ranks:
                kill_group(process)
        texts = [log.read_text(errors="replace") for log in logs]
    outputs = "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))
    codes = [process.returncode for process in ranks]
    assert ended and not any(codes), f"{module} on {world} ranks within {limit:.0f} s: exit {codes}\n{outputs}"
    return texts


def recorded(module: str, folder: Path, world: int, limit: float) -> list[Any]:
    """What each rank of a worker module wrote with `record_and_end`; they are run when that is first asked for."""
    paths = [folder / f"{world}-{rank}.json" for rank in range(world)]
    if not all(path.exists() for path in paths):
        run_ranks(module, [str(folder)], world, limit)
    return [json.loads(path.read_text()) for path in paths]


def record_and_end(folder: Path, ranks: "Ranks", record: Any) -> None:
    """What a rank of a worker module does last; the process ends here."""
    (folder / f"{ranks.world}-{ranks.rank}.json").write_text(json.dumps(record))
    ranks.leave()
    sys.stdout.flush()
    # DeepSpeed's threads and hooks need seconds to wind up.
    os._exit(0)


def _all_ended(ranks: "list[subprocess.Popen[bytes]]", deadline: float) -> bool:
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if None not in codes:
            return True
        if any(codes):  # the others would wait for it until their own time-out
            return False
        time.sleep(0.05)
    return False


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that was started with `start_new_session`, and what is left of its session's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
