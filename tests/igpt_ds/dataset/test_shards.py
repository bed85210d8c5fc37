"""The shard format: stock tools read it, our reader finds every row, and each kind of damage is named."""

import errno
import hashlib
import json
import math
import os
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_prep.check.verify import verify
from igpt_ds.dataset.manifest import Manifest, ShardRecord
from igpt_ds.dataset.npy import from_npy, read_npy, to_npy
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset, read_mark, write_shard
from igpt_ds.errors import UserError
from igpt_ds.loading.loader import shard_labels

N, K, ROWS = 16, 64, 11


def make_dataset(
    path: Path,
    labelled: bool = True,
    views: int = 1,
    *,
    side: int = 4,
    k: int = K,
    storage: str = "uint16",
    **changed: object,
) -> np.ndarray:
    """Two shards of 11 rows a view in blocks of 4; returns the tokens [views, 2, rows, n]."""
    rng = np.random.default_rng(0)
    path.mkdir()
    palette = Palette(rng.uniform(-1, 1, (k, 3)).astype(np.float32))
    palette.save(path / "palette.npy")
    tokens = rng.integers(0, k, (views, 2, ROWS, side**2)).astype(np.uint16)
    if "tokens" in changed:
        tokens[0, 1, 7, 3] = changed.pop("tokens")
    ids = [f"a/{i}.png" for i in range(2 * ROWS)]
    if "ids" in changed:
        ids[13] = str(changed.pop("ids"))
    labels = np.arange(2 * ROWS) % 3
    records = []
    for view in range(views):
        for i in range(2):
            here = slice(i * ROWS, (i + 1) * ROWS)
            records.append(
                write_shard(
                    path,
                    f"train-{2 * view + i:05d}",
                    tokens[view, i],
                    ids[here],
                    labels[here] if labelled else None,
                    rows_per_block=4,
                    view=view,
                    storage=storage,
                    note={"why": "test"},
                )
            )
    fields = {
        "rows": 2 * ROWS,
        "sequence_length": side**2,
        "resolution": side,
        "rows_per_block": 4,
        "storage": storage,
        "palette": {"k": k, "sha256": palette.sha256},
        "source": "image_folder",
        "split": "train",
        "views": views,
        "transform": {"crop": "none"},
        "seed": 0,
        "classes": ["x", "y", "z"] if labelled else None,
        "versions": {},
        "rejected": 0,
        "shards": records,
    }
    Manifest(**{**fields, **changed}).save(path)
    return tokens


def rewrite_record(path: Path, index: int, **changed: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][index].update(changed)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("labelled", [True, False])
def test_every_row_is_found(tmp_path: Path, labelled: bool) -> None:
    tokens = make_dataset(tmp_path / "d", labelled)[0]
    dataset = Dataset.open(tmp_path / "d")
    assert (dataset.rows, dataset.sequence_length, dataset.palette.k) == (2 * ROWS, N, K)
    for shard in range(2):
        assert np.array_equal(dataset.tokens(shard), tokens[shard])
        for row in range(ROWS):
            assert np.array_equal(dataset.read(shard, row), tokens[shard, row])
    assert np.array_equal(dataset.read_many([(1, 10), (0, 0)]), tokens[[1, 0], [10, 0]])
    assert [i.decode() for i in dataset.ids()] == [f"a/{i}.png" for i in range(2 * ROWS)]
    with pytest.raises(IndexError):
        dataset.read(0, ROWS)
    if labelled:
        assert np.array_equal(dataset.labels(), np.arange(2 * ROWS) % 3)
        assert dataset.labels().dtype == np.int64
    else:
        with pytest.raises(UserError, match="no labels"):
            dataset.labels()


def test_views_are_kept_apart(tmp_path: Path) -> None:
    tokens = make_dataset(tmp_path / "d", views=3)
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.rows == 2 * ROWS
    assert [shard.view for shard in dataset.manifest.shards] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(dataset.tokens(5), tokens[2, 1])
    assert len(dataset.labels()) == len(dataset.ids()) == 2 * ROWS
    assert verify(tmp_path / "d").rows == 6 * ROWS


