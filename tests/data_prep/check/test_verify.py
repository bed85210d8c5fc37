"""What verify finds, in one process or several: duplicates for certain, damaged marks, shards that claim too much."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data_prep.check.verify
from data_prep.check.verify import verify
from data_prep.workers.pool import pool
from igpt_ds.dataset.blocks import blocks
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.npy import from_npy, to_npy
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import write_shard
from igpt_ds.errors import UserError
from tests.igpt_ds.dataset.test_shards import ROWS, make_dataset, rewrite_record

ROOT = Path(__file__).resolve().parents[3]


def dataset_of(path: Path, ids: list[list[str]], views: list[int] | None = None) -> Path:
    """Shards with these ids, each as wide as its own longest id; their views are all 0 unless given."""
    path.mkdir()
    palette = Palette(np.zeros((4, 3), np.float32))
    palette.save(path / "palette.npy")
    views = views or [0] * len(ids)
    records = [
        write_shard(path, f"s-{i:05d}", np.zeros((len(here), 4), np.uint16), here, None, rows_per_block=2, view=view)
        for i, (here, view) in enumerate(zip(ids, views, strict=True))
    ]
    Manifest(
        rows=sum(record.rows for record in records if record.view == 0),
        sequence_length=4,
        resolution=2,
        rows_per_block=2,
        storage="uint16",
        palette={"k": 4, "sha256": palette.sha256},
        source="image_folder",
        split="train",
        views=1 + max(views),
        transform={},
        seed=0,
        classes=None,
        versions={},
        rejected=0,
        shards=records,
    ).save(path)
    return path


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    make_dataset(tmp_path / "whole", views=3)
    make_dataset(tmp_path / "cut", views=3)
    tar = tmp_path / "cut" / "train-00004.tar"
    data = bytearray(tar.read_bytes())
    data[900] ^= 1
    tar.write_bytes(data)
    with pool(2) as executor:
        seen: list[int] = []
        assert verify(tmp_path / "whole", seen.append, executor) == verify(tmp_path / "whole")
        assert sum(seen) == sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
        assert len(seen) == 6
        with pytest.raises(UserError, match=r"train-00004\.tar: damaged shard \(its sha256"):
            verify(tmp_path / "cut", None, executor)


def test_the_command_takes_workers(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    command = [sys.executable, "-m", "data_prep", "verify", str(tmp_path / "d"), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "every sha256 right" in result.stdout


def test_a_duplicate_across_shards_of_other_id_widths(tmp_path: Path) -> None:
    path = dataset_of(tmp_path / "d", [["a", "b", "c"], ["long/name", "b", "x"]])
    with pytest.raises(UserError, match=r"id 'b' is there twice in view 0 \(s-00000 and s-00001\): rebuild"):
        verify(path)
    path = dataset_of(tmp_path / "e", [["a", "b", "c"], ["long/name", "é", "x\n"]])
    assert verify(path).rows == 6
    path = dataset_of(tmp_path / "f", [["a", "b", "b"]])
    with pytest.raises(UserError, match=r"id 'b' is there twice in view 0 \(s-00000\)"):
        verify(path)


@pytest.mark.parametrize("at_a_time", [1, 2, 1000])
def test_equal_hashes_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    """A hash of four values: nearly all ids collide, and the answer is still exact."""
    monkeypatch.setattr(data_prep.check.verify, "_hashes", lambda ids: np.array([len(i) % 4 for i in ids], np.uint64))
    monkeypatch.setattr(data_prep.check.verify, "_LOOKED_UP", at_a_time)
    ids = [[f"{i}" * (i % 7 + 1) for i in range(9)], [f"x{i}" * (i % 5 + 1) for i in range(20)]]
    assert verify(dataset_of(tmp_path / "d", ids)).rows == 29
    ids[1][13] = ids[0][4]
    with pytest.raises(UserError, match=rf"id '{ids[0][4]}' is there twice"):
        verify(dataset_of(tmp_path / "e", ids))


def test_views_in_other_orders_and_cuts(tmp_path: Path) -> None:
    assert verify(dataset_of(tmp_path / "d", [["a", "b"], ["c"], ["c", "a"], ["b"]], [0, 0, 1, 1])).rows == 6
    with pytest.raises(UserError, match="views 0 and 1 hold different images"):
        verify(dataset_of(tmp_path / "e", [["a", "b"], ["c"], ["c", "a"], ["d"]], [0, 0, 1, 1]))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"rows": 3}', "\udcff", "differs", "9" * 5000])
def test_damaged_marks(tmp_path: Path, content: str | None) -> None:
    make_dataset(tmp_path / "d")
    mark = tmp_path / "d" / "train-00001.json"
    if content is None:
        mark.unlink()
    elif content == "differs":
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "rows": ROWS - 1}))
    else:
        mark.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"train-00001\.json: .*delete train-00001\.tar and run igpt-data") as caught:
        verify(tmp_path / "d")
    assert "\n" not in str(caught.value)


def rewritten(path: Path, change: dict[str, tarfile.TarInfo | bytes]) -> None:
    """Write a shard anew with some members' bytes or headers changed, its record and its mark made to fit."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            new = change.get(info.name, data)
            if isinstance(new, bytes):
                info.size = len(new)
                tar.addfile(info, io.BytesIO(new))
            else:
                tar.addfile(new, io.BytesIO(data))
    number = Manifest.load(path.parent).shards.index(
        next(shard for shard in Manifest.load(path.parent).shards if shard.name == path.stem)
    )
    facts = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_record(path.parent, number, **facts)
    mark = path.with_suffix(".json")
    mark.write_text(json.dumps({**json.loads(mark.read_text()), **facts}))


