"""token_arrays: the shards hold the very tokens and labels, whatever the palette; hostile arrays; what is refused."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.sources import open_source
from data_prep.sources.token_arrays import TokenArrays
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from tests.data_prep.test_cli import igpt_data, refused
from tests.helpers.source_fixtures import refusal

RNG = np.random.default_rng(3)
CLASSES = 3


def crowded() -> Palette:
    """40 colours, of which some share their nearest 8-bit colour and others lie less than a level apart."""
    colours = RNG.uniform(-1, 1, (40, 3)).astype(np.float32)
    level = np.float32(1 / 127.5)
    colours[11] = colours[10] + level * np.float32([0.3, 0, 0])
    colours[12] = colours[10] + level * np.float32([0, 0.4, -0.4])
    colours[13] = colours[10] - level * np.float32([0.2, 0.2, 0.2])
    return Palette(np.clip(colours, -1, 1))


PALETTE = crowded()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder as released: 30 training images, 8 for validation, 12 for testing, of 4 x 4 tokens; one-hot labels."""
    folder = tmp_path / "released"
    folder.mkdir()
    for part, images in (("tr", 30), ("va", 8), ("te", 12)):
        np.save(folder / f"pets_{part}X.npy", RNG.integers(0, 40, (images, 16)))
        np.save(folder / f"pets_{part}Y.npy", np.eye(CLASSES, dtype=np.float32)[np.arange(images) % CLASSES])
    return folder


def opened(*paths: Path, **options: str) -> TokenArrays:
    found: Any = open_source("token_arrays", [str(path) for path in paths], options, lambda: PALETTE)
    copy: TokenArrays = pickle.loads(pickle.dumps(found))
    assert copy == found and len(pickle.dumps(found)) < 50_000
    return copy


def test_the_shards_hold_the_very_tokens_and_labels(released: Path, tmp_path: Path) -> None:
    """Colours that are hardly apart, too: to decode such a token to 8 bits and encode it again gives another."""
    rounded = PALETTE.encode(PALETTE.decode(np.arange(40)))
    assert (rounded != np.arange(40)).any()
    PALETTE.save(tmp_path / "palette.npy")
    words = ["--palette", tmp_path / "palette.npy", "--resolution", 4, "--no-crop", "--holdout", 0.2]
    splits = ["--split", "train", "--split", "val", "--split", "test"]
    done = igpt_data("shards", "token_arrays", released, *words, *splits, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    seen = 0
    for split, part in (("train", "tr"), ("val", "tr"), ("test", "te")):
        dataset = Dataset.open(tmp_path / "data" / split)
        tokens, labels = np.load(released / f"pets_{part}X.npy"), np.load(released / f"pets_{part}Y.npy").argmax(1)
        rows = [int(name.rpartition(b"/")[2]) for name in dataset.ids().tolist()]
        assert np.array_equal(dataset.images(), tokens[rows]) and np.array_equal(dataset.labels(), labels[rows])
        assert len(set(rows)) == len(rows)
        assert "distortion" not in Manifest.load(dataset.path).palette, "what the palette lost is not known"
        seen += len(rows)
    assert seen == 30 + 12


def test_pools_and_labels_go_by_the_names(released: Path, tmp_path: Path) -> None:
    source = opened(released)
    assert (source.side, source.classes) == (4, ["0", "1", "2"])
    assert [item.label for item in source.items("train")] == [i % 3 for i in range(30)]
    assert [item.id for item in source.items("test")][:2] == ["test/pets_teX/0000000", "test/pets_teX/0000001"]
    assert len(opened(released, test="validation").items("test")) == 8
    assert source.files("test/pets_teX/0000003") == [released / "pets_teX.npy", released / "pets_teY.npy"]
    assert opened(released, labels="none").classes is None
    (tmp_path / "names.txt").write_text("cat\ndog\nemu\nfox\n")
    assert opened(released, classes=str(tmp_path / "names.txt")).classes == ["cat", "dog", "emu", "fox"]
    # One array by another name, whose labels are whole numbers of another file.
    tokens = RNG.integers(0, 40, (5, 9)).astype(np.uint8)
    np.save(tmp_path / "some_test.npy", tokens)
    np.save(tmp_path / "numbers.npy", np.array([0, 4, 2, 2, 1], np.int16))
    one = opened(tmp_path / "some_test.npy", labels=str(tmp_path / "numbers.npy"))
    assert one.items("train") == [] and [item.label for item in one.items("test")] == [0, 4, 2, 2, 1]
    assert one.classes == ["0", "1", "2", "3", "4"]
    unlabelled = opened(tmp_path / "some_test.npy", pool="train")
    assert [item.label for item in unlabelled.items("train")] == [None] * 5 and unlabelled.classes is None


def saved(array: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


TOKENS = saved(np.arange(48).reshape(3, 16) % 40)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no .npy file of tokens"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "its header cannot be read"),
        (TOKENS[:-1], "bytes are not the [3, 16] of its header"),
        (TOKENS + b"\0", "bytes are not the [3, 16] of its header"),
        (TOKENS.replace(b"(3, 16)", b"(9**9,16)"), "its header cannot be read"),
        (TOKENS.replace(b"(3, 16), }      ", b"(30000000, 16), }"), "are not the [30000000, 16] of its header"),
        (saved(np.array([{}, {}]), allow_pickle=True), "object [2], not tokens"),
        (saved(np.zeros((3, 16))), "float64 [3, 16], not tokens"),
        (saved(np.zeros((3, 16), np.int64, order="F")), "int64 [3, 16], not tokens"),
        (saved(np.zeros((3, 4, 4), np.int64)), "int64 [3, 4, 4], not tokens"),
        (saved(np.zeros((0, 16), np.int64)), "int64 [0, 16], not tokens"),
        (saved(np.zeros((3, 15), np.int64)), "images of 15 tokens, no squares"),
        (saved(np.zeros(16, np.int64)), "no squares"),
        (saved(np.zeros((1, 2048**2), np.uint8)), "no squares"),
    ],
)
def test_hostile_arrays_are_refused(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(data)
    assert told in refusal(lambda: opened(path))


@pytest.mark.parametrize("tokens", [40, 65535, -1])
def test_tokens_of_another_palette_are_refused(tmp_path: Path, tokens: int) -> None:
    np.save(tmp_path / "tokens.npy", np.full((2, 4), tokens))
    source = opened(tmp_path / "tokens.npy")
    assert f"image 1 has tokens from {tokens} to {tokens}, but the palette has 40" in refusal(
        lambda: source.read("tokens/0000001")
    )


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, -1, 2]),
        np.array([0.0, 1.0, 2.0]),
        np.full((3, 4), 0.25),
        np.array([[1, 0], [1, 1], [0, 1]]),
        np.array([[1, 0], [0, 0], [0, 1]]),
        np.array([[1, 0], [0, np.nan], [0, 1]]),
        np.array([0, 1, 1 << 40]),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    (tmp_path / "tokensX.npy").write_bytes(TOKENS)
    np.save(tmp_path / "tokensY.npy", labels)
    assert "labels that are no class numbers, nor one-hot" in refusal(lambda: opened(tmp_path / "tokensX.npy"))


