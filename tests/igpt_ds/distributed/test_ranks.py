"""What a launcher must have put into the environment, and ranks that cannot meet or wait long for one another."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest

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
        assert [process.wait(60) for process in processes] == [0] * len(processes)
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
