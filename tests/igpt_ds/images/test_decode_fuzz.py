"""Mutated image files through `Transform.pixels`: pixels or a reason, and nothing else, with either decoder.

A process of its own works through them, so that a crash, a hang (an alarm kills it) or a loss of memory (its address
space is limited) shows as such. The files are mutated from one seed, and the process tells which one it was at.
"""

import io
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from igpt_ds.images.transforms import RejectError, Transform

ROOT = Path(__file__).parents[3]
SEED = 20_200_617
COUNT = 2600
SECONDS_AN_IMAGE = 10
ADDRESS_SPACE = 6 << 30
RESIDENT = 2 << 30
NASTY = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0", b"\1\0\0\0", b"\0\1")


def corpus() -> dict[str, bytes]:
    """Small files of every format and mode that is read, by name."""
    rng = np.random.default_rng(SEED)
    ramp = np.add.outer(np.arange(96), np.arange(128))[..., None] * np.array([1, 0.7, 0.4])
    photo = Image.fromarray((ramp + rng.integers(0, 30, ramp.shape)).clip(0, 255).astype(np.uint8))
    small = photo.resize((40, 30))
    tag = Image.Exif()
    tag[0x0112] = 6
    rgba = small.convert("RGBA")
    rgba.putalpha(small.convert("L"))
    sixteen = Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16))
    frames = {"save_all": True, "append_images": [small.rotate(90), small.rotate(180)]}
    made = [
        *[("JPEG", photo, o) for o in ({}, {"subsampling": 0}, {"progressive": True}, {"exif": tag}, {"quality": 30})],
        *[("JPEG", photo.convert(mode), {}) for mode in ("L", "CMYK")],
        ("MPO", photo, {"save_all": True, "append_images": [small]}),
        *[("PNG", small.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGB")],
        *[("PNG", rgba, {}), ("PNG", sixteen, {}), ("PNG", small, {"exif": tag}), ("PNG", small, frames)],
        ("PNG", small.convert("P"), {"transparency": 3}),
        *[("GIF", small.convert("P"), {}), ("GIF", small.convert("L"), {"transparency": 3}), ("GIF", small, frames)],
        *[("WEBP", small, {}), ("WEBP", rgba, {"lossless": True}), ("WEBP", small, {**frames, "exif": tag})],
        *[("BMP", small.convert(mode), {}) for mode in ("1", "L", "P", "RGB")],
        *[("PPM", small.convert(mode), {}) for mode in ("1", "L", "RGB")],
        *[("TIFF", small, {"compression": f"tiff_{c}"}) for c in ("lzw", "deflate", "adobe_deflate", "jpeg")],
        *[("TIFF", small, {}), ("TIFF", sixteen, {}), ("TIFF", rgba, {"compression": "packbits"})],
        *[("TIFF", small.convert("1"), {"compression": "group4"}), ("TIFF", small.convert("CMYK"), {"exif": tag})],
    ]
    files = {}
    for i, (kind, image, options) in enumerate(made):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[f"{i:02d} {kind} {image.mode}"] = buffer.getvalue()
    numbers = " ".join(str(i % 200) for i in range(300))
    files["plain"] = f"P3 10 10 255\n{numbers}\n".encode()
    files["odd range"] = b"P6 10 10 200\n" + bytes(i % 200 for i in range(300))
    return files


def mutated(originals: list[bytes], rng: random.Random) -> bytes:
    """One file with one to three faults."""
    data = bytearray(rng.choice(originals))
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) or 1)
        if rng.random() < 0.4:  # headers are where lengths and sizes stand
            place = rng.randrange(min(len(data), 200) or 1)
        span = rng.randint(1, 64)
        kind = rng.randrange(7)
        if kind == 0:
            for _ in range(rng.randint(1, 16)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            other = rng.choice(originals)
            data[place:] = other[rng.randrange(len(other)) :]
        elif kind == 3:
            nasty = rng.choice(NASTY)
            data[place : place + len(nasty)] = nasty
        elif kind == 4:
            del data[place : place + span]
        elif kind == 5:
            data[place:place] = data[place : place + span] * rng.choice((1, 2, 50))
        else:
            data[place : place + span] = rng.randbytes(span)
    return bytes(data)


def inputs() -> list[bytes]:
    """All files: the whole ones, mutated ones, and JPEGs cut off at many places."""
    rng = random.Random(SEED)
    originals = list(corpus().values())
    jpegs = [data for name, data in corpus().items() if "JPEG" in name]
    cut = [data[:end] for data in jpegs for end in (*range(len(data) - 12, len(data)), *range(100, len(data), 397))]
    return originals + [mutated(originals, rng) for _ in range(COUNT)] + cut


def verdict(transform: Transform, data: bytes) -> str:
    try:
        pixels = transform.pixels(data, "x", 0)
    except RejectError as reject:
        assert reject.reason
        assert "\n" not in str(reject)
        return reject.reason
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    return ""


def work() -> None:
    """In the process of its own: one line of JSON for each input, as soon as it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    transforms = [Transform("random", 16, 1, decoder=decoder) for decoder in ("pillow", "fast")]
    reduced = 0
    files = inputs()
    for data in files:
        signal.alarm(SECONDS_AN_IMAGE)  # unhandled: it ends the process, even within a library
        print(json.dumps([verdict(transform, data) for transform in transforms]), flush=True)
    signal.alarm(0)
    for data in files[:5]:
        exact, fast = (transform.pixels(data, "x", 0) for transform in transforms)
        reduced += not np.array_equal(exact, fast)
    # Not getrusage's, which begins with what the process had that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    print(json.dumps({"peak": peak, "reduced": reduced}), flush=True)


def test_every_mutated_file_gives_pixels_or_a_reason() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from tests.igpt_ds.images.test_decode_fuzz import work; work()"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    lines = output.splitlines()
    assert process.returncode == 0, f"ended with {process.returncode} at input {len(lines)}: {errors[-2000:]}"
    *verdicts, end = [json.loads(line) for line in lines]
    whole = len(corpus())
    assert len(verdicts) == len(inputs())
    assert COUNT >= 2000
    assert set(itertools.chain(*verdicts[:whole])) == {""}
    # The fast decoder takes and refuses the same files, and for the same reason.
    assert [i for i, (exact, fast) in enumerate(verdicts) if exact != fast] == []
    assert end["reduced"] == 5
    assert end["peak"] < RESIDENT
    # The faults are neither so small nor so great that one side goes untested.
    reasons = Counter(exact for exact, _ in verdicts[whole : whole + COUNT])
    assert reasons[""] > COUNT // 10
    assert min(reasons[r] for r in ("not an image", "truncated", "damaged", "too many pixels")) >= 5
