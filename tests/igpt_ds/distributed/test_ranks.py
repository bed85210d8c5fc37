"""What a launcher must have put into the environment, and ranks that cannot meet or wait long for one another."""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from igpt_ds.distributed import ranks
from igpt_ds.distributed.ranks import Ranks, launched
from igpt_ds.errors import RunError, UserError
from tests.helpers.ranks import ROOT, free_port, kill_group, quick_start

MASTER = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables."""
    for name in [
        name for name in os.environ if name.startswith(("RANK", "WORLD_", "LOCAL_", "MASTER_", "TORCHELASTIC"))
    ]:
        monkeypatch.delenv(name)
    return monkeypatch


def set_words(environment: pytest.MonkeyPatch, words: str) -> None:
    for word in words.split():
        environment.setenv(*word.split("=", 1))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Ranks(0, 1, 0, 1)),
        ("WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_SIZE=1", Ranks(0, 1, 0, 1)),
        ("RANK=0 WORLD_SIZE=1", Ranks(0, 1, 0, 1)),
        (f"RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 {MASTER}", Ranks(3, 4, 1, 2)),
        (f"RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_SIZE=2 LOCAL_WORLD_SIZE=2 {MASTER}", Ranks(1, 4, 1, 2)),
        (f"RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 {MASTER}", Ranks(1, 4, 1, 4)),
        (f"RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 {MASTER}", Ranks(1, 2, 1, 2)),  # at most so many
    ],
)
def test_what_a_launcher_says_is_taken(environment: pytest.MonkeyPatch, words: str, expected: Ranks) -> None:
    set_words(environment, words)
    assert launched() == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("RANK=1", "RANK is set, but WORLD_SIZE is not"),
        ("RANK=0", "RANK is set, but WORLD_SIZE is not"),
        ("RANK=2 WORLD_SIZE=1", "RANK is 2, but WORLD_SIZE is 1"),
        (f"RANK=3 WORLD_SIZE=2 LOCAL_RANK=0 {MASTER}", "RANK is 3, but WORLD_SIZE is 2"),
        ("RANK=0 WORLD_SIZE=0", "RANK is 0, but WORLD_SIZE is 0"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, but RANK is not set"),
        ("WORLD_SIZE=0", "WORLD_SIZE is 0, but RANK is not set"),
        ("LOCAL_RANK=1", "LOCAL_RANK is 1, but RANK is not set"),
        (f"RANK=1 WORLD_SIZE=2 {MASTER}", "LOCAL_RANK is not"),
        (f"RANK=1 WORLD_SIZE=2 LOCAL_RANK=2 {MASTER}", "LOCAL_RANK is 2, but there are 2 ranks on this machine"),
        (f"RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_SIZE=1 {MASTER}", "LOCAL_RANK is 1, but there are 1 ranks"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=3", "LOCAL_RANK is 3, but there are 1 ranks"),
        (f"RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_SIZE=0 {MASTER}", "LOCAL_SIZE is 0"),
        (
            f"RANK=1 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_SIZE=2 LOCAL_WORLD_SIZE=1 {MASTER}",
            "LOCAL_WORLD_SIZE is 1, LOCAL_SIZE is 2",
        ),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_PORT=29500", "RANK is set, but MASTER_ADDR is not"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR= MASTER_PORT=29500", "RANK is set, but MASTER_ADDR is not"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h", "RANK is set, but MASTER_PORT is not"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=x", "MASTER_PORT: is 'x' in the environment"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=0", "MASTER_PORT is 0, not a port"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=65536", "MASTER_PORT is 65536, not a port"),
        ("RANK=-1 WORLD_SIZE=2", "RANK: is '-1' in the environment, no whole number"),
        ("RANK=0 WORLD_SIZE=99999999999999999999", "no whole number"),
        ("RANK=0 WORLD_SIZE=\u0662", "no whole number"),
    ],
)
def test_what_is_missing_or_contradictory_is_a_line(environment: pytest.MonkeyPatch, words: str, told: str) -> None:
    set_words(environment, words)
    with pytest.raises(UserError, match=told) as caught:
        launched()
    assert str(caught.value).endswith(
        ": start it through a launcher, which sets them all, or unset RANK and WORLD_SIZE"
    )


def test_a_port_that_is_taken_is_a_line(environment: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        set_words(environment, f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
        with pytest.raises(RunError, match=f"127.0.0.1:{port}: Address already in use: choose another port"):
            Ranks(0, 2, 0, 2).join()


def test_an_address_that_leads_nowhere_is_a_line(environment: pytest.MonkeyPatch) -> None:
    set_words(environment, "MASTER_ADDR=nowhere.invalid MASTER_PORT=29500")
    with pytest.raises(RunError, match=r"nowhere.invalid:29500: .*: mend the address"):
        Ranks(1, 2, 1, 2).join()


def test_ranks_that_never_come_are_a_line(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(ranks, "_MEETING", timedelta(seconds=1))
    set_words(environment, f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}")
    for rank in range(2):
        with pytest.raises(RunError, match=r"2 ranks: did not meet at 127.0.0.1:\d+: ") as caught:
            Ranks(rank, 2, rank, 2).join()
        assert "\n" not in str(caught.value)


def test_variables_that_torchrun_left_over_are_a_line(environment: pytest.MonkeyPatch) -> None:
    set_words(environment, f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()} TORCHELASTIC_USE_AGENT_STORE=True")
    with pytest.raises(UserError, match=r"torchrun does not answer there .* unset RANK, WORLD_SIZE and TORCHELASTIC"):
        Ranks(1, 2, 1, 2).join()


def run(script: str, *environments: dict[str, str]) -> None:
    """Run a script once for each environment, at the same time; all of them must end well, and soon."""
    processes = []
    try:
        for each in environments:
            command = [sys.executable, "-c", script]
            processes.append(subprocess.Popen(command, env=quick_start() | each, cwd=ROOT, start_new_session=True))
        assert [process.wait(200) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            kill_group(process)


def test_a_single_rank_meets_nobody_whatever_is_left_over() -> None:
    script = """
