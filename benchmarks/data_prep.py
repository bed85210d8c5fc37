"""Images to tokens, per core, and the palette's fit. By hand: `python -m benchmarks.data_prep [path|scaling|palette]`.

`path`: JPEGs of 500 x 375 to 64 x 64 tokens, one thread. Targets: quantising and writing cost at most 10 % over the
bare decode and transform with Pillow; 1.6 times as fast as that followed by the quantiser of Hugging Face's ImageGPT
image processor (its Pillow backend), the quantising alone 20 times; `--decoder fast` 1.7 times `--decoder pillow`.
`scaling`: `igpt-data shards` on such JPEGs with 2 workers against 1. Target: 1.8 times.
`palette`: 512 colours for 75 M pixels of 3.5 M unique colours against scikit-learn's KMeans, 30 Lloyd iterations on
2 M of the pixels. Targets: 1.5 times less processor time, and a distortion over all pixels that is no worse.

The images are cuts of scikit-learn's two photographs. What is compared is timed in turn, in one process (`scaling`:
one command each); the figures are medians of the rounds, the ratios medians of each round's ratio. `path` and `palette`
count processor time, which other programs on the machine disturb less, `scaling` the time that passes.
"""

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_sample_images
from threadpoolctl import threadpool_limits

from data_prep.palette.count import add_colours
from data_prep.palette.fit import distortion, fit
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import write_shard
from igpt_ds.images.transforms import Transform

RESOLUTION, COLOURS = 64, 512
IMAGES = 4096  # of the scaling
PHOTOS = load_sample_images().images


def jpegs(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 at the mean size of ImageNet's (about 100 kB), two in three with halved chroma."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        photo = Image.fromarray(PHOTOS[i % 2])
        width = int(photo.width * generator.uniform(0.85, 0.88))
        height = width * 3 // 4
        left, top = (int(generator.integers(0, n)) for n in (photo.width - width + 1, photo.height - height + 1))
        cut = photo.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=97, subsampling=0 if i % 3 == 0 else 2)
        made.append(buffer.getvalue())
    return made


def some_palette() -> Palette:
    """512 colours that suit the photographs; its table is worked out."""
    pixels = np.concatenate([photo.reshape(-1, 3) for photo in PHOTOS]) / 127.5 - 1
    centres = MiniBatchKMeans(COLOURS, n_init=1, random_state=0).fit(pixels).cluster_centers_
    palette = Palette(np.clip(centres, -1, 1).astype(np.float32))
    palette.encode(PHOTOS[0][:1])
    return palette


def in_turn(actions: dict[str, Callable[[], object]], rounds: int, images: int) -> dict[str, list[float]]:
    """Processor time of each action in each round, milliseconds an image."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            found[name].append((time.process_time() - begin) / images * 1e3)
    return found


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def path(rounds: int) -> None:
    """Time the way from bytes to tokens, and tell how far "fast" is from "pillow"."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil, color_quantize

    files, palette = jpegs(64), some_palette()
    exact, fast = (Transform("random", RESOLUTION, 1, decoder=decoder) for decoder in ("pillow", "fast"))
    theirs = ImageGPTImageProcessorPil(clusters=palette.colours, do_resize=False)

    def bare() -> list[np.ndarray]:
        images = (Image.open(io.BytesIO(data)).convert("RGB") for data in files)
        return [exact(image, str(i), 0) for i, image in enumerate(images)]

    def shard(transform: Transform) -> None:
        tokens = [palette.encode(transform.pixels(data, str(i), 0)).reshape(-1) for i, data in enumerate(files)]
        ids = [str(i) for i in range(len(files))]
        write_shard(Path(directory), "s-00000", np.stack(tokens), ids, None, rows_per_block=256, view=0)

    pixels = bare()
    scaled = [(image / 127.5 - 1).astype(np.float32) for image in pixels]
    with tempfile.TemporaryDirectory() as directory, threadpool_limits(limits=1):
        found = in_turn(
            {
                "bare": bare,
                "pillow": lambda: shard(exact),
                "fast": lambda: shard(fast),
                "hf": lambda: [theirs(image, return_tensors="np") for image in bare()],
                "quantise": lambda: [palette.encode(image) for image in pixels],
                "hf quantise": lambda: [color_quantize(image, palette.colours) for image in scaled],
            },
            rounds,
            len(files),
        )
    names = {
        "bare": "decode and transform with Pillow",
        "pillow": "igpt-data: the same, quantised, in a shard",
        "fast": "igpt-data --decoder fast",
        "hf": "decode, transform, Hugging Face's processor",
        "quantise": "quantising alone, ours",
        "hf quantise": "quantising alone, Hugging Face's",
    }
    print(f"{len(files)} JPEGs of {np.mean([len(data) for data in files]) / 1e3:.0f} kB, {rounds} rounds")
    for key, name in names.items():
        print(f"{name:<46}{statistics.median(found[key]):>9.3f} ms an image")
    for what, above, below, target in (
        ("ours / bare", "pillow", "bare", "at most 1.10"),
        ("Hugging Face's / ours", "hf", "pillow", "at least 1.6"),
        ("quantising alone, Hugging Face's / ours", "hf quantise", "quantise", "at least 20"),
        ("pillow / fast", "pillow", "fast", "at least 1.7"),
    ):
        print(f"{what:<46}{median_ratio(found[above], found[below]):>9.2f}    target {target}")
    for resolution in (32, 48, 64):
        disagreement(files, palette, resolution)


