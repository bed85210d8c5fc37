"""Fixtures that several test files share."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: the processes that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Palette tables go to a directory of this run, in processes that tests start, too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices: threads that wait for one another on a busy machine cost more than they bring."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: room for two checkpoints of the tiny preset (0.37 MB each), but not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here (tests of checkpoint/ simulate one)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pieces of two real photographs as JPEG files of 80 x 106 pixels, in two class folders."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for i in range(24):
            top, left = 80 * (i // 6), 106 * (i % 6)
            Image.fromarray(np.asarray(photo)[top : top + 80, left : left + 106]).save(
                root / name / f"{i:02d}.jpg", quality=95
            )
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards (train/ and val/) of 600 handwritten digits of 8 x 8 pixels in 16 greys."""
    return build_digits(tmp_path_factory.mktemp("digits"))


def build_digits(root: Path) -> Path:
    """Write images, palette and shards below `root`; return the folder of train/ and val/."""
    from sklearn.datasets import load_digits

    from data_prep.cli import cli

    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images[:600], labels[:600], strict=True)):
        (root / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        # As many greys as colours are wanted: the palette is then the same whatever k-means does.
        grey = np.minimum(image.reshape(8, 8), 15).astype(np.uint8) * 17
        Image.fromarray(grey).save(root / "images" / str(label) / f"{i:04d}.png")
    where = [str(root / "images"), "--no-crop"]
    cli(["palette", *where, "--k", "16", "--out", str(root / "palette.npy")], standalone_mode=False)
    shards = ["shards", "image_folder", *where, "--palette", str(root / "palette.npy"), "--resolution", "8"]
    cli([*shards, "--holdout", "0.1", "--out", str(root / "data")], standalone_mode=False)
    return root / "data"
