"""Mutated files through every reader of files that others may have written: one line of refusal, or a right result.

As tests/igpt_ds/images/test_decode_fuzz.py does with images: one process of its own works through all, so that a
crash, a hang (an alarm kills it) or a loss of memory (its address space is limited) shows as such; all comes from one
seed. Where a file's checksum is recorded, it is recorded anew half of the time, so that the reader sees what is behind.
"""

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from igpt_ds.errors import RunError, UserError
from tests.helpers.readers import Reader, readers
from tests.igpt_ds.images.test_decode_fuzz import mutated

ROOT = Path(__file__).parents[1]
SEED, COUNT = 20_200_617, 200  # of each file
SECONDS_AN_INPUT, SECONDS = 10, 240  # of computing; of the clock, for all
HEADROOM = 1 << 30  # of address space, beyond what the libraries take

DEEP, LONG = "@deep@", "@long@"
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**62, 2**63, 2**64, 0.5, -0.0, 1e308, math.nan, math.inf]
ODD += ["", "x", "../x", "\0", "\x1b[2J\n", "\ud800", [], [None], [[]], {}, {"": {}}, DEEP, LONG, "a" * 100_000]
ODD_TOML = [b"-1", b"1e400", b"nan", b'"x"', b"[]", b"9" * 5000, b"[" * 9999]


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """JSON with one value that is odd, gone, or that of another key."""
    tree = json.loads(data)
    places = list(_places({"": tree}))
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 and key != "":
        del holder[key]
    elif kind == 1:
        other, its = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[its]))
    else:
        holder[key] = rng.choice(ODD)
    text = json.dumps(tree if key != "" else holder[key])
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def mutation(data: bytes, rng: random.Random) -> bytes:
    """One faulty copy; half of those of JSON (also in safetensors), zips and tars are well-formed outside."""
    if rng.random() < 0.5:
        if data[:2] == b"PK":
            return zipped(data, rng)
        if data[257:262] == b"ustar":
            return summed(mutated([data], rng))
        if data[:1] in (b"{", b"["):
            with contextlib.suppress(ValueError):  # several lines of JSON
                return rewritten(data, rng)
            lines = data.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            return b"".join([*lines[:at], rewritten(lines[at], rng) + b"\n", *lines[at + 1 :]])
        if data[8:9] == b"{":
            end = 8 + int.from_bytes(data[:8], "little")
            header = rewritten(data[8:end], rng)
            return len(header).to_bytes(8, "little") + header + data[end:]
        if re.match(rb"\w+ = ", data):
            value = rng.choice(list(re.finditer(rb"(?<= = ).+", data)))
            return data[: value.start()] + rng.choice(ODD_TOML) + data[value.end() :]
    return mutated([data], rng)


def zipped(data: bytes, rng: random.Random) -> bytes:
    """A zip of which one member is faulty, its checksum not."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(out, "w") as archive:
        members = {name: given.read(name) for name in given.namelist()}
        chosen = rng.choice(list(members))
        start, end = members[chosen][:128], members[chosen][128:]  # of an .npy: its header, and what it holds
        if end[:1] == b"{" and rng.random() < 0.7:
            end = rewritten(end, rng)
            start = re.sub(rb"\((\d+),\), } *", f"({len(end)},), }}".encode(), start[:-1]).ljust(127) + b"\n"
            members[chosen] = start + end
        else:
            members[chosen] = mutated([members[chosen]], rng)
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def summed(data: bytes) -> bytes:
    """A tar with right checksums in all its headers."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


# --- the loop ------------------------------------------------------------------------------------------------------


def work() -> None:
    """In the process of its own: one line of JSON for each input: what it was, and the refusal or what is wrong."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        os.environ["XDG_CACHE_HOME"] = root
        found = readers(Path(root))
        for reader in found:
            reader.read(reader.folder)  # whole
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
        for reader in found:
            for name in reader.files:
                rng = random.Random(f"{SEED} {name}")
                good = (reader.folder / name).read_bytes()
                for number in range(COUNT):
                    # A new place each time, since readers remember what they have read of a path.
                    folder = Path(shutil.copytree(reader.folder, Path(root) / f"{number}"))
                    (folder / name).write_bytes(mutation(good, rng))
                    with contextlib.suppress(Exception):
                        if reader.sign and rng.random() < 0.6:
                            reader.sign(folder, name)
                    print(json.dumps([f"{reader.folder.name}/{name}", number, *verdict(reader, folder)]), flush=True)
                    shutil.rmtree(folder)


def verdict(reader: Reader, folder: Path) -> tuple[str, str]:
    # Unhandled they end the process, even within a library; on a busy machine the clock runs faster than the work.
    signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
    signal.alarm(10 * SECONDS_AN_INPUT)
    try:
        reader.read(folder)
    except (UserError, RunError) as refusal:
        return "refused", "" if ": " in str(refusal) else str(refusal)
    except BaseException as fault:
        return "fault", "".join(traceback.format_exception(fault)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return "read", ""


def test_every_mutated_file_is_refused_in_one_line_or_read_aright() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.test_fuzz import work; work()"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    lines = [json.loads(line) for line in output.splitlines()]
    last = lines[-1][:2] if lines else "the whole ones"
    assert process.returncode == 0, f"ended with {process.returncode} after {last}: {errors[-2000:]}"
    assert [line for line in lines if line[3]] == []
    # The faults are not so small that every file is read; a damaged line of metrics is passed over.
    refused = Counter(name for name, _, what, _ in lines if what == "refused")
    names = {name for name, *_ in lines}
    assert len(names) >= 25 and [n for n in names if refused[n] < COUNT // 10 and "metrics" not in n] == []
