"""Tokens from an auto-regressive model, one position at a time, with a key/value cache."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from igpt_ds.errors import UserError
from igpt_ds.hashing import stable_hash
from igpt_ds.model import Cache, ImageGPT


@torch.no_grad()
def sample(
    model: ImageGPT, prefix_BT: Tensor, seed: int, temperature: float = 1.0, first: int = 0, title: str = "samples"
) -> Tensor:
    """Draw the tokens that follow each prefix.

    Args:
        prefix_BT: int64 [B, T] with 0 ≤ T < n; the first T tokens of every image.
        seed: image i has a generator of its own, seeded by (seed, first + i), so it is the same in any batch.
        temperature: divides the logits; 0 takes the most likely token.

    Returns:
        int64 [B, n], beginning with the prefix.

    Raises:
        UserError: a BERT model, which gives no order to draw in; a negative temperature.
    """
    if not model.causal:
        raise UserError("sample: this is a BERT model: only next_pixel models draw images token by token")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: is no finite number from 0 up: choose 1, or 0 for the likeliest")
    images, given = prefix_BT.shape
    # torch's CPU generator looks at 32 bits of its seed: different ones for all images of a seed.
    seeds = [(stable_hash(seed) + first + i) & 0xFFFFFFFF for i in range(images)]
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    tokens_BT = torch.empty(images, model.sequence_length, dtype=torch.int64)
    tokens_BT[:, :given] = prefix_BT
    cache = Cache(model, images)
    chunk_BT = prefix_BT.to(model.head.weight.device)
    for position in tqdm(range(given, model.sequence_length), desc=title, unit=" tokens", leave=False, disable=None):
        output = model(chunk_BT, cache=cache)
        tokens_BT[:, position] = _draw(output.logits_BTK[:, -1].float().cpu(), temperature, generators)
        chunk_BT = tokens_BT[:, position : position + 1].to(chunk_BT.device)
    return tokens_BT


def _draw(logits_BK: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    if temperature == 0:
        return logits_BK.argmax(dim=1)
    probabilities_BK = torch.softmax(logits_BK / temperature, dim=1)
    rows = zip(probabilities_BK, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
