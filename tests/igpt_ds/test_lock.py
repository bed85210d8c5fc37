"""One owner of a directory: who is refused, who takes over, and who may publish no more."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds import lock
from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_STALE", 0.6)


def planted(folder: Path, **changes: Any) -> Path:
    """A lock as if another process had left it."""
    held = Lock.take(folder)
    owner = lock.read(held.path)
    assert owner is not None
    held.release()
    (folder / lock.NAME).write_text(json.dumps(asdict(replace(owner, token="other", **changes))))
    return folder / lock.NAME


def test_the_second_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    held = Lock.take(tmp_path)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since .*: wait for its end"):
        Lock.take(tmp_path)
    held.require()
    held.release()
    assert list(tmp_path.iterdir()) == []
    Lock.take(tmp_path).release()


def test_of_many_that_come_at_once_one_owns(tmp_path: Path) -> None:
    planted(tmp_path, pid=2**22 + 1)  # a dead one's, which all find
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from igpt_ds.errors import UserError\nfrom igpt_ds.lock import Lock\n"
        "try: held = Lock.take(Path(sys.argv[1]))\nexcept UserError: sys.exit(2)\n"
        "time.sleep(3); held.require(); held.release()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(6)]
    assert sorted(process.wait(timeout=60) for process in processes) == [0, 2, 2, 2, 2, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_is_no_hindrance(tmp_path: Path) -> None:
    planted(tmp_path, pid=2**22 + 1)
    Lock.take(tmp_path).release()
    # Its number has a new process: this one's, which started at another time.
    planted(tmp_path, born=1)
    Lock.take(tmp_path).release()
    # A killed one, which is a zombie as long as nobody asks for its end.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        planted(tmp_path, pid=process.pid, born=lock.born(process.pid))
        with pytest.raises(UserError, match=f"process {process.pid} "):
            Lock.take(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        Lock.take(tmp_path).release()


def test_a_copy_of_an_owned_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    held = Lock.take(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    Lock.take(tmp_path / "copy").release()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="in use by process"):
        Lock.take(tmp_path / "moved")
    held.release()


def test_an_owner_on_another_machine(tmp_path: Path) -> None:
    path = planted(tmp_path, machine="another")
    Lock.take(tmp_path).release()  # it is silent for so long that it is dead
    path = planted(tmp_path, machine="another", host="far")
    os.utime(path, (0, 0))
    begin = time.monotonic()
    Lock.take(tmp_path).release()
    assert time.monotonic() - begin < 0.5, "old already: nothing to wait for"
    path = planted(tmp_path, machine="another", host="far")
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="on far since"):
            Lock.take(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_who_lost_its_lock_publishes_no_more(tmp_path: Path) -> None:
    held = Lock.take(tmp_path)
    held.path.unlink()
    with pytest.raises(RunError, match="nobody: the lock was deleted"):
        held.require()
    second = Lock.take(tmp_path)
    with pytest.raises(RunError, match=f"owns it no longer, but process {os.getpid()} on "):
        held.require()
    held.release()
    second.require()  # the first's end leaves the second's lock alone
    second.release()


def test_the_owner_shows_that_it_lives(tmp_path: Path) -> None:
    held = Lock.take(tmp_path)
    os.utime(held.path, (0, 0))
    deadline = time.monotonic() + 10
    while held.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held.path.stat().st_mtime > 0
    held.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "[" * 100_000])
def test_what_is_no_lock_is_no_hindrance(content: str, tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text(content)
    Lock.take(tmp_path).release()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (tmp_path / lock.NAME).symlink_to(victim)
    Lock.take(tmp_path).release()
    assert victim.read_text() == "whole"


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Path) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    held = Lock.take(tmp_path)
    with pytest.raises(UserError, match="in use by process"):
        Lock.take(tmp_path)
    held.release()
    assert list(tmp_path.iterdir()) == []
