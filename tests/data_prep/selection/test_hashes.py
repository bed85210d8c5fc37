"""Perceptual hashes, the searches for near and equal images and the exact cut, each against brute force."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from data_prep.selection import duplicates, perceptual_hash
from data_prep.selection.duplicates import exact_duplicates, near_duplicates
from data_prep.selection.perceptual_hash import NearAny, distance, small_grey
from data_prep.selection.perceptual_hash import perceptual_hash as hash_of
from data_prep.selection.ranking import Cut, cut


def families(rng: np.random.Generator, count: int) -> np.ndarray:
    """Hashes of families of near ones, some far larger than others: uint64 [count]."""
    base = rng.integers(0, 2**64, count // 3, dtype=np.uint64)
    hashes = base[rng.integers(0, len(base), count)]
    hashes[:: count // 40] = base[0]
    for i in range(count):
        for bit in rng.integers(0, 64, rng.integers(0, 9)):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    return hashes


def bits_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counted digit by digit: [n], [m] -> [n, m]."""
    return np.array([[bin(int(x) ^ int(y)).count("1") for y in b] for x in a])


def chunked(*arrays: np.ndarray, size: int = 130) -> Iterator[tuple[np.ndarray, ...]]:
    for first in range(0, len(arrays[0]), size):
        yield tuple(array[first : first + size] for array in arrays)


def test_the_hash_is_that_of_the_lowest_cosine_frequencies() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32)).astype(np.uint8)
    order = sorted(((u, v) for u in range(32) for v in range(32)), key=lambda w: (w[0] + w[1], w))[1:65]
    for image, found in zip(images, hash_of(images), strict=True):
        spectrum = dctn(image.astype(float), norm="ortho")
        lowest = np.array([spectrum[w] for w in order])
        assert [int(found) >> bit & 1 for bit in range(64)] == (lowest > np.median(lowest)).tolist()


def test_the_hash_survives_scaling_and_recompression_and_little_else(photos: Path, tmp_path: Path) -> None:
    """On pieces of a flower; what is next to flat, such as sky, has no hash to speak of."""
    originals = [Image.open(path).convert("RGB") for path in sorted((photos / "flower").glob("*.jpg"))]
    hashes = hash_of(np.stack([small_grey(image) for image in originals]))
    moved = []
    for i, image in enumerate(originals):
        image.resize((32, 32), Image.Resampling.BICUBIC).resize((200, 260)).save(tmp_path / f"{i}.jpg", quality=60)
        moved.append(small_grey(Image.open(tmp_path / f"{i}.jpg").convert("RGB")))
    same = np.diag(bits_apart(hashes, hash_of(np.stack(moved))))
    assert (same <= 6).all()
    others = bits_apart(hashes, hashes)[~np.eye(len(hashes), dtype=bool)]
    assert (others <= 6).mean() < 0.01
    assert np.median(others) > 20


def test_flat_images_have_one_hash() -> None:
    assert set(hash_of(np.stack([np.full((32, 32), grey, np.uint8) for grey in (0, 7, 255)])).tolist()) == {0}