def header(shape: str, descr: str = "'<i8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        header("(1000000000000,)") + bytes(32),
        header("(4,)") + bytes(31),
        header("(4,)") + bytes(40),
        header("(-4,)") + bytes(32),
        header("(2, 2)").replace(b"False", b"True ") + bytes(32),
        header("(4,)", "'|O'") + b"cos\nsystem\n(S'true'\ntR.",
        b"",
        b"\x93NUMPY\x02\x00" + header("(4,)")[8:] + bytes(32),
    ],
    ids=["terabytes", "short", "long", "negative", "Fortran", "objects", "empty", "version 2"],
)
def test_arrays_that_claim_what_is_not_there(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError):
        from_npy(data)
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "train-00000.tar"
    rewritten(path, {"train-00000-000000.labels.npy": data})
    with pytest.raises(UserError, match=r"train-00000\.tar: damaged shard \(not a readable tar of arrays"):
        verify(tmp_path / "d")


def test_arrays_come_back_as_they_were() -> None:
    for array in (np.arange(6, dtype=np.uint16).reshape(2, 3), np.array([b"a", b"bc"]), np.empty((0, 4), np.uint8)):
        again = from_npy(to_npy(array))
        assert again.dtype == array.dtype
        assert np.array_equal(again, array)
        assert np.array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)


@pytest.mark.parametrize("kind", ["link", "directory", "another name", "another key", "tokens again"])
def test_members_that_are_not_ours(tmp_path: Path, kind: str) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "train-00000.tar"
    info = tarfile.TarInfo("train-00000-000001.ids.npy")
    if kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    elif kind == "directory":
        info.type = tarfile.DIRTYPE
    elif kind == "another name":
        info.name = "train-00000-000001.ids.npy.gz"
    elif kind == "another key":
        info.name = "train-00000-000003.ids.npy"
    else:
        info.name = "train-00000-000001.tokens.npy"
    rewritten(path, {"train-00000-000001.ids.npy": info})
    with pytest.raises(UserError, match="unexpected member"):
        verify(tmp_path / "d")


def test_blocks_are_the_members_as_stored(tmp_path: Path) -> None:
    tokens = make_dataset(tmp_path / "d")
    found = list(blocks(tmp_path / "d" / "train-00001.tar", ("tokens", "labels")))
    assert [set(block) for block in found] == [{"tokens", "labels"}] * 3
    assert np.array_equal(np.concatenate([block["tokens"] for block in found]), tokens[0, 1])


def test_labels_where_none_belong(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    manifest = Manifest.load(tmp_path / "d")
    replace(manifest, classes=None).save(tmp_path / "d")
    with pytest.raises(UserError, match="a block of ids, labels, tokens where ids, tokens belong"):
        verify(tmp_path / "d")


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """Rows of 256 KiB in blocks of 4: 64 MiB of tokens are checked in a few."""
    path, n = tmp_path / "d", 1 << 17
    dataset_of(path, [["a"]])
    tokens = np.zeros((256, n), np.uint16)
    ids = [f"{i}" for i in range(256)]
    record = write_shard(path, "s-00000", tokens, ids, None, rows_per_block=4, view=0)
    manifest = Manifest.load(path)
    # Not square: the manifest is replaced after it was opened.
    fields = {"sequence_length": n, "rows_per_block": 4, "rows": 256, "shards": [record]}
    del tokens
    dataset = data_prep.check.verify.Dataset(path, replace(manifest, **fields), Palette.load(path / "palette.npy"))
    tracemalloc.start()
    try:
        data_prep.check.verify._check(data_prep.check.verify._Task(dataset))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
