"""What a node is: versions, stale compile locks, memory, shared memory, open files, cores and threads."""

import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from igpt_ds import memory
from igpt_ds.doctor.report import Check, Status, named
from igpt_ds.text import counted, size_text, time_text

_SHOWN = ("python", "torch", "deepspeed", "numpy", "webdataset")
_LOCK_IS_STALE_AFTER = 1800.0  # seconds; no compilation of an extension takes that long
_PROCESS = 2 * 2**30  # RAM of a rank beside its tensors: Python, torch, the device's libraries, loader workers


# --- versions ------------------------------------------------------------------------------------------------------


def read_versions() -> dict[str, Any]:
    """What is installed, and what this package's own metadata (pyproject.toml) asks for."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "CUDA of torch": torch.version.cuda}
    wanted: dict[str, str] = {}
    try:
        metadata = importlib.metadata.metadata("igpt-ds")
        wanted["python"] = metadata["Requires-Python"] or ""
        requirements = importlib.metadata.requires("igpt-ds") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = list(_SHOWN[1:])  # a checkout that was not installed
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = requirement.name
            wanted[name] = str(requirement.specifier)
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
    return {"found": found, "wanted": wanted}


def judge_versions(fact: dict[str, Any]) -> Check:
    """Everything that pyproject.toml asks for is there in a version that it allows."""
    found, wanted = fact["found"], fact["wanted"]
    faults = [
        f"{name} {found[name] or 'is missing'} ({spec or 'any version'} is needed)"
        for name, spec in wanted.items()
        if found[name] is None or not SpecifierSet(spec).contains(found[name], prereleases=True)
    ]
    if faults:
        return Check(
            "versions", "FAIL", ", ".join(faults), "pip install --upgrade what is named (see requirements.lock)"
        )
    value = ", ".join(f"{name} {found[name]}" for name in (*_SHOWN, "CUDA of torch") if found.get(name))
    if not any(wanted.values()):
        remedy = "pip install -e . in the checkout: its versions were not held against the least ones"
        return Check("versions", "WARN", f"{value}; igpt-ds itself is not installed", remedy)
    return Check("versions", "OK", value)


# --- locks of torch's extension compiler -----------------------------------------------------------------------------


def read_locks() -> dict[str, Any]:
    """Locks under torch's extension directory: path -> age in seconds."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    # Without TORCH_EXTENSIONS_DIR there is a directory more, named after Python and CUDA.
    paths = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return {str(path): time.time() - path.stat().st_mtime for path in paths if path.exists()}


def judge_locks(fact: dict[str, float]) -> Check:
    """A compilation that was killed leaves its lock, and every later run waits for it in silence."""
    if not fact:
        return Check("compile_locks", "OK", "none")
    path, age = max(fact.items(), key=lambda item: item[1])
    value = f"{path}, {time_text(age)} old" + (f", and {len(fact) - 1} more" if len(fact) > 1 else "")
    if age > _LOCK_IS_STALE_AFTER:
        return Check(
            "compile_locks", "FAIL", value, "delete it: it is left from a killed compilation, and runs wait for it"
        )
    return Check("compile_locks", "WARN", value, "delete it, unless a compilation is under way")


# --- memory ----------------------------------------------------------------------------------------------------------


def read_memory() -> dict[str, Any]:
    """Bytes of RAM that this process may still take, and whether it is a control group that limits them."""
    group = memory.group_bytes()
    return {"available": memory.available_bytes(), "limited": group is not None and group < memory.machine_bytes()}


def judge_memory(fact: dict[str, Any], tensors: float | None, ranks: int) -> Check:
    """RAM against what the ranks of a node need.

    Args:
        tensors: bytes of a rank's tensors in RAM: on a GPU its part of a checkpoint on the way to the disk, without
            one all of it; None: no configuration is known.
        ranks: on this node.
    """
    value = f"{size_text(fact['available'])} available" + (" (limited by a control group)" if fact["limited"] else "")
    if tensors is None:
        return Check("memory", "OK", value)
    need = ranks * (tensors + _PROCESS)
    value += f", {size_text(need)} needed by {counted(ranks, 'rank')}"
    if need > fact["available"]:
        return Check("memory", "FAIL", value, "ask for more memory (sbatch --mem=0), or start more ranks on more nodes")
    if need > 0.8 * fact["available"]:
        return Check("memory", "WARN", value, "little is left for the data's page cache: ask for more memory")
    return Check("memory", "OK", value)


