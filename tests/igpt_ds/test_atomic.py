"""Files that appear whole or not at all, whoever else writes in the directory."""

import os
import secrets
import stat
import threading
from pathlib import Path

import pytest

from igpt_ds.atomic import leftovers, no_link, publish_file, publish_text, unfinished, writing
from igpt_ds.errors import UserError


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even under the very name that is written first, were it guessed."""
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    unfinished(path).symlink_to(victim)
    with pytest.raises(UserError, match="exists already"):
        publish_text(path, "theirs")
    assert victim.read_text() == "mine" and not path.exists()
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(UserError, match="a symbolic link is in the way"), writing(path):
        open(tmp_path / "log", "a", opener=no_link)  # noqa: SIM115
    assert victim.read_text() == "mine"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    (system := tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for path in (pipe, system):
        with pytest.raises(UserError, match="is a device or a pipe, no file: choose another path"):
            publish_text(path, "x")
    with pytest.raises(UserError, match="the path is a directory"):
        publish_text(tmp_path, "x")
    assert pipe.is_fifo() and system.is_symlink() and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "file").write_text("before")
    (link := tmp_path / "link").symlink_to("file")
    publish_text(link, "x")  # what it leads to stays
    assert (link.read_text(), (tmp_path / "file").read_text()) == ("x", "before")


def test_two_writers_never_mix(tmp_path: Path) -> None:
    """Of one process as of two containers, whose host and process id may be the same."""
    path, texts = tmp_path / "file", [letter * 50_000 for letter in "abcd"]
    whole = threading.Barrier(len(texts) + 1)
    faults = []

    def write(text: str) -> None:
        whole.wait()
        try:
            for _ in range(25):
                publish_text(path, text)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    whole.wait()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert faults == []
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            publish_text(tmp_path / "file", "x")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_failed_writer_leaves_nothing_and_a_killed_one_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a[1].npz"
    publish_text(path, "before")
    with pytest.raises(ZeroDivisionError), publish_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and leftovers(path) == []
    killed, others = [unfinished(path), tmp_path / ".a[1].npz.tmp"], [unfinished(tmp_path / "a[1]"), tmp_path / "tmp"]
    for left in (*killed, *others):
        left.write_text("half")
    assert sorted(leftovers(path)) == sorted(killed)