def test_dataset_is_picklable_and_bounds_its_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_dataset(tmp_path / "d", views=3)
    monkeypatch.setattr("igpt_ds.dataset.shards._OPEN_FILES", 2)
    dataset = Dataset.open(tmp_path / "d")
    for _ in range(3):
        for shard in range(6):
            assert np.array_equal(dataset.read(shard, 5), tokens[shard // 2, shard % 2, 5])
            assert len(dataset._files) <= 2
    again = pickle.loads(pickle.dumps(dataset))
    assert not again._files
    assert np.array_equal(again.read(3, 2), tokens[1, 1, 2])


def test_stock_webdataset_reads_the_same_rows(tmp_path: Path) -> None:
    tokens = make_dataset(tmp_path / "d")[0]
    urls = [str(tmp_path / "d" / f"train-{i:05d}.tar") for i in range(2)]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [len(sample["tokens.npy"]) for sample in samples] == [4, 4, 3, 4, 4, 3]
    assert np.array_equal(np.concatenate([s["tokens.npy"] for s in samples]), tokens.reshape(-1, N))
    assert np.array_equal(np.concatenate([s["labels.npy"] for s in samples]), np.arange(2 * ROWS) % 3)
    assert samples[0]["__key__"] == "train-00000-000000"


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_dataset(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with tarfile.open(tmp_path / "one" / "train-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_the_mark_carries_the_record_and_the_note(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    record, note = read_mark(tmp_path / "d", "train-00001")
    assert record == Manifest.load(tmp_path / "d").shards[1]
    assert record.sha256 == hashlib.sha256((tmp_path / "d" / "train-00001.tar").read_bytes()).hexdigest()
    assert note == {"why": "test"}
    assert read_mark(tmp_path / "d", "train-00009") is None
    (tmp_path / "d" / "train-00001.json").write_text('{"rows": 3}')
    assert read_mark(tmp_path / "d", "train-00001") is None


def test_verify_passes_what_is_whole(tmp_path: Path) -> None:
    tokens = make_dataset(tmp_path / "d")
    seen: list[int] = []
    summary = verify(tmp_path / "d", seen.append)
    assert sum(seen) == summary.bytes == sum(p.stat().st_size for p in (tmp_path / "d").glob("*.tar"))
    share = np.bincount(tokens.ravel(), minlength=K) / tokens.size
    share = share[share > 0]
    assert summary.entropy == pytest.approx(-(share * np.log(share)).sum())
    assert (summary.rows, summary.shards, summary.labelled) == (2 * ROWS, 2, True)


def test_verify_finds_a_flipped_byte(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "train-00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00001\.tar: damaged shard \(its sha256"):
        verify(tmp_path / "d")


def test_truncated_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "train-00001.tar"
    whole = path.read_bytes()
    dataset = Dataset.open(tmp_path / "d")
    dataset.read(1, 3)
    path.write_bytes(whole[:3000])
    for act in (lambda: Dataset.open(tmp_path / "d"), lambda: verify(tmp_path / "d")):
        with pytest.raises(UserError, match=r"train-00001\.tar: damaged shard \(3000 bytes"):
            act()
    # One that is cut while in use is found by the read itself.
    with pytest.raises(UserError, match="it ends within row 10"):
        dataset.read(1, 10)


def test_a_shard_that_is_changed_while_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "d")
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    opened = Dataset.open(tmp_path / "d")
    dataset = pickle.loads(pickle.dumps(opened))
    dataset.read(1, 3)
    path = tmp_path / "d" / "train-00001.tar"
    with path.open("rb+") as file:  # in place, and with tokens that the palette has
        file.seek(dataset.manifest.shards[1].token_offset)
        file.write(bytes(4))
    os.utime(path, ns=(0, 0))
    now = 1.0
    for _ in range(2):
        with pytest.raises(UserError, match="it was changed"):  # found as well where the file is opened only now
            opened.read(1, 3)
    for read in (lambda: dataset.read(1, 3), lambda: dataset.read_many([(0, 1), (1, 3)]), lambda: dataset.tokens(1)):
        with pytest.raises(UserError, match=r"train-00001\.tar: damaged shard \(it was changed while it was in use\)"):
            read()


def test_a_shard_that_is_only_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "d")
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dataset = Dataset.open(tmp_path / "d")
    before = dataset.read(1, 3)
    path = tmp_path / "d" / "train-00001.tar"
    content = path.read_bytes()
    os.utime(path, ns=(0, 0))
    now = 1.0
    read = pickle.loads(pickle.dumps(dataset)).read(1, 3)  # opened only now
    assert np.array_equal(dataset.read(1, 3), before) and np.array_equal(read, before)
    # Restored from a copy, in place.
    path.write_bytes(content)
    now = 2.0
    assert np.array_equal(dataset.read(1, 3), before)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # looked at once
        now = 3.0
        assert np.array_equal(dataset.read(1, 3), before)


def test_missing_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    (tmp_path / "d" / "train-00000.tar").unlink()
    with pytest.raises(UserError, match=r"train-00000\.tar: missing shard"):
        Dataset.open(tmp_path / "d")


def test_token_beyond_the_palette(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", tokens=K)
    dataset = Dataset.open(tmp_path / "d")
    for act in (lambda: verify(tmp_path / "d"), lambda: dataset.read(1, 7), lambda: dataset.tokens(1)):
        with pytest.raises(UserError, match=f"token {K} .*beyond the palette of {K}"):
            act()
    with pytest.raises(UserError, match="at row 7"):
        dataset.tokens(1)


def test_duplicate_ids(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", ids="a/2.png")
    with pytest.raises(UserError, match=r"'a/2\.png' is there twice in view 0"):
        verify(tmp_path / "d")


def test_wrong_palette(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    Palette(np.zeros((K, 3), np.float32)).save(tmp_path / "d" / "palette.npy")
    with pytest.raises(UserError, match="not the palette that the manifest names"):
        Dataset.open(tmp_path / "d")


def test_label_outside_the_classes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", classes=["x", "y"])
    with pytest.raises(UserError, match="a label is outside the 2 classes"):
        verify(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda labels: labels - 1, "a label is outside the 3 classes"),
        (lambda labels: labels + 97, "a label is outside the 3 classes"),
        (lambda labels: labels.astype(np.float64), r"labels of float64 \[4\], expected \[4\]"),
        (lambda labels: np.full(len(labels), np.nan), "labels of float64"),
        (lambda labels: labels.astype("S4"), r"labels of \|S4"),
        (lambda labels: labels.astype(np.int32), "labels of int32"),
        (lambda labels: labels.astype(">i8"), "labels of >i8"),
        (lambda labels: labels.astype([("a", "<i8")]), "labels of "),
        (lambda labels: labels[:, None], r"labels of int64 \[4, 1\], expected \[4\]"),
        (lambda labels: labels[:-1], r"labels of int64 \[3\], expected \[4\]"),
        (lambda labels: labels[0], r"labels of int64 \[\], expected \[4\]"),
    ],
)
def test_labels_are_checked_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray], complaint: str
) -> None:
    def changed(array: np.ndarray) -> bytes:
        return to_npy(np.asarray(change(array)) if array.dtype == np.int64 else array)

    monkeypatch.setattr("igpt_ds.dataset.shards.to_npy", changed)
    make_dataset(tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    for act in (dataset.labels, lambda: shard_labels(dataset), lambda: verify(tmp_path / "d")):
        with pytest.raises(UserError, match=rf"train-00000\.tar: damaged shard \({complaint}"):
            act()


def test_rows_elsewhere_than_recorded(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    rewrite_record(tmp_path / "d", 0, token_offset=640 + 2 * N)
    with pytest.raises(UserError, match=r"train-00000\.tar: damaged shard"):
        verify(tmp_path / "d")


def test_a_tar_that_is_not_ours(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "train-00000.tar"
    junk = np.random.default_rng(0).bytes(path.stat().st_size)
    path.write_bytes(junk)
    rewrite_record(tmp_path / "d", 0, sha256=hashlib.sha256(junk).hexdigest())
    with pytest.raises(UserError, match="not a readable tar"):
        verify(tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "other"}, "not an igpt-ds-tokens manifest"),
        ({"version": 99}, "format version 99"),
        ({"rows": 5}, "it says 5 a view"),
        ({"rows": "22"}, "rows is '22'"),
        ({"rows": True}, "rows is True"),
        ({"surprise": 1}, "the keys should be"),
        ({"storage": "zip"}, "unknown storage"),
        ({"resolution": 5}, "do not fit a resolution of 5"),
        ({"shards": []}, "0"),
        ({"shards": 3}, "malformed"),
        ({"classes": "abc"}, "classes is 'abc'"),
        ({"classes": ["x", 1, "z"]}, "the name of a class is no text"),
        ({"rows_per_block": 1 << 62}, "blocks of 4611686018427387904 rows"),
        ({"rows_per_block": 0}, "blocks of 0 rows"),
        ({"resolution": 10**9, "sequence_length": 10**18}, "do not fit a resolution"),
        ({"resolution": 1 << 15, "sequence_length": 1 << 30}, "the record of shard 'train-00000' makes no sense"),
        ({"views": 10**9}, "in 1000000000 views of 2 shards"),
        ({"rejected": -1}, "22 rows"),
        ({"palette": {"k": K, "sha256": 5}}, "the palette's k or sha256 is missing"),
        ({"palette": {"k": 0, "sha256": "x"}}, "cannot hold tokens of 0 colours"),
        ({"palette": {"k": True, "sha256": "x"}}, "the palette's k or sha256 is missing"),
        ({"seed": math.nan}, "NaN is no number"),
        ({"seed": 10**30}, "is no number of 64 bits"),
    ],
)
def test_malformed_manifest(tmp_path: Path, changes: dict, complaint: str) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=complaint) as caught:
        Dataset.open(tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert "igpt-data shards again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rows": 12.0}, "rows is 12.0"),
        ({"rows": True}, "rows is True"),
        ({"name": None}, "name is None"),
        ({"more": 1}, "the keys should be name, rows, bytes, sha256, view, token_offset, block_bytes"),
        ({"name": "a/b"}, "the record of shard 'a/b' makes no sense"),
        ({"name": "train-00000"}, "a shard is listed twice"),
        ({"rows": 0}, "the record of shard 'train-00001' makes no sense"),
        ({"rows": 10}, "its shards hold .* rows by view, but it says 22 a view"),
        ({"rows": 1 << 62}, "the record of shard 'train-00001' makes no sense"),
        ({"bytes": 1}, "the record of shard 'train-00001' makes no sense"),
        ({"token_offset": 0}, "the record of shard 'train-00001' makes no sense"),
        ({"token_offset": -(1 << 62)}, "the record of shard 'train-00001' makes no sense"),
        ({"block_bytes": 1 << 62}, "the record of shard 'train-00001' makes no sense"),
        ({"bytes": (1 << 64) - 1}, "malformed"),  # beyond what NumPy counts with
        ({"view": -1}, "shard 'train-00001' belongs to view -1 of 1"),
        ({"view": 1}, "shard 'train-00001' belongs to view 1 of 1"),
    ],
    ids=str,
)
def test_malformed_record_among_others(tmp_path: Path, changes: dict, complaint: str) -> None:
    make_dataset(tmp_path / "d")
    rewrite_record(tmp_path / "d", 1, **changes)
    with pytest.raises(UserError, match=complaint) as caught:
        Dataset.open(tmp_path / "d")
    assert "\n" not in str(caught.value) and "manifest.json: malformed" in str(caught.value)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    before = (tmp_path / "d" / "manifest.json").read_bytes()
    manifest = Manifest.load(tmp_path / "d")
    assert manifest.shards == [ShardRecord(**record) for record in json.loads(before)["shards"]]
    manifest.save(tmp_path / "d")
    assert (tmp_path / "d" / "manifest.json").read_bytes() == before


