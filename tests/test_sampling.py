"""Sampling: the cached path draws what the full network says, each image from its own generator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_ds.errors import UserError
from igpt_ds.evals import samples
from igpt_ds.palette import Palette
from igpt_ds.sampling import sample
from igpt_ds.shards import Dataset
from tests.models import random_model, small_config

NOTHING = torch.empty(3, 0, dtype=torch.int64)


def test_greedy_tokens_are_those_of_the_uncached_network() -> None:
    model = random_model(small_config())
    drawn = sample(model, NOTHING, seed=0, temperature=0)
    with torch.no_grad():
        logits = model(drawn).logits_BTK
    assert torch.equal(logits.argmax(dim=2), drawn)


def test_a_prefix_is_kept_and_continued_greedily() -> None:
    model = random_model(small_config())
    prefix = torch.randint(0, 8, (5, 6), generator=torch.Generator().manual_seed(1))
    drawn = sample(model, prefix, seed=0, temperature=0)
    assert torch.equal(drawn[:, :6], prefix)
    with torch.no_grad():
        logits = model(drawn).logits_BTK
    assert torch.equal(logits.argmax(dim=2)[:, 6:], drawn[:, 6:])


def test_an_image_depends_on_its_seed_and_number_not_on_the_batch() -> None:
    model = random_model(small_config())
    together = sample(model, NOTHING, seed=3)
    alone = torch.cat([sample(model, NOTHING[:1], seed=3, first=i) for i in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, sample(model, NOTHING, seed=4))
    assert not torch.equal(together[0], together[1])


def test_first_tokens_follow_the_networks_distribution() -> None:
    config = small_config()
    model = random_model(config)
    count = 4000
    first = sample(model, torch.empty(count, 0, dtype=torch.int64), seed=0, temperature=2.0)[:, 0]
    with torch.no_grad():
        logits = model(torch.zeros(1, 16, dtype=torch.int64)).logits_BTK[0, 0]
    expected = torch.softmax(logits.double() / 2.0, dim=0) * count
    seen = torch.bincount(first, minlength=8).double()
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert chi2 < 24.3  # 99.9 % quantile with 7 degrees of freedom
    wrong = torch.softmax(logits.double(), dim=0) * count
    assert float(((seen - wrong) ** 2 / wrong).sum()) > 24.3, "the temperature must matter"


def test_refusals() -> None:
    with pytest.raises(UserError, match="BERT"):
        sample(random_model(small_config("objective.name=masked_pixel")), NOTHING, seed=0)
    with pytest.raises(UserError, match="temperature"):
        sample(random_model(small_config()), NOTHING, seed=0, temperature=-1.0)


def test_contact_sheet_places_enlarged_pixels() -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[2, 7, 0] = (255, 0, 0)
    sheet = np.asarray(samples.contact_sheet(images, columns=2))
    assert sheet.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    # Image 2 stands in the second row, first column; its lower left pixel is a square of 8.
    assert (sheet[68 + 56 : 68 + 64, 2:10] == (255, 0, 0)).all()
    assert (sheet[68 : 68 + 56, 2:66] == 0).all()
    assert (sheet[:2] == 255).all() and (sheet[66:68] == 255).all()
    assert (sheet[68:, 68:] == 255).all(), "no fourth image"


def test_completions_show_what_was_given_and_the_original(digits: Path) -> None:
    dataset = Dataset.open(digits / "val")
    model = random_model(small_config(resolution=8, palette_size=16))
    sheet = np.asarray(samples.completions(model, dataset, dataset.palette, 3, seed=0, temperature=1.0))
    assert sheet.shape == (3 * 66 + 2, 6 * 66 + 2, 3)
    originals = dataset.palette.decode(dataset.tokens(0)[:3]).reshape(3, 8, 8, 3)
    for row in range(3):
        tiles = [sheet[2 + 66 * row :, 2 + 66 * column :][4:64:8, 4:64:8] for column in range(6)]
        assert np.array_equal(tiles[5], originals[row])
        assert (tiles[0][4:] == samples.HIDDEN).all()
        for tile in tiles[:5]:
            assert np.array_equal(tile[:4], originals[row][:4])
        assert len({tile[4:].tobytes() for tile in tiles[1:5]}) == 4, "four different completions"


def test_completions_refuse_other_data(digits: Path) -> None:
    dataset = Dataset.open(digits / "val")
    model = random_model(small_config(resolution=8, palette_size=16))
    with pytest.raises(UserError, match="ask for at most"):
        samples.completions(model, dataset, dataset.palette, dataset.rows + 1, 0, 1.0)
    other = Palette(-dataset.palette.colours)
    with pytest.raises(UserError, match="another palette"):
        samples.completions(model, dataset, other, 2, 0, 1.0)
    with pytest.raises(UserError, match="tokens"):
        samples.completions(random_model(small_config()), dataset, dataset.palette, 2, 0, 1.0)


def test_png_is_whole_and_more_images_than_a_batch_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, palette = random_model(small_config()), Palette(np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3))
    whole = np.asarray(samples.free_samples(model, palette, 5, seed=1, temperature=1.0))
    monkeypatch.setattr(samples, "BATCH", 2)
    sheet = samples.free_samples(model, palette, 5, seed=1, temperature=1.0)
    assert np.array_equal(np.asarray(sheet), whole)
    samples.save_png(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert np.array_equal(np.asarray(image), whole)
    with pytest.raises(UserError, match="cannot write"):
        samples.save_png(sheet, tmp_path / "sheet.png" / "below.png")
