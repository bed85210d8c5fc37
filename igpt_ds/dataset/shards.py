"""The dataset directory: token shards with their manifest, the one contract between data_prep and training.

    DATA/train/manifest.json      what is in here; written last: the commit mark of the whole set
               palette.npy        the colours that the tokens index
               train-00000.tar    a shard, readable by stock webdataset
               train-00000.json   its record; written after the tar: the commit mark of the shard

A shard holds blocks of `rows_per_block` rows. Block i of shard NAME is the WebDataset sample `NAME-iiiiii`:

    NAME-iiiiii.tokens.npy        uint16 [rows, n], one image a row, raster order; or .tokens9.npy, see storage.py
    NAME-iiiiii.ids.npy           bytes [rows], fixed width: the images' ids, UTF-8, filled up with NUL
    NAME-iiiiii.labels.npy        int64 [rows], where the images have labels

All blocks but the last are of one size, so that one `pread` finds a row without reading a tar header:

    offset(row) = token_offset + (row // rows_per_block) * block_bytes + (row % rows_per_block) * row_bytes

where row_bytes is 2 n, or n + ceil(n / 8) with packed9.

Tar headers carry no time and no owner: the same rows give the same bytes. A dataset of K views (differently
cropped copies) has K times as many shards; each belongs to one view, and every view holds the same images.

NumPy and the standard library only: shard-building workers import this file and must not load torch.
"""

import hashlib
import io
import json
import math
import os
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.atomic import publish_file, publish_text, sha256_file
from igpt_ds.dataset.blocks import blocks, damaged
from igpt_ds.dataset.manifest import SHARD_NAME, Manifest, ShardRecord, typed
from igpt_ds.dataset.npy import to_npy
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.storage import STORAGES
from igpt_ds.errors import UserError
from igpt_ds.reading import read_json

