"""Arrays in one file: what comes back, and headers that ask for more than the file has."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.files.npz import publish_arrays, read_all_arrays, read_arrays
from tests.helpers.source_fixtures import refusal


def npy(shape: str, data: bytes = bytes(64), version: bytes = b"\x01\x00", kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header + data


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.array([b"x", b"yz"]),
        "c": np.array(7),
        "d": np.zeros((0, 4), np.uint8),
    }
    publish_arrays(tmp_path / "x.npz", **arrays)
    for name, found in read_all_arrays(tmp_path / "x.npz").items():
        assert found.dtype == arrays[name].dtype
        assert np.array_equal(found, arrays[name])
    assert np.array_equal(read_arrays(tmp_path / "x.npz", "b")[0], arrays["b"])


@pytest.mark.parametrize(
    ("member", "compression"),
    [
        (npy("(4000000000,)"), zipfile.ZIP_STORED),
        (npy("(1 << 60, 1 << 60)"), zipfile.ZIP_STORED),
        (npy("(-4, -4)"), zipfile.ZIP_STORED),
        (npy("(" + "-" * 9000 + "1,)"), zipfile.ZIP_STORED),
        (npy("(16,)", version=b"\x03\x00"), zipfile.ZIP_STORED),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", zipfile.ZIP_STORED),
        (npy("(8,)", kind="|O"), zipfile.ZIP_STORED),
        (npy("(16,"), zipfile.ZIP_STORED),
        (npy("(15,)"), zipfile.ZIP_STORED),
        (npy("(1000000,)", bytes(4_000_000)), zipfile.ZIP_DEFLATED),
    ],
)  # fmt: skip
def test_headers_that_ask_for_more_than_there_is(tmp_path: Path, member: bytes, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("a.npy", member)
    assert "missing or damaged" in refusal(lambda: read_arrays(tmp_path / "x.npz", "a"))
    assert "missing or damaged" in refusal(lambda: read_all_arrays(tmp_path / "x.npz"))


def test_a_zip_that_states_another_size(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", npy("(500000000,)"))
    size = len(npy("(500000000,)"))
    large = (size - 64 + 2_000_000_000).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(out.getvalue().replace(size.to_bytes(4, "little"), large))
    assert "missing or damaged" in refusal(lambda: read_arrays(tmp_path / "x.npz", "a"))