def test_other_faults(released: Path, tmp_path: Path) -> None:
    def told(*paths: Path, palette: Palette | None = PALETTE, **options: str) -> str:
        return refusal(lambda: open_source("token_arrays", [str(path) for path in paths], options, lambda: palette))

    assert "holds tokens, no colours: give their palette to igpt-data shards" in told(released, palette=None)
    twice = np.array(PALETTE.colours)
    twice[7] = twice[3]
    assert "no 8-bit colour is nearest to the palette's colour 7" in told(released, palette=Palette(twice))
    assert "no arrays *_trX.npy" in told(tmp_path)
    assert "no such pool" in told(released, pool="val")
    assert "of 3 arrays: give one," in told(released, labels=str(released / "pets_teY.npy"))
    np.save(released / "pets_vaY.npy", np.arange(7))
    assert "7 labels for 8 images" in told(released)
    (released / "pets_vaY.npy").unlink()
    assert "pets_vaY.npy: missing, but other arrays have labels" in told(released)
    np.save(released / "cars_teX.npy", np.zeros((2, 16), np.int64))
    assert "arrays of cars, pets: give the files of one data set" in told(released)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises((UserError, OSError), match=r"pipe\.npy"):
        opened(tmp_path / "pipe.npy")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    few = {"classes": str(tmp_path / "names.txt")}
    assert "2 names for 3 classes" in told(released / "pets_teX.npy", **few)
    assert "have no labels" in told(released / "pets_teX.npy", labels="none", **few)
    np.save(released / "larger.npy", np.zeros((2, 25), np.int64))
    assert "no squares of one size" in told(released / "pets_teX.npy", released / "larger.npy", labels="none")


@pytest.mark.parametrize("words", [["--resolution", "4"], ["--no-crop"], ["--no-crop", "--resolution", "8"]])
def test_images_of_tokens_are_neither_cropped_nor_scaled(released: Path, tmp_path: Path, words: list[str]) -> None:
    PALETTE.save(tmp_path / "palette.npy")
    command = ["shards", "token_arrays", released, "--palette", tmp_path / "palette.npy", *words]
    told = refused(*command, "--out", tmp_path / "data")
    assert "4 x 4 tokens, which are taken as they are: add --no-crop --resolution 4" in told
    assert not (tmp_path / "data").exists()
