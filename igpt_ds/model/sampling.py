"""Tokens from an auto-regressive model, one position at a time, with a key/value cache.

Each image has one uniform number a position from a generator of its own, and takes the colour in whose part of the
cumulative distribution that number falls: an image is the same in any batch and on any number of ranks, and nothing
else in the process is drawn from.

Suffixes: B images, T tokens given, n tokens of an image, K colours.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from igpt_ds.errors import UserError
from igpt_ds.hashing import stable_hash
from igpt_ds.model.decoding import one_token_step
from igpt_ds.model.transformer import Cache, ImageGPT
from igpt_ds.text import listed

MOST_IMAGES = 64  # drawn at once; more at once need no less time each


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from what the model says.

    Attributes:
        seed: image i has a generator of its own, seeded by (seed, i).
        temperature: divides the logits; 0, or what float32 cannot tell from it, takes the likeliest token.
        top_k: only so many of the likeliest tokens (and those as likely as the last of them); None: all.
        top_p: of these only the likeliest whose probabilities together reach it (Holtzman et al. 2020).
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: is no finite number from 0 up: choose 1, or 0 for the likeliest"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k {self.top_k}: leaves no token to draw: choose 1 or more, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: is not in (0, 1]: choose e.g. 0.9, or leave it out")


def probabilities(logits_BK: Tensor, drawing: Drawing) -> Tensor:
    """The distribution that tokens are drawn from, float32 [B, K]; the temperature must be above 0."""
    scores_BK = logits_BK.float()
    # From the largest down, so that a low temperature gives -inf, whose probability is 0, and no inf.
    scores_BK = (scores_BK - scores_BK.amax(dim=1, keepdim=True)) / drawing.temperature
    if drawing.top_k is not None and drawing.top_k < scores_BK.shape[1]:
        least_B1 = scores_BK.topk(drawing.top_k, dim=1).values[:, -1:]
        scores_BK = scores_BK.masked_fill(scores_BK < least_B1, -math.inf)
    p_BK = scores_BK.softmax(dim=1)
    if drawing.top_p < 1:
        sorted_BK, order_BK = p_BK.sort(dim=1, descending=True, stable=True)
        # A token stays while those before it do not reach the sum; the likeliest always does.
        stays_BK = sorted_BK.cumsum(dim=1) - sorted_BK < drawing.top_p
        stays_BK[:, 0] = True
        p_BK = torch.zeros_like(p_BK).scatter(1, order_BK, sorted_BK * stays_BK)
        p_BK /= p_BK.sum(dim=1, keepdim=True)
    return p_BK


def draw(logits_BK: Tensor, uniform_B: Tensor, drawing: Drawing) -> Tensor:
    """One token an image, int64 [B], from numbers in [0, 1), float64 [B], by the inverse distribution function."""
    if drawing.temperature < torch.finfo(torch.float32).tiny:
        return logits_BK.argmax(dim=1)
    sums_BK = probabilities(logits_BK, drawing).double().cumsum(dim=1)
    found_B1 = torch.searchsorted(sums_BK, uniform_B[:, None] * sums_BK[:, -1:], right=True)
    # Beyond the last colour only where logits are not finite, which `sample` tells.
    return found_B1.squeeze(1).clamp(max=logits_BK.shape[1] - 1)


def uniforms(seed: int, first: int, images: int, tokens: int) -> Tensor:
    """Numbers in [0, 1) for the images first, first + 1, ...: float64 [images, tokens], on the CPU."""
    # torch's CPU generator looks at 32 bits of its seed: different ones for all images of a seed.
    generators = (torch.Generator().manual_seed((stable_hash(seed) + first + i) & 0xFFFFFFFF) for i in range(images))
    rows = [torch.rand(tokens, dtype=torch.float64, generator=generator) for generator in generators]
    return torch.stack(rows) if rows else torch.empty(0, tokens, dtype=torch.float64)


def images_at_once(model: ImageGPT, memory: int) -> int:
    """How many images may be drawn at once if their keys and values are to take no more bytes than that; 0: none."""
    each = 2 * len(model.blocks) * model.sequence_length * model.width * model.token_embedding.element_size()
    return min(MOST_IMAGES, memory // each)


@torch.no_grad()
def sample(
    model: ImageGPT,
    prefix_BT: Tensor,
    drawing: Drawing,
    first: int = 0,
    title: str | None = "samples",
    network: Callable[..., Any] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw the tokens that follow each prefix.

    Args:
        prefix_BT: int64 [B, T] with 0 ≤ T ≤ n; the first T tokens of every image.
        first: the number of the first of these images, by which it has its own random numbers.
        title: of the progress bar; None shows none.
        network: what is called in place of `model`, DeepSpeed's engine around it.
        beat: called before every position.

    Returns:
        int64 [B, n] on the CPU, beginning with the prefix; -1 throughout an image for which the network gave logits
        that are not finite. That is no exception, since other ranks may be in step with this one.
    """
    if not model.causal:
        raise UserError("sample: this is a BERT model: only next_pixel models draw images token by token")
    images, given = prefix_BT.shape
    n, device = model.sequence_length, model.token_embedding.device
    uniform_Bn = uniforms(drawing.seed, first, images, n).to(device)
    tokens_Bn = torch.empty(images, n, dtype=torch.int64, device=device)
    tokens_Bn[:, :given] = prefix_BT
    finite_B = torch.ones(images, dtype=torch.bool, device=device)
    cache = Cache(model, images)
    hidden = None if title else True
    # DeepSpeed's engine takes the steps one by one, as any other call; so does a network whose blocks come and go.
    plain = network is not None or hasattr(model, "hf_device_map")
    with nullcontext() if plain else one_token_step(model, cache) as step:
        for position in tqdm(range(given, n), desc=title, unit=" tokens", leave=False, disable=hidden):
            beat()
            last_B1 = tokens_Bn[:, position - 1 : position]
            if position > given and step is not None:
                logits_BK = step(last_B1, position)
            else:
                chunk_BT = tokens_Bn[:, :given] if position == given else last_B1
                logits_BK = (network or model)(chunk_BT, cache=cache).logits_BTK[:, -1]
            finite_B &= torch.isfinite(logits_BK).all(dim=1)
            tokens_Bn[:, position] = draw(logits_BK, uniform_Bn[:, position], drawing)
    tokens_Bn[~finite_B] = -1
    return tokens_Bn.cpu()


def not_finite(tokens_Bn: Tensor) -> str:
    """What to say of images that `sample` could not draw; "": there are none."""
    bad = torch.nonzero(tokens_Bn[:, -1] < 0).flatten().tolist()
    return f"the network's logits are not finite (images {listed(bad)})" if bad else ""