def test_another_thread_reads_through_its_own_files(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    dataset.read(0, 0)
    own = dataset.own()
    assert own.manifest is dataset.manifest and not own._files
    assert (own.read(1, 0) == dataset.read(1, 0)).all() and (own.tokens(0) == dataset.tokens(0)).all()
    assert set(own._files.values()).isdisjoint(dataset._files.values())
    # It knows when the files were written, too.
    third = dataset.own()
    with (tmp_path / "d" / "train-00001.tar").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(UserError, match="it was changed while it was in use"):
        third.read(1, 0)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 50_000, '{"rows": ' + "9" * 5000 + "}", "{}\x00", "3"])
def test_a_manifest_that_would_surprise_its_reader(tmp_path: Path, text: str) -> None:
    make_dataset(tmp_path / "d")
    for name in ("manifest.json", "train-00000.json"):
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: malformed"):
        Dataset.open(tmp_path / "d")
    assert read_mark(tmp_path / "d", "train-00000") is None


@pytest.mark.parametrize("name", ["manifest.json", "palette.npy", "train-00000.tar"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    (tmp_path / "d" / name).unlink()
    os.mkfifo(tmp_path / "d" / name)
    with pytest.raises(UserError, match=name):
        Dataset.open(tmp_path / "d")
    if name == "train-00000.tar":
        for act in (dataset.labels, lambda: dataset.read(0, 0)):
            with pytest.raises(UserError, match=name):
                act()


def header(text: str, version: int = 1) -> bytes:
    data = text.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(data).to_bytes(2 * version, "little") + data


@pytest.mark.parametrize(
    "data",
    [
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % ("9" * 400)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, %s)}" % ("9" * 400)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (%s1,)}" % ("-" * 9000)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (%s1,)}" % ("(" * 4000)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}") + bytes(12),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + bytes(8),
        header("{'descr': '|V0', 'fortran_order': False, 'shape': (9,)}"),
        header("{'descr': '|S2147483647', 'fortran_order': False, 'shape': (1,)}"),
        header("{'descr': ('<f4', (1000000000,)), 'fortran_order': False, 'shape': (1,)}"),
        header("{'descr': 5, 'fortran_order': False, 'shape': (1,)}"),
        header("{", version=2),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"",
    ],
    ids=range(15),
)
def test_an_npy_whose_header_lies_is_refused_without_the_memory(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_npy(data, fortran=True)
    (tmp_path / "palette.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"not a readable \.npy palette|expected float32"):
        Palette.load(tmp_path / "palette.npy")


def test_an_npy_of_other_programs_is_read(tmp_path: Path) -> None:
    colours = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "p.npy", np.asfortranarray(colours))
    assert np.array_equal(Palette.load(tmp_path / "p.npy").colours, colours)
    with (tmp_path / "p.npy").open("wb") as file:
        np.lib.format.write_array(file, colours, version=(2, 0))
    assert np.array_equal(read_npy(tmp_path / "p.npy", 4096), colours)
    with pytest.raises(ValueError, match="more than 50 bytes"):
        read_npy(tmp_path / "p.npy", 50)


@pytest.mark.parametrize("figure", ["rows", "token_offset", "block_bytes"])
def test_figures_beyond_the_shard(tmp_path: Path, figure: str) -> None:
    make_dataset(tmp_path / "d")
    rewrite_record(tmp_path / "d", 0, **{figure: 1 << 62})
    with pytest.raises(UserError, match=r"the record of shard 'train-00000' makes no sense|rows by view"):
        Dataset.open(tmp_path / "d")


def test_a_failing_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    bad = dataset.manifest.shards[1].token_offset + 2 * 2 * N
    pread = os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    dataset.read(1, 0)
    monkeypatch.setattr(os, "pread", failing)
    for act in (lambda: dataset.read_many([(1, 0), (1, 2), (1, 3)]), lambda: dataset.span(1, 2, 3)):
        with pytest.raises(UserError, match=r"train-00001\.tar: .*row 2 cannot be read: Input/output error"):
            act()


@pytest.mark.parametrize("storage", ["uint16", "packed9"])
def test_spans_and_batches_are_pieces_of_the_whole(tmp_path: Path, storage: str) -> None:
    tokens = make_dataset(tmp_path / "d", views=2, storage=storage).reshape(4, ROWS, N)
    dataset = Dataset.open(tmp_path / "d")
    for first in range(ROWS + 1):
        for stop in range(first, ROWS + 1):
            assert np.array_equal(dataset.span(2, first, stop), tokens[2, first:stop])
    for first, stop in ((-1, 2), (3, 2), (0, ROWS + 1)):
        with pytest.raises(IndexError):
            dataset.span(0, first, stop)
    pairs = np.random.default_rng(1).integers(0, [4, ROWS], (50, 2))
    found = dataset.read_many(pairs)
    assert found.dtype == np.uint16
    assert np.array_equal(found, tokens[pairs[:, 0], pairs[:, 1]])
    assert dataset.read_many([]).shape == (0, N)
    for pair in ((0, -1), (0, ROWS), (4, 0)):
        with pytest.raises(IndexError):
            dataset.read_many([(0, 0), pair])


@pytest.mark.parametrize("name", ["../../etc/passwd", "a.b", ""])
def test_shard_names_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "d")
    rewrite_record(tmp_path / "d", 0, name=name)
    with pytest.raises(UserError, match="makes no sense"):
        Dataset.open(tmp_path / "d")


def test_half_built_dataset(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    for path in (tmp_path / "d", tmp_path / "nothing"):
        with pytest.raises(UserError, match="half-built or not a dataset: run igpt-data shards again"):
            Dataset.open(path)


def test_images_are_the_first_rows_of_view_0_and_no_other_shard_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_dataset(tmp_path / "d", views=2)
    dataset, every = Dataset.open(tmp_path / "d"), tokens[0].reshape(-1, N)
    assert np.array_equal(dataset.images(), every)
    assert np.array_equal(dataset.images(ROWS + 3), every[: ROWS + 3])
    assert dataset.images(0).shape == (0, N)
    read: list[int] = []
    whole_shard = Dataset.tokens

    def noted(self: Dataset, shard: int) -> np.ndarray:
        read.append(shard)
        return whole_shard(self, shard)

    monkeypatch.setattr(Dataset, "tokens", noted)
    assert np.array_equal(dataset.images(ROWS), every[:ROWS])
    assert read == [0]
