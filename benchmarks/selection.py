"""`igpt-data select` at scale: what a core does, and that memory stays flat; `python -m benchmarks.selection`, by hand.

Rates are in CPU seconds of one core; beside them the core-hours for 10^8 images. They are of reading and hashing JPEG
files of 500 x 375, of tiny_pca, of judging vectors of 512 by 10,000 clusters and 4,096 sub-centroids, of looking hashes
up among those of 78,000 test images (ImageNet's 50,000, CIFAR-10, CIFAR-100, STL-10), and of finding duplicates. Then
the steps that see the pool as a whole, duplicates and threshold, on synthetic pools of growing size, each in a process
of its own, whose peak of memory must not grow with the pool; `python -m benchmarks.selection POOL` runs one of them.
"""

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.files.npz import publish_arrays
from data_prep.selection.clusters import Model, ScoreTask, score
from data_prep.selection.duplicates import exact_duplicates, near_duplicates
from data_prep.selection.embed import CHUNK, Chunk
from data_prep.selection.embedders import open_embedder
from data_prep.selection.perceptual_hash import NearAny, distance, perceptual_hash, small_grey
from data_prep.selection.verdicts import KEPT, Scored, drop_duplicates, judge, threshold
from igpt_ds.images.decode import decode

WEB = 100_000_000
POOLS = (1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)


def row(what: str, images: int, action: Callable[[], object]) -> None:
    """Time an action and print its line."""
    begin = time.process_time()
    action()
    rate = images / (time.process_time() - begin)
    print(f"{what:<58}{rate:>14,.0f}{WEB / rate / 3600:>14,.1f}", flush=True)


