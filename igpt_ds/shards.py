"""The dataset directory: token shards with their manifest, the one contract between data_prep and training.

    DATA/train/manifest.json      what is in here; written last: the commit mark of the whole set
               palette.npy        the colours that the tokens index
               train-00000.tar    a shard, readable by stock webdataset
               train-00000.json   its record; written after the tar: the commit mark of the shard

A shard holds blocks of `rows_per_block` rows. Block i of shard NAME is the WebDataset sample `NAME-iiiiii`:

    NAME-iiiiii.tokens.npy        uint16 [rows, n], one image a row, raster order
    NAME-iiiiii.ids.npy           bytes [rows], fixed width: the images' ids, UTF-8, filled up with NUL
    NAME-iiiiii.labels.npy        int64 [rows], where the images have labels

All blocks but the last are of one size, so that one `pread` finds a row without reading a tar header:

    offset(row) = token_offset + (row // rows_per_block) * block_bytes + (row % rows_per_block) * 2 n

Tar headers carry no time and no owner: the same rows give the same bytes. A dataset of K views (differently
cropped copies) has K times as many shards; each belongs to one view, and every view holds the same images.

NumPy and the standard library only: shard-building workers import this file and must not load torch.
"""

import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.atomic import publish_file, publish_text, sha256_file
from igpt_ds.errors import UserError
from igpt_ds.manifest import SHARD_NAME, Manifest, ShardRecord, typed
from igpt_ds.palette import Palette

