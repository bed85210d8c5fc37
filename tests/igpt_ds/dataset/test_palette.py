"""The palette against brute force, k-d tree and the released convention."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError


def brute_force(colours: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    x = rgb.astype(np.float64) / 127.5 - 1.0
    parts = np.array_split(x, max(1, len(x) * len(colours) // 2_000_000))
    return np.concatenate([((p[:, None] - colours.astype(np.float64)) ** 2).sum(-1).argmin(1) for p in parts])


def random_palette(k: int, seed: int = 0, spread: float = 1.0) -> Palette:
    return Palette(np.random.default_rng(seed).uniform(-spread, spread, (k, 3)).astype(np.float32))


@pytest.mark.parametrize(("k", "spread"), [(1, 1.0), (2, 1.0), (16, 0.02), (512, 1.0), (2000, 0.3)])
def test_encode_is_the_brute_force_nearest(k: int, spread: float) -> None:
    palette = random_palette(k, k, spread)
    rng = np.random.default_rng(1)
    centre = np.clip(rng.normal(127, 60 * spread + 2, (6000, 3)), 0, 255)
    rgb = np.concatenate([rng.integers(0, 256, (6000, 3)), centre]).astype(np.uint8)
    tokens = palette.encode(rgb)
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, brute_force(palette.colours, rgb))


def test_ties_go_to_the_lowest_index() -> None:
    grid = np.array([[-1, -1, -1], [1, 1, 1], [-1, 1, -1], [1, -1, 1]], np.float32)
    colours = np.concatenate([grid, grid[::-1], np.zeros((3, 3), np.float32)])
    colours = np.concatenate([colours, colours])
    rgb = np.random.default_rng(2).integers(0, 256, (20_000, 3)).astype(np.uint8)
    tokens = Palette(colours).encode(rgb)
    assert np.array_equal(tokens, brute_force(colours, rgb))
    assert tokens.max() < 11  # never the second copy


def test_neighbours_that_float32_cannot_tell_apart() -> None:
    base = np.random.default_rng(8).uniform(-0.9, 0.9, (20, 3)).astype(np.float32)
    colours = np.concatenate([base, base + np.float32(2e-7), base - np.float32(2e-7)])
    rgb = np.random.default_rng(9).integers(0, 256, (20_000, 3)).astype(np.uint8)
    tokens = Palette(colours).encode(rgb)
    assert np.array_equal(tokens, brute_force(colours, rgb))
    assert len(np.unique(tokens)) == 40  # the two outer ones of each three


def test_all_colours_equal_give_token_zero() -> None:
    palette = Palette(np.full((7, 3), 0.25, np.float32))
    rgb = np.random.default_rng(3).integers(0, 256, (1000, 3)).astype(np.uint8)
    assert not palette.encode(rgb).any()


def test_encode_finds_what_a_kd_tree_finds() -> None:
    palette = random_palette(512, 5)
    rgb = np.random.default_rng(4).integers(0, 256, (50_000, 3)).astype(np.uint8)
    x = rgb / 127.5 - 1.0
    near, index = cKDTree(palette.colours.astype(np.float64)).query(x)
    tokens = palette.encode(rgb)
    mine = np.sqrt(((x - palette.colours[tokens].astype(np.float64)) ** 2).sum(-1))
    assert np.allclose(mine, near, rtol=1e-12, atol=0)
    assert (tokens == index).mean() > 0.9999


def test_encode_keeps_leading_axes_and_decode_inverts_it() -> None:
    levels = np.random.default_rng(5).integers(0, 256, (40, 3)).astype(np.uint8)
    levels = np.unique(levels, axis=0)
    palette = Palette((levels / 127.5 - 1.0).astype(np.float32))
    image = levels[np.random.default_rng(6).integers(0, len(levels), (2, 4, 5))]
    tokens = palette.encode(image)
    assert tokens.shape == (2, 4, 5)
    assert np.array_equal(palette.decode(tokens), image)
    assert palette.decode(tokens).dtype == np.uint8


def test_decode_refuses_tokens_beyond_the_palette() -> None:
    palette = random_palette(4)
    for bad in ([0, 4], [-1, 2]):
        with pytest.raises(UserError, match="do not fit the palette of 4"):
            palette.decode(np.array(bad))


def test_table_is_cached_and_a_damaged_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    palette = random_palette(9)
    rgb = np.random.default_rng(7).integers(0, 256, (500, 3)).astype(np.uint8)
    wanted = palette.encode(rgb)
    (cached,) = (tmp_path / "igpt-ds").iterdir()
    assert palette.sha256 in cached.name
    for damage in (cached.read_bytes()[:1000], b"not an array", b""):
        cached.write_bytes(damage)
        assert np.array_equal(Palette(palette.colours).encode(rgb), wanted)
        assert cached.stat().st_size > 1 << 25
    # The cache is really read.
    monkeypatch.setattr("igpt_ds.dataset.palette.nearest_table", lambda _: pytest.fail("not from the cache"))
    assert np.array_equal(Palette(palette.colours).encode(rgb), wanted)


def test_an_unwritable_cache_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rgb = np.zeros((1, 3), np.uint8)
    assert random_palette(3).encode(rgb).shape == (1,)


def test_save_load_and_pickle_keep_the_identity(tmp_path: Path) -> None:
    palette = random_palette(512)
    palette.save(tmp_path / "palette.npy")
    assert np.load(tmp_path / "palette.npy", allow_pickle=False).dtype == np.float32
    palette.encode(np.zeros((1, 3), np.uint8))
    packed = pickle.dumps(palette)
    assert len(packed) < 20_000  # the colours, not the table
    for again in (Palette.load(tmp_path / "palette.npy"), pickle.loads(packed)):
        assert again.sha256 == palette.sha256
        assert np.array_equal(again.colours, palette.colours)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((4, 3)), "expected float32"),
        (np.zeros((4, 4), np.float32), "expected float32"),
        (np.zeros((0, 3), np.float32), "0 colours"),
        (np.full((4, 3), 1.5, np.float32), "outside"),
        (np.full((4, 3), np.nan, np.float32), "outside"),
        (np.array([{"a": 1}], dtype=object), "not a readable"),
    ],
)
def test_load_refuses_what_is_no_palette(tmp_path: Path, array: np.ndarray, complaint: str) -> None:
    path = tmp_path / "palette.npy"
    np.save(path, array)
    with pytest.raises(UserError, match=complaint) as caught:
        Palette.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_files_that_are_missing_or_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such palette"):
        Palette.load(tmp_path / "none.npy")
    for content in (b"", b"PK\x03\x04 zip", b"\x93NUMPY\x01\x00"):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(UserError, match="not a readable"):
            Palette.load(tmp_path / "bad.npy")
