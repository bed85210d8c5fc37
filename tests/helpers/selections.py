"""A selection for tests in which all is known: images whose mean colour is their embedding.

python -m tests.helpers.selections ROOT WORK OUT WORKERS    selects from the folders that `make` has written
"""

import io
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.selection.collections import Collection
from data_prep.selection.embedders import Arrays
from data_prep.selection.job import Job, Selected, Settings
from data_prep.workers.pool import pool
from data_prep.workers.run import Here
from tests.helpers.places import Meter
from tests.helpers.streams import Folders

GREY = 128


@dataclass(frozen=True)
class MeanColour:
    """The mean colour less grey: float32 [n, 3]."""

    name: str = "mean_colour"
    fit_images: int = 0

    def record(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"name": self.name}

    def fit(self, images: Iterator[Image.Image]) -> Arrays:
        """Nothing."""
        return {}

    def fitted(self, learnt: Arrays) -> "MeanColour":
        """Itself."""
        return self

    def prepare(self, image: Image.Image) -> np.ndarray:
        """uint8 [32, 32, 3]."""
        return np.asarray(image.resize((32, 32)))

    def embed(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 3]."""
        mean: np.ndarray = images.reshape(len(images), -1, 3).mean(1).astype(np.float32) - GREY
        return mean


def stages(name: str) -> AbstractContextManager[Meter]:
    """A meter that nobody reads."""
    return nullcontext(Meter())


def picture(rng: np.random.Generator, colour: tuple[int, int, int]) -> Image.Image:
    """A random texture of this mean colour, 64 x 64: no two look alike to the perceptual hash."""
    texture = rng.uniform(-60, 60, (8, 8))
    texture -= texture.mean()
    smooth = np.asarray(Image.fromarray(texture.astype(np.float32)).resize((64, 64), Image.Resampling.BICUBIC))
    pixels = np.array(colour) + (smooth - smooth.mean())[..., None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make(root: Path) -> dict[str, str]:
    """Write pool/, like/ and test/ below root; what becomes of each image of the pool, by its id.

    Red images are wanted; the redder, the better: red00 to red20. Green ones are in a cluster of their own.
    """
    rng = np.random.default_rng(0)
    fate: dict[str, str] = {}

    def put(path: str, data: bytes, becomes: str = "") -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        if becomes:
            fate[path.removeprefix("pool/")] = becomes

    for i in range(20):
        put(f"like/{i // 10}/{i:02d}.png", encoded(picture(rng, (190, GREY, GREY))))
    secret = [picture(rng, (190, GREY, GREY)) for _ in range(3)]
    for i, image in enumerate(secret):
        put(f"test/test/{i}.png", encoded(image))
    # The angle grows with i, whatever the part: a third of the reds in each.
    reds = [picture(rng, (190, GREY + 2 * i, GREY)) for i in range(21)]
    for i, red in enumerate(reds):
        put(f"pool/{'abc'[i % 3]}/red{i:02d}.png", encoded(red), "kept" if i < 12 else "below threshold")
        put(f"pool/{'abc'[i % 3]}/green{i:02d}.png", encoded(picture(rng, (GREY, 190, GREY))), "outside clusters")
    put("pool/a/again.png", encoded(reds[0]), "kept")  # before a/red00.png, which it equals
    fate["a/red00.png"] = "exact duplicate"
    put("pool/c/red00.png", encoded(reds[0]), "exact duplicate")
    put("pool/b/small.jpg", encoded(reds[3].resize((48, 48)), "JPEG", quality=70), "near duplicate")  # of a/red03
    put("pool/c/z.jpg", encoded(reds[20].resize((48, 48)), "JPEG", quality=90), "near duplicate")  # of c/red20
    put("pool/b/secret.jpg", encoded(secret[1].resize((32, 32)), "JPEG", quality=90), "close to evaluation")
    put("pool/b/page.png", b"<html>not found</html>", "unreadable")
    put("pool/c/lost.gone", b"", "unreadable")
    put("pool/d/only.png", b"", "unreadable")  # a part of which nothing is left
    return fate


def job(root: Path, work: Path, **settings: Any) -> Job:
    """The job for `make`'s folders; 12 images wanted, two clusters."""
    chosen = {"number": 12, "clusters": 2, **settings}
    return Job(
        pool=Collection(Folders(root / "pool"), "train", f"folders {root / 'pool'}"),
        like=[Collection(Folders(root / "like"), "train", f"folders {root / 'like'}")],
        evaluations=[Collection(Folders(root / "test"), "test", f"folders {root / 'test'}")],
        embedder=MeanColour(),
        settings=Settings(**chosen),
        work=work,
    )


def select(root: Path, work: Path, out: Path, **settings: Any) -> Selected:
    """In this process, to the end."""
    selected = job(root, work, **settings).run(out, Here(), stages)
    assert selected is not None
    return selected


if __name__ == "__main__":
    root, work, out, workers = sys.argv[1:]
    with pool(int(workers)) as executor:
        job(Path(root), Path(work)).run(Path(out), Here(executor), stages)
