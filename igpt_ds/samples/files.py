"""Drawn images as other programs read them: one .npz, or a folder of PNG files.

    FILE.npz    arr_0   uint8 [n, side, side, 3], the name under which tools that compute an FID look for images
                tokens  uint16 [n, side²], raster order, numbers of the palette's colours
    FOLDER/     000000.png ... in the same order, side x side pixels

Of completions there are `sheet.COMPLETIONS` of each image, one after another.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from igpt_ds.atomic import publish_directory, publish_file, refuse_special, unfinished, writing
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.samples.sheet import decoded


def require_new(folder: Path) -> None:
    """Refuse a folder that holds something: whoever measures its images would measure these, too."""
    with writing(folder):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder}: exists already: choose another folder, or remove it")


def require_file(path: Path) -> None:
    """Refuse what could not be written over in the end."""
    with writing(path):
        refuse_special(path)


def save_npz(tokens: np.ndarray, palette: Palette, path: Path) -> None:
    """Write tokens, integers [n, side²], and their pixels into one .npz, whole or not at all."""
    with publish_file(path) as file:
        np.savez(file, arr_0=decoded(tokens, palette), tokens=tokens.astype(np.uint16))


def save_pngs(tokens: np.ndarray, palette: Palette, folder: Path) -> None:
    """Write a PNG of each image of tokens, integers [n, side²], into a new folder: all of them or none."""
    temporary = unfinished(folder)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            for number, pixels in enumerate(decoded(tokens, palette)):
                with open(temporary / f"{number:06d}.png", "xb") as file:
                    Image.fromarray(pixels).save(file, format="png")
                    file.flush()
                    os.fsync(file.fileno())
        publish_directory(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