KINDS = ("tokens", "ids", "labels")  # the members of a block, in their order
_OPEN_FILES = 64


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _padded(size: int) -> int:
    """Bytes that a tar member of `size` bytes takes, its header included."""
    return tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_shard(
    directory: Path,
    name: str,
    tokens: np.ndarray,
    ids: Sequence[str] | np.ndarray,
    labels: np.ndarray | None,
    *,
    rows_per_block: int,
    view: int,
    note: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Publish DIRECTORY/NAME.tar and then its commit mark NAME.json.

    Args:
        tokens: uint16 [rows, n].
        ids: `rows` strings, or a bytes array 'S<w>' whose width is kept.
        labels: integers [rows] or None.
        note: JSON that the builder wants back from `read_mark`; kept in the mark only.

    Raises:
        UserError: the disk is full, and the like.
    """
    rows = len(tokens)
    if tokens.ndim != 2 or tokens.dtype != np.uint16 or rows < 1 or len(ids) != rows or not SHARD_NAME.fullmatch(name):
        raise ValueError(f"{name}: {tokens.dtype} {list(tokens.shape)} tokens with {len(ids)} ids")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{name}: {rows} rows with {len(labels)} labels")
    if not isinstance(ids, np.ndarray):
        ids = np.array([i.encode("utf-8", "surrogateescape") for i in ids], dtype=np.bytes_)
    path = Path(directory) / f"{name}.tar"
    token_offset, block_bytes = 0, 0
    with publish_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for block, start in enumerate(range(0, rows, rows_per_block)):
            here = slice(start, start + rows_per_block)
            members = {
                "tokens": _npy(np.ascontiguousarray(tokens[here], dtype="<u2")),
                "ids": _npy(ids[here]),
            }
            if labels is not None:
                members["labels"] = _npy(np.ascontiguousarray(labels[here], dtype="<i8"))
            header = len(members["tokens"]) - tokens[here].size * 2
            # NumPy leaves room for the row count in the header; a last block that moved would be misread.
            assert token_offset in (0, tarfile.BLOCKSIZE + header)
            token_offset = tarfile.BLOCKSIZE + header
            block_bytes = block_bytes or sum(_padded(len(data)) for data in members.values())
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{name}-{block:06d}.{kind}.npy")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    # Hashed as read back: what is on the disk, not what was meant to be.
    record = ShardRecord(name, rows, path.stat().st_size, sha256_file(path), view, token_offset, block_bytes)
    mark = {**asdict(record), "note": dict(note or {})}
    publish_text(path.with_suffix(".json"), json.dumps(mark, indent=1) + "\n")
    return record


def read_mark(directory: Path, name: str) -> tuple[ShardRecord, dict[str, Any]] | None:
    """A shard's commit mark, as (record, note); None when it is missing or malformed: not committed."""
    try:
        mark = json.loads((Path(directory) / f"{name}.json").read_text(encoding="utf-8"))
        note = mark.pop("note")
        return typed(ShardRecord, mark), note
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Dataset:
    """Random access to a dataset directory. Picklable: open files stay with the process that opened them.

    Attributes:
        path: the directory.
        manifest: its `Manifest`.
        palette: its `Palette`.
        rows: images, i.e. rows of one view.
        sequence_length: tokens a row, n.
    """

    def __init__(self, path: Path, manifest: Manifest, palette: Palette) -> None:
        self.path, self.manifest, self.palette = Path(path), manifest, palette
        self.rows, self.sequence_length = manifest.rows, manifest.sequence_length
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, directory: Path) -> "Dataset":
        """Open a dataset and check that all of it is there (sizes; `verify` reads every byte).

        Raises:
            UserError: no manifest, another palette than the manifest's, a shard missing or of another size.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        palette = Palette.load(directory / "palette.npy")
        if palette.sha256 != manifest.palette["sha256"] or palette.k != manifest.palette["k"]:
            raise UserError(
                f"{directory / 'palette.npy'}: not the palette that the manifest names "
                f"({palette.sha256[:12]}, not {manifest.palette['sha256'][:12]}): "
                "restore it or rebuild the dataset"
            )
        for shard in manifest.shards:
            path = directory / f"{shard.name}.tar"
            try:
                size = path.stat().st_size
            except OSError:
                raise _missing(path) from None
            if size != shard.bytes:
                raise damaged(path, f"{size} bytes, but the manifest says {shard.bytes}")
        return cls(directory, manifest, palette)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, shard: int, row: int) -> np.ndarray:
        """Tokens of one row of one shard: uint16 [n].

        Raises:
            UserError: the shard is short there, or a token lies beyond the palette.
        """
        record = self.manifest.shards[shard]
        if not 0 <= row < record.rows:
            raise IndexError(f"row {row} of shard {record.name} with {record.rows} rows")
        block, within = divmod(row, self.manifest.rows_per_block)
        size = 2 * self.sequence_length
        return self._tokens_at(shard, record.token_offset + block * record.block_bytes + within * size, 1, row)[0]

    def read_many(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Tokens of several (shard, row) pairs: uint16 [len(pairs), n]."""
        tokens = np.empty((len(pairs), self.sequence_length), np.uint16)
        for i, (shard, row) in enumerate(pairs):
            tokens[i] = self.read(shard, row)
        return tokens

    def tokens(self, shard: int) -> np.ndarray:
        """Tokens of a whole shard: uint16 [rows, n]."""
        record = self.manifest.shards[shard]
        step = self.manifest.rows_per_block
        tokens = np.empty((record.rows, self.sequence_length), np.uint16)
        for block, start in enumerate(range(0, record.rows, step)):
            count = min(step, record.rows - start)
            offset = record.token_offset + block * record.block_bytes
            tokens[start : start + count] = self._tokens_at(shard, offset, count, start)
        return tokens

    def images(self, count: int | None = None) -> np.ndarray:
        """Tokens of the first `count` images, or all, each in view 0: uint16 [count, n]; reads no shard beyond them.

        Raises:
            UserError: a shard is damaged.
        """
        left = self.rows if count is None else min(count, self.rows)
        parts: list[np.ndarray] = [np.empty((0, self.sequence_length), np.uint16)]
        for number, shard in enumerate(self.manifest.shards):
            if shard.view == 0 and left > 0:
                parts.append(self.tokens(number)[:left])
                left -= len(parts[-1])
        return np.concatenate(parts)

    def labels(self) -> np.ndarray:
        """Labels of view 0 in shard order: int64 [rows].

        Raises:
            UserError: the dataset has no labels.
        """
        return np.concatenate(list(self._members("labels")))

    def ids(self) -> np.ndarray:
        """Image ids (UTF-8) of view 0 in shard order: bytes [rows]."""
        return np.concatenate(list(self._members("ids")))

    def _members(self, kind: str) -> Iterator[np.ndarray]:
        for record in self.manifest.shards:
            if record.view == 0:
                path = self.path / f"{record.name}.tar"
                for block in blocks(path, (kind,)):
                    if kind not in block:
                        raise UserError(f"{path}: no {kind}: build the shards from a labelled source")
                    yield block[kind]

    def _path(self, shard: int) -> Path:
        return self.path / f"{self.manifest.shards[shard].name}.tar"

    def _tokens_at(self, shard: int, offset: int, rows: int, row: int) -> np.ndarray:
        wanted = 2 * rows * self.sequence_length
        data = os.pread(self._descriptor(shard), wanted, offset)
        if len(data) != wanted:
            raise damaged(self._path(shard), f"it ends within row {row}")
        tokens = np.frombuffer(data, "<u2").reshape(rows, self.sequence_length)
        if (largest := int(tokens.max())) >= self.palette.k:
            row += int(tokens.max(1).argmax())
            what = f"token {largest} at row {row} is beyond the palette of {self.palette.k}"
            raise damaged(self._path(shard), what)
        return tokens

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            try:
                descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise _missing(self._path(shard)) from None
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        return descriptor


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: missing shard: restore it or run igpt-data shards again")


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged shard ({what}): delete it and run igpt-data shards again")


def blocks(path: Path, kinds: Collection[str] = KINDS) -> Iterator[dict[str, np.ndarray]]:
    """A shard's blocks, read as a plain tar: arrays by kind, of those `kinds` that are there.

    Raises:
        UserError: it is no tar, or its members are not ours.
    """
    stem = path.name.removesuffix(".tar")
    current: dict[str, np.ndarray] | None = None
    count = -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, kind, *rest = member.name.split(".")
                if kind == KINDS[0]:
                    if current is not None:
                        yield current
                    current, count = {}, count + 1
                file = tar.extractfile(member)
                if rest != ["npy"] or kind not in KINDS or file is None or current is None:
                    raise damaged(path, f"unexpected member {member.name}")
                if key != f"{stem}-{count:06d}" or kind in current:
                    raise damaged(path, f"unexpected member {member.name}")
                if kind in kinds:
                    # From bytes: NumPy reads the tar's own file object in small pieces.
                    current[kind] = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise damaged(path, "not a readable tar of arrays") from error
    if current is not None:
        yield current
