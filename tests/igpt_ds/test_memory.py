"""What becomes of memory that is freed."""

import platform
import subprocess
import sys

import pytest

# A process of its own, since the setting holds for the whole of one. Pieces of 48 MiB are above any threshold that
# glibc chooses by itself.
FAULTS = """
import resource, sys
from igpt_ds.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [bytearray(b"x") * (48 << 20) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *others = [faults() for _ in range(4)]
print(first, max(others))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    def pages(setting: str) -> list[int]:
        command = [sys.executable, "-c", FAULTS, setting]
        return list(map(int, subprocess.check_output(command, timeout=60).split()))

    first, later = pages("keep")
    assert first > 3 * 48 * 256 * 0.9, "a page of 4 KiB each"
    assert later < first / 100
    assert pages("leave")[1] > first / 2, "otherwise the test shows nothing"