def disagreement(files: list[bytes], palette: Palette, resolution: int) -> None:
    """How far the two decoders' tokens are apart, in 8-bit levels; beside it what quantising itself does."""
    transforms = [Transform("random", resolution, 1, decoder=decoder) for decoder in ("pillow", "fast")]
    exact, fast = (np.stack([t.pixels(data, str(i), 0) for i, data in enumerate(files)]) for t in transforms)
    tokens = palette.encode(exact), palette.encode(fast)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a.astype(float) - b) ** 2).sum(-1)).mean())

    print(
        f"fast at {resolution}²: {(tokens[0] != tokens[1]).mean():.1%} of tokens differ; mean distance of pixels "
        f"{distance(exact, fast):.2f} levels, of the tokens' colours {distance(*map(palette.decode, tokens)):.2f}; "
        f"of a pixel from its colour {distance(exact, palette.decode(tokens[0])):.2f} (pillow), "
        f"{distance(exact, palette.decode(tokens[1])):.2f} (fast)"
    )


def scaling(rounds: int) -> None:
    """Time whole commands with 1 and 2 workers; their processor time tells what the second worker costs in itself."""
    files = jpegs(64)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    with tempfile.TemporaryDirectory() as root:
        images = Path(root, "images")
        images.mkdir()
        for i in range(IMAGES):
            (images / f"{i:05d}.jpg").write_bytes(files[i % len(files)])
        some_palette().save(Path(root, "palette.npy"))
        elapsed: dict[int, list[float]] = {1: [], 2: []}
        spent: dict[int, list[float]] = {1: [], 2: []}
        for number in range(rounds):
            for workers in (1, 2):
                command = ["shards", "image_folder", str(images), "--palette", f"{root}/palette.npy"]
                command += ["--resolution", str(RESOLUTION), "--holdout", "0", "--rows-per-shard", "256"]
                command += ["--workers", str(workers), "--out", f"{root}/{workers}-{number}"]
                begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [sys.executable, "-m", "data_prep", *command],
                    check=True,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                )
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                elapsed[workers].append(time.perf_counter() - begin)
                spent[workers].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    for workers in (1, 2):
        wall, processor = statistics.median(elapsed[workers]), statistics.median(spent[workers])
        print(f"{workers} worker(s): {wall:.2f} s, {processor:.2f} CPU s for {IMAGES} images, the command as a whole")
    print(f"scaling {median_ratio(elapsed[1], elapsed[2]):.2f}    target at least 1.8")
    print(f"2 workers' processor time over 1's: {median_ratio(spent[2], spent[1]):.3f}")


def varied_pixels(batch: int) -> np.ndarray:
    """A million pixels of the photographs, in pieces whose brightness, contrast and colour cast vary, with noise."""
    generator = np.random.default_rng(batch)
    pieces = []
    for i in range(64):
        photo = PHOTOS[i % 2]
        top, left = generator.integers(0, photo.shape[0] - 125), generator.integers(0, photo.shape[1] - 125)
        piece = photo[top : top + 125, left : left + 125].reshape(-1, 3).astype(float)
        cast = np.eye(3) + generator.normal(0, 0.025, (3, 3))
        piece = (piece - 128) @ cast * generator.uniform(0.8, 1.05) + 128 + generator.normal(0, 7, 3)
        pieces.append(piece + generator.normal(0, 1, piece.shape))
    return np.rint(np.concatenate(pieces)).clip(0, 255).astype(np.uint8)


def palette() -> None:
    """Fit palettes to the same pixels, counting processor time."""
    batches = 75
    counts = np.zeros(1 << 24, np.int64)
    sample, spent = [], 0.0
    for batch in range(batches):
        pixels = varied_pixels(batch)
        begin = time.process_time()
        add_colours(counts, pixels)
        spent += time.process_time() - begin
        sample.append(np.random.default_rng(batch).choice(pixels, 2_000_000 // batches, replace=False))
    print(f"{counts.sum() / 1e6:.0f} M pixels, {(counts > 0).sum() / 1e6:.2f} M unique colours, {COLOURS} wanted")
    begin = time.process_time()
    ours = fit(counts, COLOURS, seed=0)
    fitted = time.process_time() - begin
    chosen = np.concatenate(sample) / 127.5 - 1
    begin = time.process_time()
    centres = KMeans(COLOURS, n_init=1, max_iter=30, tol=0.0, random_state=0).fit(chosen).cluster_centers_
    theirs = time.process_time() - begin
    other = Palette(np.clip(centres, -1, 1).astype(np.float32))
    print(f"ours: {spent + fitted:.1f} CPU s (counting {spent:.1f}), distortion {distortion(counts, ours).mse:.4e}")
    print(f"scikit-learn on {len(chosen) / 1e6:.2f} M: {theirs:.1f} CPU s, {distortion(counts, other).mse:.4e}")
    print(f"ratio {theirs / (spent + fitted):.2f}    target at least 1.5")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", choices=["path", "scaling", "palette"], default=["path", "scaling", "palette"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for what in arguments.what:
        {"path": lambda: path(arguments.rounds), "scaling": lambda: scaling(arguments.rounds), "palette": palette}[
            what
        ]()


if __name__ == "__main__":
    main()