@pytest.mark.parametrize("numpy2", [True, False])
def test_distance_counts_bits(numpy2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not numpy2:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    a = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    a[:2] = 0, 2**64 - 1
    assert (distance(a[:, None], a[None]) == bits_apart(a, a)).all()


def test_near_any_finds_what_brute_force_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    known = families(rng, 400)
    # Errors spread evenly are the hardest to find: no piece of the hash is left whole.
    evenly = [np.uint64(1 << 16 * (bit % 4) + 5 * (bit // 4)) for bit in range(10)]
    spread = [np.bitwise_xor.reduce([known[i], *evenly[: i % 10]]) for i in range(100)]
    asked = np.concatenate([known[:100] ^ np.uint64(0b1011 << 14), families(rng, 100), known[:5], spread])
    nearest = bits_apart(asked, known).min(1)
    for budget in (1 << 20, 30):  # pairs compared at a time: a single query may have more
        monkeypatch.setattr(perceptual_hash, "_CANDIDATES", budget)
        for most in range(9):
            assert (NearAny(known, most)(asked) == (nearest <= most)).all(), most
    assert not NearAny(known[:0], 8)(asked).any()
    assert NearAny(known, 3)(asked[:0]).shape == (0,)
    with pytest.raises(ValueError, match="9"):
        NearAny(known, 9)


@pytest.mark.parametrize("memory", [1 << 20, 3000])
def test_near_duplicates_are_those_with_an_earlier_one_near(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MEMORY", memory)
    rng = np.random.default_rng(2)
    hashes = families(rng, 400)
    index = np.sort(rng.choice(10_000, len(hashes), replace=False))
    apart = bits_apart(hashes, hashes)
    for most in range(7):
        found = list(near_duplicates(chunked(hashes, index), len(hashes), most, tmp_path))
        expected = {int(index[j]) for j in range(len(hashes)) if (apart[:j, j] <= most).any()}
        assert set(np.concatenate(found).tolist()) == expected, most
        assert all((np.diff(each) > 0).all() for each in found)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="7"):
        list(near_duplicates(chunked(hashes, index), len(hashes), 7, tmp_path))


@pytest.mark.parametrize("memory", [1 << 20, 3000])
def test_exact_duplicates_are_all_but_the_first(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MEMORY", memory)
    rng = np.random.default_rng(3)
    digests = rng.integers(0, 256, (900, 32)).astype(np.uint8)
    digests[rng.integers(0, 900, 300)] = digests[rng.integers(0, 900, 300)]
    digests[::5] = digests[0]  # one image in very many copies
    digests[1, 31] = digests[2, 31] ^ 1
    digests[1, :31] = digests[2, :31]  # a last byte apart is not equal
    index = np.arange(900) + 17
    found = np.concatenate(list(exact_duplicates(chunked(digests, index), 900, tmp_path)))
    seen: set[bytes] = set()
    expected = []
    for number, digest in zip(index.tolist(), digests, strict=True):
        if digest.tobytes() in seen:
            expected.append(number)
        seen.add(digest.tobytes())
    assert sorted(found.tolist()) == expected
    assert len(expected) > 200


def test_duplicates_take_no_more_memory_for_more_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MEMORY", 1 << 16)
    peaks = []
    for count in (20_000, 80_000):
        rng = np.random.default_rng(4)
        index = np.arange(count)
        hashes = (rng.integers(0, 2**64, 1000, dtype=np.uint64) for _ in range(count // 1000))
        digests = (rng.integers(0, 256, (1000, 32)).astype(np.uint8) for _ in range(count // 1000))
        steps = index.reshape(-1, 1000)
        tracemalloc.start()
        for _ in near_duplicates(zip(hashes, steps, strict=True), count, 1, tmp_path):
            pass
        for _ in exact_duplicates(zip(digests, steps, strict=True), count, tmp_path):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("kind", ["cosines", "ties", "wild"])
def test_the_cut_is_exact(kind: str) -> None:
    rng = np.random.default_rng(5)
    values = {
        "cosines": rng.uniform(-1, 1, 1000),
        "ties": rng.choice([-0.5, -1e-30, 0.0, 1e-30, 0.25], 1000),
        "wild": rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000),
    }[kind].astype(np.float32)
    ordered = np.sort(values)[::-1]
    for number in (1, 2, 17, 500, 998, 999):
        found = cut(lambda: (chunk for (chunk,) in chunked(values)), number)
        assert found is not None
        assert np.float32(found.threshold) == ordered[number - 1]
        assert (values > np.float32(found.threshold)).sum() + found.ties == number
        assert found.ties >= 1
    assert cut(lambda: iter([values]), 1000) is None
    first = values[:2]
    assert cut(lambda: iter([values[:0], first]), 1) == Cut(float(first.max()), 1)