def rates(work: Path) -> None:
    """Print what a core does in a second."""
    rng = np.random.default_rng(0)
    print(f"{'one core':<58}{'images/s':>14}{'h for 10^8':>14}")
    files = []
    for i in range(100):
        photo = Image.fromarray(load_sample_images().images[i % 2]).resize((500, 375))
        noise = np.clip(np.asarray(photo) + rng.normal(0, 4, (375, 500, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    images = [decode(data) for data in files]
    greys = np.stack([small_grey(image) for image in images])
    row("decode a JPEG of 500 x 375", len(files), lambda: [decode(data) for data in files])
    row("grey of 32 x 32", len(files), lambda: [small_grey(image) for image in images])
    row("perceptual hash of it", 100 * len(files), lambda: [perceptual_hash(greys) for _ in range(100)])
    embedder = open_embedder("tiny_pca", None, None)
    embedder = embedder.fitted(embedder.fit(iter(images)))
    prepared = np.stack([embedder.prepare(image) for image in images])
    row("tiny_pca: pixels of 16 x 16", len(files), lambda: [embedder.prepare(image) for image in images])
    row("tiny_pca: components", 20 * len(files), lambda: [embedder.embed(prepared) for _ in range(20)])

    vectors = rng.standard_normal((CHUNK, 512)).astype(np.float16)
    publish_arrays(work / "c.npz", vectors=vectors, hash=rng.integers(0, 2**64, CHUNK, dtype=np.uint64))
    centres = rng.standard_normal((10_000, 512)).astype(np.float32)
    Model(centres, np.ones(10_000, bool), centres[:4096]).save(work / "model.npz")
    task = ScoreTask(Chunk("", work / "c.npz", CHUNK), work / "s.npz", work / "model.npz", None, 6)
    row("judge 512 dimensions: 10,000 clusters, 4,096 centroids", CHUNK, lambda: score(task))
    near = NearAny(rng.integers(0, 2**64, 78_000, dtype=np.uint64), 6)
    asked = rng.integers(0, 2**64, (16, CHUNK), dtype=np.uint64)
    row("close to one of 78,000 hashes, distance 6", asked.size, lambda: [near(each) for each in asked])

    number = 2_000_000
    hashes = rng.integers(0, 2**64, number, dtype=np.uint64)
    digests = rng.integers(0, 256, (number, 32), dtype=np.uint8)
    row("exact duplicates", number, lambda: list(exact_duplicates(_chunks(digests), number, work)))
    row("near duplicates, distance 4", number, lambda: list(near_duplicates(_chunks(hashes), number, 4, work)))


def _chunks(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(values), CHUNK):
        part = values[first : first + CHUNK]
        yield part, np.arange(first, first + len(part))


def pool(images: int, work: Path) -> None:
    """Duplicates and threshold of a pool of so many images, of which one in fifty is a copy; prints its figures."""
    rng = np.random.default_rng(0)
    scored = []
    for first in range(0, images, CHUNK):
        rows = min(CHUNK, images - first)
        chunk = Chunk("", work / f"{first}.npz", rows)
        hashes = rng.integers(0, 2**64, rows, dtype=np.uint64)
        digests = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
        hashes[: rows // 50], digests[: rows // 50] = 0, 0
        publish_arrays(chunk.path, hash=hashes, sha256=digests)
        scored.append(Scored(chunk, work / f"{first}-scores.npz"))
        similarity = rng.random(rows, np.float32)
        publish_arrays(scored[-1].scores, outside=similarity < 0.2, close=similarity < 0, similarity=similarity)
    before = _peak()
    (work / "scratch").mkdir()
    begin = time.process_time()
    drop_duplicates(scored, work / "fates", 4, work / "scratch")
    cut = threshold(scored, work / "fates", images // 2)
    kept = sum(int((each.fates == KEPT).sum()) for each in judge(scored, work / "fates", cut))
    took = time.process_time() - begin
    print(f"{images:>12,}{kept:>12,}{took:>12.1f}{before:>14,.0f}{_peak():>14,.0f}", flush=True)


def _peak() -> float:
    """The largest memory of this process so far, MiB; getrusage would tell the parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def moved() -> None:
    """Print the share of hashes that stay within a distance, for 400 pieces of two photographs."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    pieces = []
    for _ in range(400):
        photo, side = photos[rng.integers(2)], int(rng.integers(64, 420))
        left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
        pieces.append(photo.crop((left, top, left + side, top + side)))
    cubic, lanczos = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "JPEG at 75": lambda image: _jpeg(image, 75),
        "32 x 32, Lanczos": lambda image: image.resize((32, 32), lanczos),
        "32 x 32, back to 256 x 256, JPEG at 75": lambda i: _jpeg(
            i.resize((32, 32), lanczos).resize((256, 256), cubic), 75
        ),
        "32 x 32, without antialiasing": lambda image: image.resize((32, 32), Image.Resampling.NEAREST),
        "15 % brighter, clipped": lambda image: image.point(lambda level: min(255, int(level * 1.15))),
        "2 % cut off at two sides": lambda i: i.crop((i.width // 50, i.height // 50, i.width, i.height)),
    }
    before = perceptual_hash(np.stack([small_grey(image) for image in pieces]))
    print(f"\n{'perceptual hash after':<58}{'4 bits':>14}{'6 bits':>14}")
    for name, change in changes.items():
        bits = distance(before, perceptual_hash(np.stack([small_grey(change(image)) for image in pieces])))
        print(f"{name:<58}{(bits <= 4).mean():>14.1%}{(bits <= 6).mean():>14.1%}")


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def main() -> None:
    """Print the tables."""
    with TemporaryDirectory() as work:
        if len(sys.argv) > 1:
            pool(int(sys.argv[1]), Path(work))
            return
        rates(Path(work))
    moved()
    print(f"\n{'pool':>12}{'kept':>12}{'CPU s':>12}{'before, MiB':>14}{'peak, MiB':>14}")
    for images in POOLS:
        subprocess.run([sys.executable, "-m", "benchmarks.selection", str(images)], check=True)


if __name__ == "__main__":
    main()
