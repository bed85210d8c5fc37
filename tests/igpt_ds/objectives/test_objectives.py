"""The objectives against closed forms in float64, and the BERT mask as a pure function."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.objectives import load_objective, masked_pixel, next_pixel

IMAGES, TOKENS, COLOURS = 5, 16, 11


def bert_config(*overrides: str) -> Config:
    data = ["data.resolution=4", f"data.palette_size={COLOURS}"]
    return load_config("tiny", ["objective.name=masked_pixel", *data, *overrides])


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, K], tokens [B, T], mask [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(IMAGES, TOKENS, COLOURS, generator=generator) * 3
    tokens = torch.randint(COLOURS, (IMAGES, TOKENS), generator=generator)
    return logits, tokens, torch.rand(IMAGES, TOKENS, generator=generator) < 0.4


def nats_by_hand(logits: Tensor, tokens: Tensor) -> np.ndarray:
    """-ln softmax(logits)[token] of each position, in float64."""
    exponentials = np.exp(logits.double().numpy())
    probabilities = exponentials / exponentials.sum(axis=2, keepdims=True)
    images, positions = np.indices(tokens.shape)
    return -np.log(probabilities[images, positions, tokens.numpy()])


def test_objectives_are_found_by_name() -> None:
    assert load_objective(bert_config().objective.name) is masked_pixel
    assert load_objective(load_config("s").objective.name) is next_pixel


def test_next_pixel_is_the_mean_negative_log_likelihood() -> None:
    logits, tokens, _ = random_case()
    losses = next_pixel.image_losses(logits, tokens, None)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), nats_by_hand(logits, tokens).mean(axis=1), rtol=1e-6)
    assert next_pixel.mask(tokens, torch.arange(IMAGES), bert_config().seed, bert_config().objective.mask_rate) is None


def test_next_pixel_of_half_precision_logits_is_summed_in_float32() -> None:
    logits, tokens, _ = random_case()
    losses = next_pixel.image_losses(logits.bfloat16(), tokens, None)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), nats_by_hand(logits.bfloat16(), tokens).mean(axis=1), rtol=1e-6)


def test_masked_pixel_is_the_mean_over_the_mask_of_each_image() -> None:
    logits, tokens, mask = random_case()
    nats = nats_by_hand(logits, tokens)
    expected = [nats[i, mask[i].numpy()].mean() for i in range(IMAGES)]
    losses = masked_pixel.image_losses(logits, tokens, mask)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    # An image counts once, however many of its tokens are masked.
    assert abs(losses.mean().item() - nats[mask.numpy()].mean()) > 1e-3


def test_logits_outside_the_mask_count_nothing() -> None:
    logits, tokens, mask = random_case()
    logits.requires_grad_()
    masked_pixel.image_losses(logits, tokens, mask).mean().backward()
    assert ((logits.grad.abs().sum(dim=2) > 0) == mask).all()


def test_an_empty_mask_gives_zero_and_no_nan() -> None:
    logits, tokens, mask = random_case()
    mask[2] = False
    logits.requires_grad_()
    losses = masked_pixel.image_losses(logits, tokens, mask)
    assert losses[2] == 0
    losses.mean().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[2] == 0).all()
    # The others still weigh one part in IMAGES each.
    alone = logits.detach()[:1].requires_grad_()
    masked_pixel.image_losses(alone, tokens[:1], mask[:1]).sum().backward()
    torch.testing.assert_close(logits.grad[0], alone.grad[0] / IMAGES)


def draw(positions: list[int], *overrides: str, tokens: int = TOKENS) -> Tensor:
    image = torch.zeros(len(positions), tokens, dtype=torch.int64)
    return masked_pixel.mask(
        image, torch.tensor(positions), bert_config(*overrides).seed, bert_config(*overrides).objective.mask_rate
    )


def test_the_mask_is_a_function_of_seed_and_position_alone() -> None:
    masks = draw([3, 70_000, 3, 5, 2**40])
    assert masks.shape == (5, TOKENS)
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0], masks[2])
    torch.manual_seed(1)
    assert torch.equal(draw([3, 70_000, 3, 5, 2**40]), masks)
    for i, position in enumerate([3, 70_000, 3, 5, 2**40]):  # whatever else is in the batch
        assert torch.equal(draw([position])[0], masks[i])
    other_tokens = torch.full((1, TOKENS), 7)
    assert torch.equal(
        masked_pixel.mask(other_tokens, torch.tensor([3]), bert_config().seed, bert_config().objective.mask_rate)[0],
        masks[0],
    )


def test_the_mask_is_the_same_for_ever() -> None:
    # Written out in plain integers: a run that a later version resumes must hide the same tokens.
    full = (1 << 64) - 1

    def mixed(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) & full
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        return z ^ (z >> 31)

    expected = [
        [mixed(mixed(position ^ mixed(7)) ^ mixed(token)) / 2**64 < 0.15 for token in range(TOKENS)]
        for position in (0, 1, 12345)
    ]
    assert draw([0, 1, 12345], "seed=7").tolist() == expected
    assert [i for i, masked in enumerate(expected[2]) if masked] == [0, 2, 4]


@pytest.mark.parametrize("other", [["seed=1"], ["seed=4294967296"], ["seed=9223372036854775807"]])
def test_other_positions_and_seeds_give_independent_masks(other: list[str]) -> None:
    n = 10_000
    first = draw([0], tokens=n)[0]
    for mask in (draw([1], tokens=n)[0], draw([2**32], tokens=n)[0], draw([0], *other, tokens=n)[0]):
        both = (first & mask).double().mean().item()
        expected = 0.15**2
        assert abs(both - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.999])
def test_the_rate_is_the_configured_one(rate: float) -> None:
    # A million draws: 1000 images of 1000 tokens.
    masks = draw(list(range(1000)), f"objective.mask_rate={rate}", tokens=1000).double()
    sigma = math.sqrt(rate * (1 - rate) / masks.numel())
    assert abs(masks.mean().item() - rate) < 4 * sigma
    # No position of an image is preferred, nor any image.
    for share in (masks.mean(dim=0), masks.mean(dim=1)):
        assert (share - rate).abs().max() < 5 * sigma * math.sqrt(1000)
