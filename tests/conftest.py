"""Fixtures that several test files share."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Palette tables go to a directory of this run, in processes that tests start, too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


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