_OPEN_FILES = 64
_LOOK_EVERY = 1.0  # seconds


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
    storage: str = "uint16",
    note: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Publish DIRECTORY/NAME.tar and then its commit mark NAME.json.

    Args:
        tokens: uint16 [rows, n].
        ids: `rows` strings, or a bytes array 'S<w>' whose width is kept.
        labels: integers [rows] or None.
        storage: a name of `storage.STORAGES`.
        note: JSON that the builder wants back from `read_mark`; kept in the mark only.
    """
    rows = len(tokens)
    if tokens.ndim != 2 or tokens.dtype != np.uint16 or rows < 1 or len(ids) != rows or not SHARD_NAME.fullmatch(name):
        raise ValueError(f"{name}: {tokens.dtype} {list(tokens.shape)} tokens with {len(ids)} ids")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{name}: {rows} rows with {len(labels)} labels")
    if not isinstance(ids, np.ndarray):
        ids = np.array([i.encode("utf-8", "surrogateescape") for i in ids], dtype=np.bytes_)
    path, form = Path(directory) / f"{name}.tar", STORAGES[storage]
    if (largest := int(tokens.max())) >= form.colours:
        raise UserError(
            f"{path}: token {largest} does not fit into {storage}, which holds {form.colours} colours: "
            "leave out --storage, or fit a smaller palette"
        )
    token_offset, block_bytes = 0, 0
    with publish_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for block, start in enumerate(range(0, rows, rows_per_block)):
            here = slice(start, start + rows_per_block)
            stored = form.pack(tokens[here])
            members = {form.member: to_npy(stored), "ids": to_npy(ids[here])}
            if labels is not None:
                members["labels"] = to_npy(np.ascontiguousarray(labels[here], dtype="<i8"))
            header = len(members[form.member]) - stored.nbytes
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
    mark = {**record._asdict(), "note": dict(note or {})}
    publish_text(path.with_suffix(".json"), json.dumps(mark, indent=1) + "\n")
    return record


def read_mark(directory: Path, name: str) -> tuple[ShardRecord, dict[str, Any]] | None:
    """A shard's commit mark, as (record, note); None when it is missing or malformed: not committed."""
    try:
        mark = read_json(Path(directory) / f"{name}.json")
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

    def __init__(self, path: Path, manifest: Manifest, palette: Palette, times: Sequence[int] | None = None) -> None:
        """Callers want `open`. `times`: when each shard was last written, nanoseconds; None looks for no change."""
        self.path, self.manifest, self.palette = Path(path), manifest, palette
        self.rows, self.sequence_length = manifest.rows, manifest.sequence_length
        self._storage = STORAGES[manifest.storage]
        self._dtype, self._width = np.dtype(self._storage.dtype), self._storage.width(self.sequence_length)
        self._row_bytes = self._dtype.itemsize * self._width
        # offset(row) = first + row * row_bytes + row // rows_per_block * (what of a block is not token rows).
        rest = manifest.rows_per_block * self._row_bytes
        self._rows, _, _, self._first, block = manifest.table.T.copy()
        self._rest = block - rest
        self._files = _Files(self.path, manifest.shards, times)

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
        times = []
        folder = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for shard in manifest.shards:
                try:
                    found = os.stat(f"{shard.name}.tar", dir_fd=folder)
                except OSError:
                    raise _missing(directory / f"{shard.name}.tar") from None
                if found.st_size != shard.bytes:
                    what = f"{found.st_size} bytes, but the manifest says {shard.bytes}"
                    raise damaged(directory / f"{shard.name}.tar", what)
                times.append(found.st_mtime_ns)
        finally:
            os.close(folder)
        return cls(directory, manifest, palette, times)

    def own(self) -> "Dataset":
        """The same through open files of its own, for another thread."""
        return Dataset(self.path, self.manifest, self.palette, self._files.times)

    def read(self, shard: int, row: int) -> np.ndarray:
        """Tokens of one row of one shard: uint16 [n]; see `read_many`."""
        return self.read_many([(shard, row)])[0]

    def read_many(self, pairs: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
        """Tokens of several (shard, row) pairs: uint16 [len(pairs), n].

        Raises:
            UserError: a shard is missing, short there or changed since `open`, or a token lies beyond the palette.
            IndexError: there is no such shard or row.
        """
        pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
        return next(self.read_parts(pairs, [len(pairs)]))

    def read_parts(self, pairs: np.ndarray, sizes: Iterable[int]) -> Iterator[np.ndarray]:
        """Tokens of (shard, row) pairs, int64 [rows, 2], part by part: uint16 [size, n] for each size.

        Where the rows lie is found for all parts at once: a part of 64 rows alone spends a tenth of its time on it.
        Nothing is read before it is asked for. Raises as `read_many`.
        """
        shards, rows = pairs.T
        # As unsigned numbers, so that one comparison finds negative rows, too.
        if (rows.view(np.uint64) >= self._rows.view(np.uint64)[shards]).any():
            raise IndexError(f"{self.path}: a row beyond its shard")
        numbers, offsets = shards.tolist(), self._offsets(shards, rows).tolist()
        first = 0
        for size in sizes:
            part = slice(first, first + size)
            yield self._read(numbers[part], offsets[part], rows[part])
            first += size

    def tokens(self, shard: int) -> np.ndarray:
        """Tokens of a whole shard: uint16 [rows, n]."""
        return self.span(shard, 0, self.manifest.shards[shard].rows)

    def span(self, shard: int, first: int, stop: int) -> np.ndarray:
        """Tokens of the rows first to stop - 1 of a shard: uint16 [stop - first, n]; raises as `read_many`."""
        if not 0 <= first <= stop <= self._rows[shard]:
            raise IndexError(f"rows {first} to {stop} of {self._path(shard)} with {self._rows[shard]}")
        step = self.manifest.rows_per_block
        tokens = np.empty((stop - first, self.sequence_length), np.uint16)
        row = first
        while row < stop:
            end = min(stop, row - row % step + step)
            size = (end - row) * self._row_bytes
            try:
                data = os.pread(self._files[shard], size, int(self._offsets(shard, row)))
            except OSError as error:
                raise _unreadable(self._path(shard), row, error) from error
            if len(data) != size:
                raise damaged(self._path(shard), f"it ends within row {row + len(data) // self._row_bytes}")
            self._files.require_unchanged()
            rows = np.arange(row, end)
            tokens[row - first : end - first] = self._tokens(data, [shard] * len(rows), rows)
            row = end
        return tokens

    def images(self, count: int | None = None) -> np.ndarray:
        """Tokens of the first `count` images, or all, each in view 0: uint16 [count, n]; reads no shard beyond them."""
        left = self.rows if count is None else min(count, self.rows)
        parts: list[np.ndarray] = [np.empty((0, self.sequence_length), np.uint16)]
        for number, shard in enumerate(self.manifest.shards):
            if shard.view == 0 and left > 0:
                parts.append(self.tokens(number)[:left])
                left -= len(parts[-1])
        return np.concatenate(parts)

    def labels(self) -> np.ndarray:
        """Labels of view 0 in shard order: int64 [rows]; raises as `shard_labels`."""
        return np.concatenate([self.shard_labels(k) for k, shard in enumerate(self.manifest.shards) if shard.view == 0])

    def shard_labels(self, shard: int) -> np.ndarray:
        """Labels of one shard: int64 [rows], from 0 to classes - 1.

        Raises:
            UserError: there are none, or others than that.
        """
        labels, classes = self._members("labels", shard), len(self.manifest.classes or ())
        if ((labels < 0) | (labels >= classes)).any():
            raise damaged(self._path(shard), f"a label is outside the {classes} classes")
        return labels

    def ids(self) -> np.ndarray:
        """Image ids (UTF-8) of view 0 in shard order: bytes [rows]."""
        shards = [k for k, shard in enumerate(self.manifest.shards) if shard.view == 0]
        return np.concatenate([self._members("ids", shard) for shard in shards])

    def _members(self, kind: str, shard: int) -> np.ndarray:
        """The labels or ids of a shard's rows, one each and of their type."""
        path, left, parts = self._path(shard), int(self._rows[shard]), []
        for block in blocks(path, (kind,)):
            if kind not in block:
                raise UserError(f"{path}: no {kind}: build the shards from a labelled source")
            part, rows = block[kind], min(left, self.manifest.rows_per_block)
            typed = part.dtype.kind == "S" if kind == "ids" else part.dtype.str == "<i8"
            if part.shape != (rows,) or not typed:
                raise damaged(path, f"{kind} of {part.dtype} {list(part.shape)}, expected {[rows]}")
            parts.append(part)
            left -= rows
        if left:
            raise damaged(path, f"{left} rows are missing")
        return np.concatenate(parts)

    def _path(self, shard: int) -> Path:
        return self.path / f"{self.manifest.shards[shard].name}.tar"

    def _offsets(self, shards: Any, rows: Any) -> Any:
        blocks = rows // self.manifest.rows_per_block
        return self._first[shards] + rows * self._row_bytes + blocks * self._rest[shards]

    def _read(self, shards: list[int], offsets: list[int], rows: np.ndarray) -> np.ndarray:
        # Pieces joined are faster than pread into one buffer, and than a search for neighbours, which are rare.
        pieces: list[bytes] = []
        files, size = self._files, self._row_bytes
        try:
            # No loop in Python, which would take a tenth of the time. What an error leaves in `pieces` tells its row.
            pieces.extend(map(os.pread, map(files.__getitem__, shards), repeat(size), offsets))
        except OSError as error:
            i = len(pieces)
            raise _unreadable(self._path(shards[i]), int(rows[i]), error) from error
        data = bytearray().join(pieces)
        if len(data) != size * len(pieces):
            i = next(i for i, piece in enumerate(pieces) if len(piece) != size)
            raise damaged(self._path(shards[i]), f"it ends within row {rows[i]}")
        files.require_unchanged()
        return self._tokens(data, shards, rows)

    def _tokens(self, data: bytes | bytearray, shards: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """Stored rows -> uint16 [rows, n], checked; what is wrong is told by its shard and row."""
        tokens = self._storage.unpack(np.frombuffer(data, self._dtype).reshape(-1, self._width), self.sequence_length)
        if tokens.size and (largest := int(tokens.max())) >= self.palette.k:
            i = int(tokens.max(1).argmax())
            what = f"token {largest} at row {rows[i]} is beyond the palette of {self.palette.k}"
            raise damaged(self._path(shards[i]), what)
        return tokens


class _Files(dict[int, int]):
    """Descriptors by shard, opened at the first look-up; beyond `_OPEN_FILES` the one opened first is closed."""

    def __init__(self, directory: Path, shards: Sequence[ShardRecord], times: Sequence[int] | None) -> None:
        super().__init__()
        self._directory, self._shards, self.times = directory, shards, list(times) if times is not None else None
        self._looked = -math.inf

    def require_unchanged(self) -> None:
        """Refuse a shard that was changed since the dataset was opened: what was read may be of either state.

        One that was only written anew with the same bytes, or touched, is as good as before.

        To ask about every file that a batch came from takes a fifth of the reading, so each file is asked about when
        it is opened and then once in `_LOOK_EVERY` seconds.
        """
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            for shard, descriptor in self.items():
                self._require_unchanged(shard, descriptor)
            self._looked = now

    def _require_unchanged(self, shard: int, descriptor: int) -> None:
        if self.times is None or (time_now := os.fstat(descriptor).st_mtime_ns) == self.times[shard]:
            return
        with open(os.dup(descriptor), "rb") as file:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != self._shards[shard].sha256:
                # No word of deleting: it may be whole, of a dataset that was built anew.
                raise UserError(
                    f"{self._path(shard)}: damaged shard (it was changed while it was in use): restore it, or start "
                    "again if igpt-data verify finds it whole"
                )
        self.times[shard] = time_now

    def _path(self, shard: int) -> Path:
        return self._directory / f"{self._shards[shard].name}.tar"

    def __missing__(self, shard: int) -> int:
        path = self._path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # no wait for a pipe
        except FileNotFoundError:
            raise _missing(path) from None
        if len(self) >= _OPEN_FILES:
            os.close(self.pop(next(iter(self))))
        self[shard] = descriptor
        try:
            self._require_unchanged(shard, descriptor)
        except UserError:
            os.close(self.pop(shard))
            raise
        return descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, (self._directory, self._shards, self.times)  # an open file stays with its process

    def __del__(self) -> None:
        while self:
            os.close(self.popitem()[1])


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: missing shard: restore it or run igpt-data shards again")


def _unreadable(path: Path, row: int, error: OSError) -> UserError:
    # No word of deleting: a file server that is away for a moment makes no shard worse.
    return UserError(f"{path}: row {row} cannot be read: {error.strerror}: look at the disk, or restore the shard")
