"""The selection file, and the command that writes it."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.selection.file import Selection, write_selection
from igpt_ds.errors import UserError
from tests.helpers.selections import make

ROOT = Path(__file__).resolve().parents[3]
PARTS = {"b.tar": [b"1", b"long/name.jpg"], "a\udcff": [], "c": [b"caf\xc3\xa9", b"\xff"]}


def write(path: Path, **changes: Any) -> Selection:
    given = {"inputs": 9, "dropped": {"unreadable": 2, "near duplicate": 3}, "settings": {"seed": 1}, **changes}
    return write_selection(path, "web", iter((name, np.array(ids, "S")) for name, ids in PARTS.items()), **given)


def test_a_selection_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "s.npz")
    for selection in (written, Selection.open(tmp_path / "s.npz"), pickle.loads(pickle.dumps(written))):
        assert selection.parts == list(PARTS)
        assert {part: selection.kept(part) for part in selection.parts} == {
            part: frozenset(ids) for part, ids in PARTS.items()
        }
        assert (selection.source, selection.inputs, selection.images) == ("web", 9, 4)
        assert selection.dropped == {"unreadable": 2, "near duplicate": 3}
        assert selection.settings == {"seed": 1}
    with pytest.raises(UserError, match=r"was made without d\.tar"):
        written.kept("d.tar")


def test_the_format_is_what_numpy_reads(tmp_path: Path) -> None:
    write(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as members:
        record = json.loads(members["selection.json"].tobytes())
        assert record["format"] == "igpt-ds selection"
        assert record["version"] == 1
        for name, part in record["parts"].items():
            assert members[f"ids/{part['member']}"].tolist() == PARTS[name]
            assert part["kept"] == len(PARTS[name])


def test_the_same_selection_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "one.npz")
    monkeypatch.setattr("time.localtime", lambda *_: (2040, 1, 2, 3, 4, 6, 0, 1, 0))
    assert write(tmp_path / "two.npz").sha256 == first.sha256
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert write(tmp_path / "three.npz", settings={}).sha256 != first.sha256


@pytest.mark.parametrize(
    "changes", [{"inputs": 10}, {"dropped": {"unreadable": 6}}, {"inputs": 3, "dropped": {"x": -1}}]
)
def test_counts_that_do_not_add_up_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kept and"):
        write(tmp_path / "s.npz", **changes)
    assert not list(tmp_path.iterdir())


def test_one_part_is_read_without_the_others(tmp_path: Path) -> None:
    write(tmp_path / "s.npz")
    data = bytearray((tmp_path / "s.npz").read_bytes())
    data[data.index(b"long/name.jpg")] ^= 1
    (tmp_path / "s.npz").write_bytes(data)
    selection = Selection.open(tmp_path / "s.npz")
    assert selection.kept("c") == frozenset(PARTS["c"])
    with pytest.raises(UserError, match=r"ids of part b\.tar cannot be read"):
        selection.kept("b.tar")


def altered(path: Path, **changes: Any) -> None:
    """Rewrite the JSON of a selection; None takes a key away."""
    with np.load(path) as members:
        arrays = dict(members)
    record = json.loads(arrays["selection.json"].tobytes()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    arrays["selection.json"] = np.frombuffer(json.dumps(record).encode(), np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"format": "other"}, "not a readable selection"),
        ({"parts": None}, "not a readable selection"),
        ({"parts": [1]}, "not a readable selection"),
        ({"inputs": 8}, "counts do not add up"),
        ({"kept": 5, "inputs": 10}, "counts do not add up"),
        ({"inputs": float("inf")}, "not a readable selection"),
        ({"inputs": 10**400}, "not a readable selection"),
        ({"dropped": [1]}, "not a readable selection"),
        ({"settings": 5}, "not a readable selection"),
        ({"parts": {"a.tar": {"member": float("nan"), "kept": 1}}}, "not a readable selection"),
    ],
)
def test_a_selection_that_is_none_is_told(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    write(tmp_path / "s.npz")
    altered(tmp_path / "s.npz", **changes)
    with pytest.raises(UserError, match=complaint):
        Selection.open(tmp_path / "s.npz")


def test_other_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    with pytest.raises(UserError, match="no such selection"):
        Selection.open(path)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object))
    for content in (b"", b"PK\x03\x04", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable selection"):
            Selection.open(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("selection.json.npy", pickled.getvalue())
    with pytest.raises(UserError, match="not a readable selection"):
        Selection.open(path)
    with pytest.raises(UserError, match="not a readable selection"):
        Selection.open(tmp_path)
    deep = io.BytesIO()
    np.lib.format.write_array(deep, np.frombuffer(b"[" * 100_000, np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("selection.json.npy", deep.getvalue())
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for each in (path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="not a readable selection"):
            Selection.open(each)


def igpt_data(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_prep", "select", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_the_command(tmp_path: Path) -> None:
    fate = make(tmp_path)
    (tmp_path / "pool/c/lost.gone").unlink()
    arguments = [
        *("image_folder", tmp_path / "pool", "--like", f"image_folder:{tmp_path / 'like'}"),
        *("--exclude", f"image_folder:{tmp_path / 'test'}", "--images", 5, "--embedder", "tiny_pca"),
        *("--clusters", 1, "--work", tmp_path / "work", "--out", tmp_path / "out.npz"),
    ]
    result = igpt_data(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    shown = {line[:24].strip(): line[24:].split() for line in result.stdout.splitlines()}
    assert shown["images"][0] == str(len(fate) - 1)
    assert shown["kept"][:2] == ["5", f"{5 / (len(fate) - 1):.2%}"]
    assert shown["- unreadable"][2:] == ["empty", "file", "1,", "not", "an", "image", "1"]
    assert shown["- close to evaluation"][0] == "1"
    selection = Selection.open(tmp_path / "out.npz")
    assert selection.sha256 in result.stdout
    assert selection.images == 5
    assert selection.settings["embedder"]["name"] == "tiny_pca"
    assert {path.name for path in tmp_path.glob("out*")} == {"out.npz", "out.histogram.png", "out.sheet.png"}


def test_bad_arguments(tmp_path: Path) -> None:
    make(tmp_path)
    good: dict[str, object] = {
        "--like": f"image_folder:{tmp_path / 'like'}",
        "--images": 5,
        "--embedder": "tiny_pca",
        "--work": tmp_path / "work",
        "--out": tmp_path / "out.npz",
    }
    for changes, complaint in [
        ({"--like": None}, "--like"),
        ({"--like": "image_folder"}, "is not SOURCE[,NAME=VALUE...]:PATH"),
        ({"--like": "image_folder,x:there"}, "is not SOURCE[,NAME=VALUE...]:PATH"),
        ({"--like": "image_folder,x=1:there"}, "no such option"),
        ({"--exclude": "cats:there"}, "no such source"),
        ({"--embedder": "none"}, "no such embedder"),
        ({"--embedder": "timm"}, "needs --model"),
        ({"--clusters": 1000}, "that can be read: choose fewer"),
        ({"--wait": ""}, "--wait: is for --executor slurm"),
    ]:
        chosen = {**good, **changes}
        arguments = [each for pair in chosen.items() if pair[1] is not None for each in pair if each != ""]
        from click.testing import CliRunner

        from data_prep.cli import cli

        result = CliRunner().invoke(cli, ["select", "image_folder", str(tmp_path / "pool"), *map(str, arguments)])
        told = str(result.exception) if isinstance(result.exception, UserError) else result.output
        assert complaint in told, told
        assert isinstance(result.exception, UserError) or result.exit_code == 2
        assert not (tmp_path / "out.npz").exists()