import os
from igpt_ds.distributed.ranks import launched
ranks = launched()
ranks.join()
assert all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
ranks.leave()
"""
    left = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        run(script, {}, {"RANK": "0", "WORLD_SIZE": "1"}, left | port)


def test_ranks_that_train_wait_longer_than_torch_would() -> None:
    """As when a job is suspended in the midst of a collective."""
    script = """
import time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed.distributed_c10d as c
from igpt_ds.distributed.ranks import launched
ranks = launched()
ranks.join()
for group in (None, ranks._control):
    c._set_pg_timeout(timedelta(seconds=1), group)
ranks.wait_patiently()
for group in (None, ranks._control):
    time.sleep(2.5 * ranks.rank)
    c.all_reduce(c.torch.ones(1), group=group)
ranks.leave()
"""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run(script, *({"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared for rank in range(2)))


def test_torch_waits_longer_than_the_watchdog() -> None:
    """NCCL's ten minutes would end a rank before the watchdog's fifteen, without a word about who hangs."""
    script = """
import torch
from torch.distributed import distributed_c10d
from igpt_ds.distributed.ranks import launched
ranks = launched()
ranks.join(hang_timeout=7200)
distributed_c10d.new_group([0, 1])  # as DeepSpeed makes its own
def waits():
    yield distributed_c10d._get_default_store().timeout
    for group in distributed_c10d._world.pg_map:
        yield group._get_backend(torch.device("cpu")).options._timeout
joined, *made = [wait.total_seconds() for wait in waits()]
assert [joined, *made[:2]] == [21600] * 3 and len(made) == 3, (joined, made)
ranks.wait_patiently(7200)
assert {wait.total_seconds() for wait in waits()} == {21600}
ranks.wait_patiently(1)
assert min(waits()).total_seconds() == 600
ranks.wait_patiently(0)
assert sorted(waits())[1].days > 365
ranks.leave()
"""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run(script, *({"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared for rank in range(2)))


@pytest.mark.parametrize(("seen", "local_rank", "expected"), [(0, 3, None), (8, 3, 3), (4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, seen: int, local_rank: int, expected: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert Ranks(3, 16, local_rank, 4).gpu() == expected


def test_more_ranks_than_gpus_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = "rank 6 is number 2 on its machine, but there are 2 GPUs: start one rank a GPU"
    with pytest.raises(UserError, match=told):
        Ranks(6, 8, 2, 4).join()


class OneGpuEach:
    """Ranks as threads of this process, each of which sees one GPU; what they asked of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: list[str]):
        self._gpus, self.devices, self.groups = gpus, list[int](), list[tuple[str, int]]()
        mine, store = threading.local(), HashStore()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", self.devices.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=gpus[mine.rank]))
        monkeypatch.setattr(Ranks, "_store", lambda ranks: setattr(mine, "rank", ranks.rank) or store)
        monkeypatch.setattr(
            torch.distributed, "init_process_group", lambda backend, rank, **_: self.groups.append((backend, rank))
        )
        monkeypatch.setattr(torch.distributed, "new_group", lambda **_: "between processors")

    def join(self) -> list[str]:
        """What became of each rank."""
        world = len(self._gpus)

        def join(rank: int) -> str:
            try:
                return str(Ranks(rank, world, rank, world).join())
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(join, range(world)))


def test_ranks_that_each_see_one_gpu_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `srun --gpus-per-task=1` and `--gpu-bind=single` start them."""
    started = OneGpuEach(monkeypatch, ["a", "b", "c"])
    assert started.join() == ["cuda:0"] * 3
    assert started.devices == [0] * 3
    assert sorted(started.groups) == [("nccl", 0), ("nccl", 1), ("nccl", 2)]


def test_ranks_that_see_the_same_only_gpu_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started = OneGpuEach(monkeypatch, ["a", "b", "a"])
    assert len(set(told := started.join())) == 1
    assert told[0].startswith("ranks 0 and 2 see the same only GPU: start one rank a GPU, or show each rank another")
    assert started.groups == []
