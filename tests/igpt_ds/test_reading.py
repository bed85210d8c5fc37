"""Files that others wrote are read, or refused in one way, whatever is in them."""

import os
from pathlib import Path

import pytest

from igpt_ds.reading import parse_json, read_json, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": [1, -2.5e3, null], "seed": 18446744073709551615}')
    assert read_json(path) == {"a": [1, -2500.0, None], "seed": 2**64 - 1}
    (tmp_path / "link.json").symlink_to(path)
    assert read_json(tmp_path / "link.json") == read_json(path)


def test_a_pipe_a_directory_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "missing"):
        with pytest.raises(OSError, match=r"regular|directory"):
            read_regular(path)


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"12345")
    assert read_regular(tmp_path / "long", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_regular(tmp_path / "long", 4)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        "-9223372036854775809",
        "18446744073709551616",
        "1e999",
        "NaN",
        "-Infinity",
        "",
        "{",
        b"\xff\xfe{}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_json_that_would_surprise_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
