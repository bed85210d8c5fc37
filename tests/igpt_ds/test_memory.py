"""How much memory there is, for a process in control groups, too; and what becomes of memory that is freed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from igpt_ds.memory import group_bytes

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


def test_a_control_groups_limit_counts_on_every_level(tmp_path: Path) -> None:
    def left(membership: str) -> int | None:
        (tmp_path / "membership").write_text(membership)
        return group_bytes(tmp_path, tmp_path / "membership")

    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job / "memory.current").write_text("5\n")
    assert left("0::/slurm/job_7\n") is None
    (tmp_path / "slurm" / "memory.max").write_text("1000\n")
    (tmp_path / "slurm" / "memory.current").write_text("400\n")
    (tmp_path / "slurm" / "memory.stat").write_text("anon 300\ninactive_file 50\n")
    assert left("0::/slurm/job_7\n") == 650
    # The narrowest counts, wherever it is.
    (job / "memory.max").write_text("505\n")
    assert left("0::/slurm/job_7\n") == 500
    (job / "memory.max").write_text("900\n")
    assert left("0::/slurm/job_7\n") == 650
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("300")
    (old / "memory.usage_in_bytes").write_text("100")
    assert left("4:cpu:/x\n3:memory:/job\n") == 200
    (old / "memory.limit_in_bytes").write_text(str(2**63 - 4096))  # says: none
    assert left("3:memory:/job\n") is None


def own_group() -> Path | None:
    """The directory of this process's memory group, of version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory", path.strip("/"))
    return None


def test_a_job_within_its_own_group_believes_its_limit_wherever_it_is_asked() -> None:
    """As a Slurm job without a container: the limit is not at the root of the groups."""
    parent = own_group()
    group = parent / "igpt-ds-test" if parent else None
    try:
        assert group is not None
        group.mkdir()
    except (OSError, AssertionError):
        pytest.skip("no control group of version 1 that this user may divide")
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        script = (
            "import os, pathlib; pathlib.Path(os.environ['GROUP'], 'cgroup.procs').write_text(str(os.getpid()))\n"
            "held = bytearray(b'x') * (512 << 20)\n"
            "from igpt_ds.doctor.machine import read_memory; from igpt_ds.memory import available_bytes\n"
            "print(available_bytes(), read_memory()['available'], read_memory()['limited'])\n"
        )
        environment = {**os.environ, "GROUP": str(group)}
        told = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, timeout=60).split()
        assert 300 << 20 < int(told[0]) < 512 << 20
        assert abs(int(told[1]) - int(told[0])) < 32 << 20
        assert told[2] == "True"
    finally:
        group.rmdir()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_goes_back_to_the_system_where_it_is_not_to_be_kept() -> None:
    script = (
        "import ctypes, sys, pathlib\n"
        "from igpt_ds.memory import keep_freed_memory, return_freed_memory\n"
        "keep_freed_memory()\n"
        "if sys.argv[1] == 'return': return_freed_memory()\n"
        "library = ctypes.CDLL('libc.so.6')\n"
        "library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "pieces = [library.malloc(1 << 20) for _ in range(200)]\n"
        "for piece in pieces: ctypes.memset(piece, 1, 1 << 20)\n"
        "for piece in pieces[::2]: library.free(piece)\n"
        "print(int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 >> 20)\n"
    )
    held = [
        int(subprocess.check_output([sys.executable, "-c", script, word], text=True, timeout=60))
        for word in ("keep", "return")
    ]
    # Half of 200 MiB was freed, piece by piece.
    assert held[0] - held[1] > 90
