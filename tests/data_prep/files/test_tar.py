"""Tars read in place: against the standard library's writer and reader, and against hostile ones."""

import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.files.tar import Member, gunzipped, members, read_member, safe_name
from igpt_ds.images import MAX_BYTES
from tests.helpers.source_fixtures import link, refusal, tar_bytes

LONG = "d" * 90 + "/" + "e" * 90 + "/é" + "f" * 120 + ".jpg"


def indexed(data: bytes, path: Path) -> list[Member]:
    path.write_bytes(data)
    with path.open("rb") as file:
        return list(members(file, "it.tar"))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(kind: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["a.jpg", "./b/c.png", "/etc/passwd", "../../up.jpg", "x" * 100, "y" * 80 + "/" + "z" * 99]
    if kind != tarfile.USTAR_FORMAT:
        names += [LONG, "ünïcode.jpg", "last.jpg"]
    given = [(name, rng.bytes(int(rng.integers(0, 3000)))) for name in names]
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = tmp_path / "t.tar"
    found = indexed(tar_bytes([(folder, b""), *given], kind), path)
    assert [member.name for member in found] == names
    with tarfile.open(path) as tar, path.open("rb") as file:
        for member, info, (_, data) in zip(found, tar.getmembers()[1:], given, strict=True):
            assert (member.offset, member.size, member.other) == (info.offset_data, info.size, None)
            assert read_member(file, member.offset, member.size) == data


def test_a_tar_within_a_tar(tmp_path: Path) -> None:
    inner = tar_bytes([("1.jpg", b"one"), ("2.jpg", b"two")])
    path = tmp_path / "t.tar"
    outer = indexed(tar_bytes([("a.tar", inner), ("b.tar", inner)]), path)
    with path.open("rb") as file:
        for member in outer:
            found = list(members(file, "inner", member.offset, member.offset + member.size))
            assert [read_member(file, m.offset, m.size) for m in found] == [b"one", b"two"]
        end = outer[0].offset + outer[0].size
        assert "cut short" in refusal(lambda: list(members(file, "inner", outer[0].offset, end - len(inner) + 1000)))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    kinds = {
        tarfile.SYMTYPE: "a symbolic link",
        tarfile.LNKTYPE: "a hard link",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a named pipe",
    }
    given = [(link(f"{i}.jpg", "/etc/passwd", kind), b"") for i, kind in enumerate(kinds)]
    found = indexed(tar_bytes([*given, ("after.jpg", b"data")]), tmp_path / "t.tar")
    assert [member.other for member in found] == [*kinds.values(), None]
    assert found[-1].size == 4


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes([("a.jpg", b"a" * 700), (LONG, b"b" * 100)])
    data_end = len(whole.rstrip(b"\0"))
    last = -(-data_end // 512) * 512  # the end mark follows
    for cut in [0, 100, 511, 512, 700, 1211, 1536, *range(1537, last, 97), last, last + 511]:
        line = refusal(lambda cut=cut: indexed(whole[:cut], tmp_path / "t.tar"))
        assert line.startswith("it.tar: ")
        assert "fetch it again" in line
    assert len(indexed(whole[: last + 512], tmp_path / "t.tar")) == 2


def test_archives_joined_together_are_refused(tmp_path: Path) -> None:
    one = tar_bytes([("a.jpg", b"a")])
    assert "goes on after its end mark" in refusal(lambda: indexed(one + one, tmp_path / "t.tar"))
    assert len(indexed(one + bytes(1 << 21), tmp_path / "t.tar")) == 1


@pytest.mark.parametrize("packed", [gzip.compress(b"x", mtime=0), b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_compressed_tars_are_named(packed: bytes, tmp_path: Path) -> None:
    assert "compressed: unpack it" in refusal(lambda: indexed(packed.ljust(600), tmp_path / "t.tar"))


def test_other_files_are_no_tars(tmp_path: Path) -> None:
    for data in (b"<html>" * 200, np.random.default_rng(0).bytes(2000)):
        assert "not a tar" in refusal(lambda data=data: indexed(data, tmp_path / "t.tar"))


def with_field(tar: bytes, start: int, value: bytes) -> bytes:
    """The first header with a field overwritten and its checksum made right again."""
    block = bytearray(tar[:512])
    block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + tar[512:]


def test_checksums_of_old_writers(tmp_path: Path) -> None:
    """They summed signed bytes, which shows where a name is not ASCII."""
    tar = tar_bytes([("é.jpg", b"a")])
    block = bytearray(tar[:512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % int(np.frombuffer(bytes(block), np.int8).sum())
    assert bytes(block) != tar[:512]
    assert [member.name for member in indexed(bytes(block) + tar[512:], tmp_path / "t.tar")] == ["é.jpg"]


def test_made_up_headers_are_refused(tmp_path: Path) -> None:
    tar = tar_bytes([("a.jpg", b"a" * 100)])
    damaged = tar[:10] + b"!" + tar[11:]
    negative = with_field(tar, 124, b"\xff" * 12)
    huge = with_field(tar, 124, b"\x80" + b"\x7f" * 11)
    text = with_field(tar, 124, b"-0000000100\0")
    for data in (damaged, negative, huge, text):
        refusal(lambda data=data: indexed(data, tmp_path / "t.tar"))
    big = with_field(with_field(tar_bytes([("a", bytes(2 << 20))]), 156, b"x"), 0, b"pax")
    assert "a header of 2097152 bytes" in refusal(lambda: indexed(big, tmp_path / "t.tar"))


@pytest.mark.parametrize(
    "record",
    [b"30 path=short\n", b"9999999 path=a\n", b"0 path=a\n", b"path=a\n", b"12 size=-512\n", b"18 path=a\0b.jpg.\n"],
)
def test_made_up_pax_records_are_refused(record: bytes, tmp_path: Path) -> None:
    extended = with_field(tar_bytes([("pax", record)])[:1024], 156, b"x")
    refusal(lambda: indexed(extended + tar_bytes([("a.jpg", b"a")]), tmp_path / "t.tar"))


def test_a_stated_size_is_that_of_the_file_that_follows(tmp_path: Path) -> None:
    """A pax size, then a GNU long name, then a member whose own header has no size."""
    pax = with_field(tar_bytes([("pax", b"13 size=1000\n")])[:1024], 156, b"x")
    name = with_field(tar_bytes([("././@LongLink", LONG.encode() + b"\0")])[:1024], 156, b"L")
    member = with_field(tar_bytes([("short.jpg", b"a" * 1000)]), 124, b"00000000000\0")
    (found,) = indexed(pax + name + member, tmp_path / "t.tar")
    assert found == Member(LONG, 2560, 1000, None)


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    old = with_field(tar_bytes([("a.jpg", b"a")]), 156, b"S")
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    for data in (old, tar_bytes([(info, b"a")], tarfile.PAX_FORMAT)):
        assert "without --sparse" in refusal(lambda data=data: indexed(data, tmp_path / "t.tar"))


def test_mutated_tars_never_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    whole = tar_bytes([("a.jpg", b"a" * 700), (LONG, b"b" * 100), (link("l", "a.jpg"), b"")], tarfile.PAX_FORMAT)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        try:
            for member in indexed(bytes(data), tmp_path / "t.tar"):
                assert member.offset + member.size <= len(data)
            outcomes["read"] += 1
        except Exception as error:
            assert type(error).__name__ == "UserError", error
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_large_sizes_in_base_256(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    size = 9 << 30
    info = tarfile.TarInfo("a.bin")
    info.size = size
    head, tail = info.tobuf(tarfile.GNU_FORMAT), tar_bytes([("b.jpg", b"b")])
    with path.open("wb") as file:
        file.write(head)
        file.seek(size, os.SEEK_CUR)  # a hole: no disk is used
        file.write(tail)
    with path.open("rb") as file:
        found = list(members(file, "t"))
    assert [(m.name, m.offset, m.size) for m in found] == [("a.bin", 512, size), ("b.jpg", size + 1024, 1)]


def test_read_member_is_capped_and_tells_of_an_early_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1000)
    with path.open("rb") as file:
        assert len(read_member(file, 10, MAX_BYTES + 900)) == MAX_BYTES + 1
        with pytest.raises(OSError, match="10 bytes early"):
            read_member(file, MAX_BYTES + 900, 110)


def test_names_fit_for_ids() -> None:
    assert safe_name("a/b é.jpg") == "a/b é.jpg"
    long, other = safe_name("x" * 5000), safe_name("x" * 5001)
    assert long != other
    assert len(long) == 217
    assert safe_name("a\nb\x1b.jpg").startswith("a?b?.jpg~")
    assert safe_name("a\nb") != safe_name("a\tb")
    assert safe_name("\udcff.jpg") == "\udcff.jpg"


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(b"content"))
    with gunzipped(path, 7) as file:
        file.seek(0)
        assert file.read() == b"content"
    assert "holds more than" in refusal(lambda: gunzipped(path, 6))
    path.write_bytes(gzip.compress(b"content" * 1000)[:-9])
    assert "cannot be unpacked" in refusal(lambda: gunzipped(path, 1 << 20))
    path.write_bytes(b"no gzip")
    assert "cannot be unpacked" in refusal(lambda: gunzipped(path, 1 << 20))
