"""Tar archives read in place: where each member lies, so that it can be read without unpacking anything.

Archives come from outside. `tarfile` reads a header's fields; what follows from them is decided below: nothing is ever
written to disk, links, devices and folders are no images, and every size is held against the end of the file.
A tar must end in its end mark: without it the file was cut, or is still being written.

Format: POSIX.1-1988 ustar, the pax records `path` and `size`, and GNU's long names (POSIX.1-2017, pax, "ustar
Interchange Format" and "pax Extended Header").
"""

import gzip
import hashlib
import os
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.files.remote import opened
from igpt_ds.errors import UserError
from igpt_ds.images import MAX_BYTES

BLOCK = 512
_MAX_EXTRA = 1 << 20  # bytes of a pax header or long name
_LONGEST_NAME = 255
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: whatever their size field says
_NAMES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: its path, as it is written there: never to be used as a path.
        offset: of its first byte in the file.
        size: bytes.
        other: what it is where it is no regular file ("a symbolic link", ...), else None.
    """

    name: str
    offset: int
    size: int
    other: str | None


def members(file: BinaryIO, where: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members of the tar in bytes [start, end) of an open local file, folders left out, in their order.

    Args:
        where: the archive's name, for error messages.

    Raises:
        UserError: it is no tar, is compressed, cut or damaged, goes on after its end mark, or holds sparse files.
    """
    descriptor = file.fileno()
    end = os.fstat(descriptor).st_size if end is None else end
    at, begin = start, start
    path: bytes | None = None  # as extended headers state them for the member that follows
    size: int | None = None
    while True:
        block = os.pread(descriptor, BLOCK, at) if at + BLOCK <= end else b""
        if len(block) < BLOCK:
            raise UserError(f"{where}: ends at byte {at - begin} without an end mark, cut short: fetch it again")
        if not any(block):
            break
        kind, own = _type_and_size(block, where, at - begin)
        at += BLOCK
        extra_header = kind in {b"x", b"g", b"L", b"K"}
        length = 0 if kind in _WITHOUT_DATA else own if size is None or extra_header else size
        if at + length > end:
            raise UserError(f"{where}: its member at byte {at - BLOCK - begin} is cut short: fetch it again")
        if extra_header:
            if length > _MAX_EXTRA:
                raise UserError(f"{where}: a header of {length} bytes at byte {at - begin}: not an archive of images")
            new_path, new_size = _extra(kind, os.pread(descriptor, length, at), where, at - begin)
            path = path if new_path is None else new_path
            size = size if new_size is None else new_size
        else:
            name = (_name(block) if path is None else path).decode("utf-8", "surrogateescape")
            if "\0" in name:
                raise UserError(f"{where}: a name with a NUL byte at byte {at - begin}: damaged: fetch it again")
            if kind == b"S" or name.startswith("GNUSparseFile"):
                raise UserError(f"{where}: {name} is sparse: write the archive again without --sparse")
            folder = kind == b"5" or (kind in b"0\0" and name.endswith("/"))
            if not folder:
                other = None if kind in b"0\x007" else _NAMES.get(kind, "no regular file")
                yield Member(name, at, length, other)
            path = size = None
        at += -(-length // BLOCK) * BLOCK
    while at < end:
        chunk = os.pread(descriptor, min(1 << 20, end - at), at)
        if any(chunk) or not chunk:
            raise UserError(f"{where}: goes on after its end mark: archives joined together? give them one by one")
        at += len(chunk)


def read_member(file: BinaryIO, offset: int, size: int, limit: int = MAX_BYTES + 1) -> bytes:
    """A member's bytes, the first `limit` at most; the file's position is not used, which forked workers share.

    Raises:
        OSError: the file ends before them.
    """
    wanted = min(size, limit)
    data = b""
    while len(data) < wanted:
        piece = os.pread(file.fileno(), wanted - len(data), offset + len(data))
        if not piece:
            raise OSError(f"the archive ends {wanted - len(data)} bytes early")
        data = data + piece if data else piece
    return data


def safe_name(name: str) -> str:
    """A member's name fit for an id: long ones and control characters give way to a part of their hash."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) <= _LONGEST_NAME and not re.search(r"[\x00-\x1f\x7f]", name):
        return name
    mark = hashlib.sha256(raw).hexdigest()[:16]
    return re.sub(r"[\x00-\x1f\x7f]", "?", raw[:200].decode("utf-8", "replace")) + f"~{mark}"


def plain_name(name: str) -> str:
    """A member's name as unpacking it would leave it, so that `./a//1.jpg` and `a/1.jpg` are seen to be one."""
    return posixpath.normpath(f"/{name.lstrip('/')}")[1:]


def gunzipped(path: Path, limit: int) -> BinaryIO:
    """A gzip file's content as an anonymous temporary file.

    Raises:
        UserError: it cannot be read, is damaged, or holds more than `limit` bytes.
    """
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with opened(str(path)) as raw, gzip.open(raw) as packed:
            while chunk := packed.read(1 << 20):
                file.write(chunk)
                if file.tell() > limit:
                    raise UserError(f"{path}: holds more than {limit >> 20} MiB: not the archive that is wanted")
    except (OSError, EOFError, zlib.error) as error:
        file.close()
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be unpacked ({text}): fetch it again") from error
    except UserError:
        file.close()
        raise
    return file


def _type_and_size(block: bytes, where: str, at: int) -> tuple[bytes, int]:
    """A header's type and size field, once its checksum is right."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    if header is None and at == 0:
        packed = block[:2] == b"\x1f\x8b" or block[:3] in {b"BZh", b"\xfd7z", b"\x28\xb5\x2f"}
        what = "compressed: unpack it to a plain tar" if packed else "not a tar: mend the path"
        raise UserError(f"{where}: {what}")
    if header is None or header.size < 0:
        raise UserError(f"{where}: damaged at byte {at}: fetch it again")
    return block[156:157], header.size


def _name(block: bytes) -> bytes:
    # Not as tarfile joins it: in GNU's own headers the prefix's bytes hold times.
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _extra(kind: bytes, data: bytes, where: str, at: int) -> tuple[bytes | None, int | None]:
    """The path and size that an extended header states, where it does."""
    if kind == b"L":
        return data.rstrip(b"\0"), None
    records = _pax(data, where, at) if kind == b"x" else {}
    return records.get(b"path"), _decimal(records[b"size"], where, at) if b"size" in records else None


def _decimal(text: bytes, where: str, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise UserError(f"{where}: damaged at byte {at}: fetch it again")
    return int(text)


def _pax(data: bytes, where: str, at: int) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        match = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=").match(data, position)
        stop = position + int(match[1]) if match else 0
        if not match or stop <= match.end() or stop > len(data) or data[stop - 1 : stop] != b"\n":
            raise UserError(f"{where}: damaged at byte {at}: fetch it again")
        if match[2].startswith(b"GNU.sparse"):
            raise UserError(f"{where}: a sparse file at byte {at}: write the archive again without --sparse")
        records[match[2]] = data[match.end() : stop - 1]
        position = stop
    return records