def read_shared_memory() -> dict[str, Any]:
    """Bytes free in /dev/shm; None where there is none."""
    if not Path("/dev/shm").is_dir():
        return {"free": None}
    status = os.statvfs("/dev/shm")
    return {"free": status.f_bavail * status.f_frsize}


def judge_shared_memory(fact: dict[str, Any]) -> Check:
    """NCCL hands tensors over in /dev/shm between the ranks of a machine."""
    free = fact["free"]
    remedy = "give the container more (--ipc=host or --shm-size=8g), delete what killed processes left in /dev/shm"
    if free is None:
        return Check("shared_memory", "WARN", "no /dev/shm", "set NCCL_SHM_DISABLE=1 if NCCL fails")
    status: Status = "FAIL" if free < 64 * 2**20 else "WARN" if free < 2**30 else "OK"
    return Check("shared_memory", status, f"{size_text(free)} free in /dev/shm", "" if status == "OK" else remedy)


# --- limits ----------------------------------------------------------------------------------------------------------


def read_open_files() -> dict[str, Any]:
    """The soft limit on open files; None: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"limit": None if soft == resource.RLIM_INFINITY else soft}


def judge_open_files(fact: dict[str, Any]) -> Check:
    """A rank keeps up to 64 shards open in each loader, beside sockets to the other ranks."""
    limit = fact["limit"]
    if limit is None:
        return Check("open_files", "OK", "no limit")
    status: Status = "FAIL" if limit < 256 else "WARN" if limit < 1024 else "OK"
    return Check(
        "open_files", status, f"limit of {limit}", "" if status == "OK" else "ulimit -n 65536 in the job script"
    )


def read_cores() -> dict[str, Any]:
    """The cores that this process may use, and OMP_NUM_THREADS as it is set."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"cores": sorted(allowed), "threads": os.environ.get("OMP_NUM_THREADS")}


def judge_threads(facts: Sequence[tuple[str, dict[str, Any]]]) -> Check:
    """Threads of all ranks on a node against the cores that they may use together.

    Args:
        facts: (host, `read_cores()`) of every rank.
    """
    verdicts = []
    for host in sorted({host for host, _ in facts}):
        here = [fact for name, fact in facts if name == host]
        verdicts.append((host, _judge_threads_of_node(here)))
    bad = [host for host, check in verdicts if check.status != "OK"]
    found = max((check for _, check in verdicts), key=lambda check: ("OK", "WARN", "FAIL").index(check.status))
    return Check("threads", found.status, f"{named(bad)}: {found.value}", found.remedy) if bad else found


def _judge_threads_of_node(facts: Sequence[dict[str, Any]]) -> Check:
    cores = len(set().union(*(fact["cores"] for fact in facts)))
    ranks = len(facts)
    on = f"{counted(ranks, 'rank')} on {counted(cores, 'core')}"
    texts = {fact["threads"] for fact in facts}
    if wrong := sorted(text for text in texts if text is not None and not text.isdecimal()):
        return Check("threads", "FAIL", f"OMP_NUM_THREADS is {wrong[0]!r}", "set it to a whole number")
    if cores < ranks:
        return Check("threads", "FAIL", on, "give each rank cores of its own: srun --cpus-per-task")
    if None in texts:
        return Check("threads", "OK", f"{on}, OMP_NUM_THREADS not set: ranks divide the cores by themselves")
    threads = sum(int(fact["threads"]) for fact in facts)
    value = f"{on}, {threads} threads by OMP_NUM_THREADS"
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={max(1, cores // ranks)}: ranks wait for each other's threads"
        return Check("threads", "FAIL" if threads > 4 * cores else "WARN", value, remedy)
    return Check("threads", "OK", value)
