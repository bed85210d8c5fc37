"""stl10: every name, count, label and pixel; the unlabelled part only when it is asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.source_fixtures import decoded, listed, refusal


@pytest.fixture(scope="module")
def stl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STL-10 with 3 training, 4 test and 5 unlabelled images; pixel values from their coordinates."""
    root = tmp_path_factory.mktemp("stl")
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 4), ("unlabeled", 5)):
        images = np.stack([stl_image(part, i) for i in range(count)])  # [n, row, column, channel]
        with (folder / f"{part}_X.bin").open("wb") as file:
            for image in images:
                for channel in range(3):
                    for column in range(96):
                        file.write(image[:, column, channel].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 3, 2]))
    (folder / "test_y.bin").write_bytes(bytes([2, 2, 1, 3]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    (folder / "fold_indices.txt").write_text("0 1\n")
    return root


def stl_image(part: str, number: int) -> np.ndarray:
    seed = {"train": 0, "test": 1, "unlabeled": 2}[part]
    return np.random.default_rng([seed, number]).integers(0, 256, (96, 96, 3), dtype=np.uint8)


def test_stl10(stl: Path) -> None:
    for path in (stl, stl / "stl10_binary"):
        source = listed("stl10", path)
        assert (source.name, source.classes) == ("stl10", ["airplane", "bird", "car"])
        for pool, expected in (("train", [0, 2, 1]), ("test", [1, 1, 0, 2])):
            items = source.items(pool)  # type: ignore[arg-type]
            assert [tuple(item) for item in items] == [(f"{pool}/{i:06d}", n) for i, n in enumerate(expected)]
            for i, item in enumerate(items):
                assert np.array_equal(decoded(source.read(item.id)), stl_image(pool, i))


def test_stl10_unlabelled_only_when_asked_for(stl: Path) -> None:
    source = listed("stl10", stl, part="unlabeled")
    assert source.classes is None
    assert source.items("test") == []
    items = source.items("train")
    assert [tuple(item) for item in items] == [(f"unlabeled/{i:06d}", None) for i in range(5)]
    assert np.array_equal(decoded(source.read("unlabeled/000004")), stl_image("unlabeled", 4))
    assert len(listed("stl10", stl, part="labelled").items("train")) == 3


def test_faults_of_stl10(stl: Path, tmp_path: Path) -> None:
    assert "choose labelled or unlabeled" in refusal(lambda: listed("stl10", stl, part="all"))
    assert "no such folder" in refusal(lambda: listed("stl10", tmp_path / "none"))
    (tmp_path / "stl10_binary.tar.gz").write_bytes(b"x")
    assert "unpack it" in refusal(lambda: listed("stl10", tmp_path / "stl10_binary.tar.gz"))
    assert "train_X.bin is missing" in refusal(lambda: _without(stl, tmp_path / "a", "train_X.bin"))
    for file, data, told in (
        ("train_y.bin", bytes([1, 2]), "2 labels for 3 images"),
        ("train_y.bin", bytes([0, 1, 2]), "labels outside 1 to 3"),
        ("train_y.bin", bytes([1, 2, 4]), "labels outside 1 to 3"),
        ("train_X.bin", bytes(27647), "no whole number of images"),
        ("train_X.bin", b"", "no whole number of images"),
    ):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(stl, tmp_path / "b")
        (tmp_path / "b/stl10_binary" / file).write_bytes(data)
        assert told in refusal(lambda: listed("stl10", tmp_path / "b").items("train"))


def _without(stl: Path, copy: Path, file: str) -> None:
    shutil.copytree(stl, copy)
    (copy / "stl10_binary" / file).unlink()
    listed("stl10", copy)
