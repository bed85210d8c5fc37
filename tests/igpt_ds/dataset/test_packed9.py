"""packed9: nine bits a token, the same through every door of the dataset, refused where it cannot hold a palette."""

import hashlib
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from data_prep.check.verify import verify
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.shards import Dataset, write_shard
from igpt_ds.dataset.storage import STORAGES, storage_for
from igpt_ds.errors import UserError
from igpt_ds.loading.loader import evaluation_batches, source_rows, train_batches
from igpt_ds.loading.order import Order
from tests.igpt_ds.dataset.test_shards import ROWS, make_dataset, rewrite_record

PACKED = STORAGES["packed9"]


def reference(row: list[int]) -> bytes:
    """One row packed bit by bit, as the format says."""
    high = bytearray(-(-len(row) // 8))
    for i, token in enumerate(row):
        high[i // 8] |= (token >> 8) << i % 8
    return bytes(token & 255 for token in row) + bytes(high)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 25, 1024])
def test_rows_are_packed_as_the_format_says(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 512, (5, n)).astype(np.uint16)
    tokens[0], tokens[1] = 511, 0
    stored = PACKED.pack(tokens)
    assert (stored.dtype, stored.shape) == (np.uint8, (5, PACKED.width(n)))
    assert [row.tobytes() for row in stored] == [reference(row) for row in tokens.tolist()]
    again = PACKED.unpack(stored, n)
    assert again.dtype == np.uint16
    assert np.array_equal(again, tokens)


def test_a_row_by_hand() -> None:
    tokens = np.array([[0x101, 2, 0x1FF, 0, 0, 0, 0, 0x180, 0x100]], np.uint16)
    assert PACKED.pack(tokens).tobytes().hex() == "0102ff0000000080008501"


@pytest.fixture(params=[4, 5], ids=["16 tokens", "25 tokens"])
def both(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Dataset, Dataset, np.ndarray]:
    """The same rows as uint16 and as packed9, and the tokens [views, 2, rows, n]."""
    for storage in STORAGES:
        tokens = make_dataset(tmp_path / storage, views=2, side=request.param, k=512, storage=storage)
    assert tokens.max() > 255
    return Dataset.open(tmp_path / "uint16"), Dataset.open(tmp_path / "packed9"), tokens


def test_one_dataset_through_every_door(both: tuple[Dataset, Dataset, np.ndarray]) -> None:
    plain, packed, tokens = both
    n = plain.sequence_length
    assert packed.manifest.storage == "packed9"
    for shard in range(4):
        assert np.array_equal(packed.tokens(shard), tokens[shard // 2, shard % 2])
        assert np.array_equal(packed.span(shard, 3, 9), tokens[shard // 2, shard % 2, 3:9])
        for row in range(ROWS):
            assert np.array_equal(packed.read(shard, row), tokens[shard // 2, shard % 2, row])
    pairs = [(3, 10), (0, 0), (2, 4)]
    assert np.array_equal(pickle.loads(pickle.dumps(packed)).read_many(pairs), plain.read_many(pairs))
    assert packed.read_many(pairs).dtype == np.uint16
    assert np.array_equal(packed.images(13), tokens[0].reshape(-1, n)[:13])
    assert np.array_equal(packed.labels(), plain.labels())
    assert np.array_equal(packed.ids(), plain.ids())
    summary, expected = verify(packed.path), verify(plain.path)
    assert (summary.rows, summary.entropy, summary.colours_used) == (
        expected.rows,
        expected.entropy,
        expected.colours_used,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches(both: tuple[Dataset, Dataset, np.ndarray], workers: int) -> None:
    found = []
    for dataset in both[:2]:
        # The digest of other bytes is another source: the order's key is not, so the rows come in the same order.
        order = Order(3, [source_rows(dataset)])
        stream = train_batches([dataset], order, batch=8, micro_batch=4, rank=0, world=1, workers=workers)
        found.append(torch.cat([batch["tokens"] for batch in itertools.islice(stream, 12)]))
        stream.close()
    assert found[0].dtype == torch.uint16
    assert torch.equal(*found)
    batches = [torch.cat([b["tokens"] for b in evaluation_batches(d, 4, 0, 1)]) for d in both[:2]]
    assert torch.equal(*batches)


def test_nine_sixteenths_of_the_bytes_and_always_the_same(both: tuple[Dataset, Dataset, np.ndarray]) -> None:
    plain, packed, tokens = both
    n, shard = plain.sequence_length, packed.manifest.shards[0]
    members = list(wds.WebDataset(str(packed.path / "train-00000.tar"), shardshuffle=False).decode())
    assert [member["tokens9.npy"].shape for member in members] == [(r, n + -(-n // 8)) for r in (4, 4, 3)]
    assert "tokens.npy" not in members[0]
    assert PACKED.width(1024) * 16 == 2 * 1024 * 9
    again = write_shard(
        packed.path / "again",
        "train-00000",
        tokens[0, 0],
        [f"a/{i}.png" for i in range(ROWS)],
        np.arange(ROWS) % 3,
        rows_per_block=4,
        view=0,
        storage="packed9",
    )
    # The ids of the dataset's second shard are no longer than those of its first: the whole tar is the same.
    assert again.rows == shard.rows
    np.testing.assert_array_equal(
        np.fromfile(packed.path / "again" / "train-00000.tar", np.uint8),
        np.fromfile(packed.path / "train-00000.tar", np.uint8),
    )


def test_a_palette_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--storage packed9: holds 512 colours at most, but the palette has 513: "):
        storage_for("packed9", 513)
    assert storage_for("packed9", 512) is PACKED
    assert storage_for("uint16", 1 << 16).member == "tokens"
    with pytest.raises(UserError, match="no such form: choose from uint16, packed9"):
        storage_for("zip", 2)
    tokens = np.full((3, 4), 512, np.uint16)
    with pytest.raises(UserError, match=r"s\.tar: token 512 does not fit into packed9, which holds 512 colours"):
        write_shard(tmp_path, "s", tokens, ["a", "b", "c"], None, rows_per_block=4, view=0, storage="packed9")
    assert not list(tmp_path.iterdir())


def test_a_manifest_of_packed9_with_more_colours(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", k=600)
    path = tmp_path / "d" / "manifest.json"
    path.write_text(path.read_text().replace('"uint16"', '"packed9"'))
    with pytest.raises(UserError, match="packed9 cannot hold tokens of 600 colours"):
        Manifest.load(tmp_path / "d")


def test_a_manifest_that_names_the_other_form(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    path.write_text(path.read_text().replace('"uint16"', '"packed9"'))
    with pytest.raises(UserError, match=r"damaged shard \(a block of ids, labels, tokens where ids, labels, tokens9"):
        verify(tmp_path / "d")


def test_a_token_beyond_the_palette_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", k=300, storage="packed9", tokens=300)
    dataset = Dataset.open(tmp_path / "d")
    for act in (lambda: dataset.read_many([(0, 0), (1, 7)]), lambda: dataset.tokens(1)):
        with pytest.raises(UserError, match=r"train-00001\.tar: .*token 300 at row 7 is beyond the palette of 300"):
            act()
    with pytest.raises(UserError, match="token 300 is beyond the palette of 300"):
        verify(tmp_path / "d")


def test_bits_that_fill_up_a_row_are_zeros(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", side=5, k=512, storage="packed9")
    path = tmp_path / "d" / "train-00000.tar"
    data = bytearray(path.read_bytes())
    last = Dataset.open(tmp_path / "d").manifest.shards[0].token_offset + PACKED.width(25) - 1
    data[last] |= 0x80
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite_record(tmp_path / "d", 0, sha256=digest)
    mark = path.with_suffix(".json")
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "sha256": digest}))
    with pytest.raises(UserError, match="the bits that fill up its rows are not zeros"):
        verify(tmp_path / "d")
