"""Features: against plain forward passes of one image, on several ranks, and from the cache."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.schema import Config
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.features import cache as feature_cache
from igpt_ds.features.cache import Features, cached
from igpt_ds.features.extract import Network, Recipe, extract, load_model, parse_layers, pixels, usual_precision
from igpt_ds.model.transformer import GATE, ImageGPT
from igpt_ds.objectives import masked_pixel
from igpt_ds.weights.base import config_of
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = Recipe((0, 1, 2))
ALONE = Ranks()


def saved(model: ImageGPT, config: Config, run: Path, step: int = 7) -> Checkpoint:
    return Checkpoint.open(save_model(model, config, run, "x", step))


def digits_config(objective: str = "next_pixel") -> Config:
    return small_config(f"objective.name={objective}", resolution=8, palette_size=16)


@torch.no_grad()
def by_hand(model: ImageGPT, tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None, norm: bool) -> list[torch.Tensor]:
    """The definition, block by block: means of n^l (norm) or h^l over the positions, 0 ≤ l ≤ L."""
    h = model._embed(tokens_BT, mask_BT, None)
    found = []
    for block in model.blocks:
        n = block.norm_attention(h)
        found.append((n if norm else h).mean(1))
        a = h + block.attention(n)
        h = a + block.mlp(block.norm_mlp(a, GATE)) / GATE
    return [*found, (model.norm(h) if norm else h).mean(1)]


@pytest.mark.parametrize(("objective", "norm"), [("next_pixel", "first"), ("masked_pixel", "none")])
def test_features_are_those_of_one_image_at_a_time(digits: Path, tmp_path: Path, objective: str, norm: Any) -> None:
    config = digits_config(objective)
    model, dataset = random_model(config), Dataset.open(digits / "val")
    seed = 99 if objective == "masked_pixel" else None
    # 7 does not divide the number of images: the surplus of the last batch must not be counted.
    network = Network(config, saved(model, config, tmp_path), Recipe((0, 1, 2), norm), ALONE, batch=7)
    found = cached(network, dataset, tmp_path / "features", "test", mask_seed=seed)
    assert found is not None and found.layers.shape == (3, dataset.rows, 32) and found.layers.dtype == np.float32
    tokens = torch.from_numpy(dataset.tokens(0).astype(np.int64))
    seeded = small_config(f"objective.name={objective}", "seed=99", resolution=8, palette_size=16)
    for image in (0, 1, dataset.rows - 1):
        one = tokens[image : image + 1]
        mask = masked_pixel.mask(one, torch.tensor([image]), seeded.seed, seeded.objective.mask_rate) if seed else None
        for layer, expected in enumerate(by_hand(model, one, mask, norm == "first")):
            np.testing.assert_allclose(found.of(layer)[image], expected[0], atol=1e-5)
    assert np.array_equal(found.labels, dataset.labels())


def test_chosen_layers_and_a_part_of_the_images(digits: Path, tmp_path: Path) -> None:
    config = digits_config()
    checkpoint, dataset = saved(random_model(config), config, tmp_path), Dataset.open(digits / "val")
    whole = cached(Network(config, checkpoint, ALL, ALONE, batch=16), dataset, tmp_path / "a", "test")
    few = Network(config, checkpoint, Recipe((0, 2)), ALONE, batch=16)
    part = cached(few, dataset, tmp_path / "b", "test", images=20)
    assert whole is not None and part is not None and part.layers.shape == (2, 20, 32)
    np.testing.assert_allclose(part.of(2), whole.of(2)[:20], atol=1e-6)
    assert np.array_equal(part.labels, whole.labels[:20])
    assert np.array_equal(pixels(dataset, 20), pixels(dataset)[:20])


def test_bfloat16_is_near_float32(digits: Path, tmp_path: Path) -> None:
    config = digits_config()
    checkpoint, dataset = saved(random_model(config), config, tmp_path), Dataset.open(digits / "val")
    both = [
        cached(Network(config, checkpoint, Recipe((1, 2), "first", p), ALONE), dataset, tmp_path / "f", "test")
        for p in ("float32", "bfloat16")  # type: ignore[arg-type]
    ]
    exact, rough = (np.asarray(found.layers) for found in both if found)
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 2e-2


def test_float16_keeps_half_the_bytes_and_eleven_bits(digits: Path, tmp_path: Path) -> None:
    config = digits_config()
    checkpoint, dataset = saved(random_model(config), config, tmp_path), Dataset.open(digits / "val")
    exact, rough = (
        cached(Network(config, checkpoint, recipe, ALONE, batch=7), dataset, tmp_path / "f", "test").layers
        for recipe in (Recipe((0, 2)), Recipe((0, 2), store="float16"))
    )
    assert (exact.dtype, rough.dtype) == (np.float32, np.float16) and 2 * rough.nbytes == exact.nbytes
    np.testing.assert_array_equal(rough, exact.astype(np.float16))
    # What has no float16 is no infinity among features.
    model = random_model(config)
    with torch.no_grad():
        model.blocks[0].norm_attention.gain.fill_(1e8)
    large = saved(model, config, tmp_path / "large")
    network = Network(config, large, Recipe((0,), store="float16"), ALONE)
    with pytest.raises(RunError, match=r"not finite.* or float32 in place of float16"):
        cached(network, dataset, tmp_path / "f", "test")


def test_a_gpu_that_computes_in_bfloat16_does_so_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, quick, expected in ((False, True, "float32"), (True, True, "bfloat16"), (True, False, "float32")):

        def supported(including_emulation: bool = True, quick: bool = quick) -> bool:
            return quick or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert usual_precision() == expected


def test_the_next_batch_is_read_while_the_network_is_at_work(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the network has batch k, another thread reads batch k + 1: here it waits until that is read."""
    config, dataset = digits_config(), Dataset.open(digits / "val")
    network = Network(config, saved(random_model(config), config, tmp_path), ALL, ALONE, batch=16)
    read, readers, begun = threading.Semaphore(0), set(), 0
    read_many, features = Dataset.read_many, Network.features

    def noting(self: Dataset, rows: Any) -> np.ndarray:
        readers.add(threading.get_ident())
        found = read_many(self, rows)
        read.release()
        return found

    def waiting(self: Network, tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        nonlocal begun
        begun += 1
        for _ in range(2 if begun == 1 else 1 if begun < 5 else 0):
            assert read.acquire(timeout=20), "nothing is read ahead"
        return features(self, tokens_BT, mask_BT)

    monkeypatch.setattr(Dataset, "read_many", noting)
    monkeypatch.setattr(Network, "features", waiting)
    extract(network, dataset, "test", dataset.rows, None, np.empty((3, dataset.rows, 32), np.float32))
    assert begun == 5 and len(readers) == 1 and threading.get_ident() not in readers


def test_pixels_are_the_palettes_colours(digits: Path) -> None:
    dataset = Dataset.open(digits / "val")
    found = pixels(dataset)
    assert found.shape == (dataset.rows, 3 * 64)
    grey = np.rint((found[5].reshape(8, 8, 3) + 1) * 127.5)
    assert np.array_equal(grey, dataset.palette.decode(dataset.tokens(0)[5]).reshape(8, 8, 3))


def test_loaded_network_is_the_checkpoints(tmp_path: Path) -> None:
    config = digits_config()
    model = random_model(config, seed=5)
    loaded = load_model(config, saved(model, config, tmp_path))
    for mine, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert not loaded.training


def test_layers_are_read_from_text() -> None:
    config = small_config("model.layers=9")
    assert parse_layers(None, config) == tuple(range(10))
    assert parse_layers("7, 1-3,2", config) == (1, 2, 3, 7)
    for text in ("10", "3-1", "x", "-1", "1-", "", "1,,2"):
        if text:
            with pytest.raises(UserError, match="--layers"):
                parse_layers(text, config)


# --- the cache -------------------------------------------------------------------------------------------------


class Cached:
    """Features of the digits' validation split, and how often a network was built for them."""

    def __init__(self, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.dataset, self.folder, self.run = Dataset.open(digits / "val"), tmp_path / "features", tmp_path / "run"
        self.built = 0
        build = Network._build

        def counting(network: Network) -> None:
            self.built += 1
            build(network)

        monkeypatch.setattr(Network, "_build", counting)

    def __call__(self, checkpoint: Checkpoint | None, recipe: Recipe = ALL, **more: Any) -> Features:
        config = config_of(checkpoint) if checkpoint else digits_config()
        found = cached(Network(config, checkpoint, recipe, ALONE), self.dataset, self.folder, "test", **more)
        assert found is not None
        return found


@pytest.fixture
def take(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    return Cached(digits, tmp_path, monkeypatch)


def test_the_second_time_nothing_is_computed(take: Cached) -> None:
    config = digits_config()
    checkpoint = saved(random_model(config), config, take.run)
    first = take(checkpoint)
    again = take(checkpoint)
    assert take.built == 1 and isinstance(again.layers, np.memmap)
    assert np.array_equal(first.layers, again.layers) and np.array_equal(first.labels, again.labels)
    part = take(checkpoint, Recipe((0, 2)))  # of features that hold more layers
    assert take.built == 1 and np.array_equal(part.of(2), first.of(2))
    middle = take(checkpoint, Recipe((1,)))
    assert middle.numbers == (1,) and np.array_equal(middle.of(1), first.of(1))


def test_other_weights_data_masks_or_precision_are_other_features(take: Cached, digits: Path) -> None:
    config = digits_config()
    checkpoint = saved(random_model(config), config, take.run)
    first = take(checkpoint)
    other = take(saved(random_model(config, seed=1), config, take.run))  # the same path and step
    assert not np.allclose(first.layers, other.layers)
    take(None)
    take(checkpoint, images=10)
    take(checkpoint, mask_seed=5)
    take(checkpoint, Recipe((0, 1, 2), "none"))
    take(checkpoint, Recipe((0, 1, 2), "first", "bfloat16"))
    take(checkpoint, Recipe((0, 1, 2), "first", "float32", "float16"))
    take.dataset = Dataset.open(digits / "train")
    take(checkpoint)
    assert take.built == 9 == len(list(take.folder.iterdir()))


def test_features_under_another_checkpoints_name_are_refused(take: Cached) -> None:
    config = digits_config()
    mine = saved(random_model(config), config, take.run)
    take(mine)
    (name,) = [path.name for path in take.folder.iterdir()]
    shutil.rmtree(take.folder)
    take(saved(random_model(config, seed=1), config, take.run, step=8))
    (other,) = take.folder.iterdir()
    other.rename(take.folder / name)
    with pytest.raises(UserError, match=r"features of another checkpoint.*step 8.*delete it"):
        take(mine)


def test_damaged_features_are_refused(take: Cached) -> None:
    config = digits_config()
    checkpoint = saved(random_model(config), config, take.run)
    take(checkpoint)
    (path,) = take.folder.iterdir()
    with (path / "features.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="damaged features"):
        take(checkpoint)


def test_nothing_is_left_where_the_disk_is_full_or_a_feature_is_not_finite(
    take: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits_config()
    model = random_model(config)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        take(saved(model, config, take.run))
    assert list(take.folder.iterdir()) == []
    free = shutil.disk_usage(take.run)._replace(free=1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="GiB of features"):
        take(saved(random_model(config), config, take.run))
    assert list(take.folder.iterdir()) == []


def test_a_rank_that_does_not_see_the_features_says_so(digits: Path, tmp_path: Path) -> None:
    class OnAnotherNode(Ranks):
        def from_rank_0(self, value: Any) -> Any:
            return tmp_path / "features" / "of rank 0"

    config = digits_config()
    network = Network(config, saved(random_model(config), config, tmp_path), ALL, OnAnotherNode(1, 2, 1, 2))
    with pytest.raises(UserError, match="of rank 0: rank 1 does not see it: keep the run where all nodes see it"):
        cached(network, Dataset.open(digits / "val"), tmp_path / "features", "test")


# --- several ranks ---------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_take_the_same_features_whole_and_divided(digits: Path, tmp_path: Path) -> None:
    """60 of 67 images in batches of 7 on each of 2 ranks: a stride of 14 leaves surplus on both."""
    config = digits_config("masked_pixel")
    run = tmp_path / "run"
    checkpoint = saved(random_model(config), config, run)
    run_ranks("tests.workers.features", [str(digits), str(run), str(tmp_path)], 2, limit=200)
    dataset = Dataset.open(digits / "val")
    expected = np.empty((3, 60, 32), np.float32)
    extract(Network(config, checkpoint, ALL, ALONE), dataset, "test", 60, 11, expected)
    for name in ("whole", "divided"):
        (path,) = (tmp_path / name).iterdir()
        np.testing.assert_allclose(np.load(path / "features.npy"), expected, atol=1e-5)
        assert np.array_equal(np.load(path / "labels.npy"), dataset.labels()[:60])
