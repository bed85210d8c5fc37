"""Drawing tokens: the cache against the full network and Hugging Face, the distribution against closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.model import decoding
from igpt_ds.model.decoding import one_token_step
from igpt_ds.model.sampling import (
    MOST_IMAGES,
    Drawing,
    draw,
    images_at_once,
    not_finite,
    probabilities,
    sample,
    uniforms,
)
from igpt_ds.model.transformer import SPAN, Cache, ImageGPT, Linear
from tests.helpers.hugging_face import counterpart
from tests.helpers.models import random_model, small_config

pytestmark = pytest.mark.usefixtures("one_thread")

NOTHING = torch.empty(3, 0, dtype=torch.int64)
GREEDY = Drawing(temperature=0)


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    """256 tokens, two spans of a cache."""
    return random_model(small_config("model.heads=4", resolution=16))


@pytest.fixture(scope="module")
def tokens(model: ImageGPT) -> Tensor:
    return torch.randint(0, 8, (3, 256), generator=torch.Generator().manual_seed(1))


# --- the cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks", [[0] + [1] * 255, [37] + [1] * 218, [1, 254], [100, 1, 27, 1, 126], [0, 128, 127], [255]]
)
@torch.no_grad()
def test_cached_logits_are_the_full_networks_at_every_position(
    model: ImageGPT, tokens: Tensor, chunks: list[int]
) -> None:
    assert sum(chunks) == 255  # what the last token would predict is no position of the image
    cache, parts = Cache(model, 3), []
    for chunk in tokens[:, :255].split(chunks, dim=1):
        parts.append(model(chunk, cache=cache).logits_BTK)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits_BTK, rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", [0, 1, 100, SPAN - 1, SPAN, 254])
@torch.no_grad()
def test_steps_of_fixed_shapes_give_the_same_logits(model: ImageGPT, tokens: Tensor, given: int) -> None:
    cache = Cache(model, 3)
    parts, spans = [model(tokens[:, :given], cache=cache).logits_BTK], set()
    for position in range(given + 1, 256):
        spans.add(cache.at(position))
        parts.append(model(tokens[:, position - 1 : position], cache=cache).logits_BTK)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits_BTK, rtol=0, atol=1e-4)
    assert spans == ({128, 256} if given < SPAN - 1 else {256})


@torch.no_grad()
def test_what_is_not_filled_yet_does_not_matter(model: ImageGPT, tokens: Tensor) -> None:
    cache, other = Cache(model, 3), Cache(model, 3)
    for each in (*other.keys, *other.values):
        each.fill_(7.0)
    logits = []
    for each in (cache, other):
        model(tokens[:, :5], cache=each)
        each.at(6)
        logits.append(model(tokens[:, 5:6], cache=each).logits_BTK)
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@torch.no_grad()
@torch._dynamo.config.patch(disable=False)
def test_a_step_compiles_whole_once_a_span(model: ImageGPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def logits(token: Tensor, cache: Cache) -> Tensor:
        return model(token, cache=cache).logits_BTK

    step = torch.compile(logits, backend=count, fullgraph=True, dynamic=False)
    cache = Cache(model, 3)
    parts = [model(tokens[:, :120], cache=cache).logits_BTK]
    for position in range(121, 140):
        cache.at(position)
        parts.append(step(tokens[:, position - 1 : position].clone(), cache))
    expected = model(tokens).logits_BTK[:, :140]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-4)
    assert len(graphs) == 2


@torch.no_grad()
def test_packed_layers_compute_the_same_and_are_taken_back(
    model: ImageGPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    cache = Cache(model, 3)
    model(tokens[:, :9], cache=cache)
    with one_token_step(model, cache) as step:
        assert not any(isinstance(module, Linear) for module in model.modules())
        found = step(tokens[:, 9:10], 10)
    torch.testing.assert_close(found, model(tokens).logits_BTK[:, 10], rtol=0, atol=1e-4)
    assert layers == {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    # Without the memory for them the plain layers serve.
    monkeypatch.setattr(decoding, "available_bytes", lambda: 0)
    with one_token_step(model, cache) as step:
        assert isinstance(model.head, Linear)


# --- what is drawn ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_tokens_are_an_uncached_samplers_and_hugging_faces(model: ImageGPT, tokens: Tensor) -> None:
    drawn = sample(model, tokens[:, :130], GREEDY, title=None)
    plain = tokens[:, :130]
    for position in range(130, 256):
        padded = torch.cat([plain, plain[:, :1]], dim=1)  # what stands at a position does not matter to its logits
        plain = torch.cat([plain, model(padded).logits_BTK[:, position].argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(drawn, plain)
    start = torch.full((3, 1), 8)
    theirs = counterpart(model).generate(
        torch.cat([start, tokens[:, :130]], dim=1), max_new_tokens=126, do_sample=False
    )
    assert torch.equal(drawn, theirs[:, 1:])
    assert torch.equal(drawn[:, :130], tokens[:, :130])
    assert len(drawn[:, 130:].unique()) > 2, "not a comparison of one colour"


@torch.no_grad()
def test_greedy_tokens_from_nothing(model: ImageGPT) -> None:
    drawn = sample(model, NOTHING, GREEDY, title=None)
    assert torch.equal(model(drawn).logits_BTK.argmax(dim=2), drawn)


def test_an_image_depends_on_its_seed_and_number_not_on_the_batch(model: ImageGPT) -> None:
    together = sample(model, NOTHING, Drawing(3), title=None)
    alone = torch.cat([sample(model, NOTHING[:1], Drawing(3), first=i, title=None) for i in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, sample(model, NOTHING, Drawing(4), title=None))
    assert not torch.equal(together[0], together[1])


def test_no_other_generator_is_drawn_from(model: ImageGPT) -> None:
    before = torch.get_rng_state()
    sample(model, NOTHING, Drawing(3), title=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_whole_image_is_given_back(model: ImageGPT, tokens: Tensor) -> None:
    assert torch.equal(sample(model, tokens, Drawing(), title=None), tokens)


P = torch.tensor([[0.1, 0.4, 0.05, 0.2, 0.25], [0.2, 0.2, 0.2, 0.2, 0.2]])


@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        (Drawing(), [0.1, 0.4, 0.05, 0.2, 0.25]),
        (Drawing(temperature=0.5), [0.01, 0.16, 0.0025, 0.04, 0.0625]),
        (Drawing(top_k=1), [0, 1, 0, 0, 0]),
        (Drawing(top_k=3), [0, 0.4, 0, 0.2, 0.25]),
        (Drawing(top_k=9), [0.1, 0.4, 0.05, 0.2, 0.25]),
        (Drawing(top_p=0.39), [0, 1, 0, 0, 0]),
        (Drawing(top_p=0.41), [0, 0.4, 0, 0, 0.25]),
        (Drawing(top_p=0.7), [0, 0.4, 0, 0.2, 0.25]),
        # Of the three likeliest, 0.47, 0.29 and 0.24: the temperature comes first, then k, then p.
        (Drawing(top_k=3, top_p=0.7), [0, 0.4, 0, 0, 0.25]),
        # 0.16 / 0.275 = 0.58 does not reach 0.6.
        (Drawing(temperature=0.5, top_p=0.6), [0, 0.16, 0, 0, 0.0625]),
    ],
)
def test_probabilities_in_closed_form(drawing: Drawing, expected: list[float]) -> None:
    weights = torch.tensor(expected, dtype=torch.float64)
    found = probabilities(P.log() + 3.0, drawing)[0].double()
    torch.testing.assert_close(found, weights / weights.sum(), rtol=0, atol=1e-6)


def test_equally_likely_tokens_stay_together_under_top_k_and_not_under_top_p() -> None:
    assert (probabilities(P.log(), Drawing(top_k=2))[1] > 0).sum() == 5
    assert (probabilities(P.log(), Drawing(top_p=0.5))[1] > 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(temperature=t, top_k=k, top_p=p)
        for t in (0.7, 1.0, 1.8)
        for k in (None, 1, 5, 40)
        for p in (1.0, 0.9, 0.3)
    ],
)
def test_probabilities_are_those_of_hugging_faces_warpers(drawing: Drawing) -> None:
    logits = 2 * torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    ids = torch.zeros(20, 1, dtype=torch.int64)
    expected = TemperatureLogitsWarper(drawing.temperature)(ids, logits) if drawing.temperature != 1 else logits
    if drawing.top_k:
        expected = TopKLogitsWarper(drawing.top_k)(ids, expected)
    if drawing.top_p < 1:
        expected = TopPLogitsWarper(drawing.top_p)(ids, expected)
    torch.testing.assert_close(probabilities(logits, drawing), expected.softmax(dim=1), rtol=0, atol=1e-6)


def test_draw_is_the_inverse_of_the_distribution_function() -> None:
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1] + 5e-5
    found = draw(P[:1].log().expand(len(uniform), -1), uniform, Drawing())
    assert (found.diff() >= 0).all()
    assert torch.bincount(found).tolist() == pytest.approx([1000, 4000, 500, 2000, 2500], abs=1)
    kept = draw(P[:1].log().expand(len(uniform), -1), uniform, Drawing(top_k=3))
    assert set(kept.tolist()) == {1, 3, 4}
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(P[:1].log().expand(2, -1), ends, Drawing(top_k=3)).tolist() == [1, 4]
    # A network that diverges must not end the training that looks at it.
    assert draw(torch.full((2, 5), math.nan), ends, Drawing()).max() < 5


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-45, 1e-39, 1e-30, 1e-4])
@pytest.mark.parametrize("rest", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_low_temperature_takes_the_likeliest_token(temperature: float, rest: dict[str, Any]) -> None:
    logits = 40 * torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits, uniform, Drawing(0, temperature, **rest)), logits.argmax(dim=1))


@pytest.mark.parametrize("drawing", [Drawing(top_p=5e-324), Drawing(top_p=1e-30), Drawing(top_k=1)])
def test_the_likeliest_token_always_stays(drawing: Drawing) -> None:
    assert probabilities(P.log(), drawing)[0].tolist() == [0, 1, 0, 0, 0]


def test_a_temperature_beyond_float32_makes_all_as_likely() -> None:
    torch.testing.assert_close(probabilities(P.log(), Drawing(temperature=1e308)), torch.full((2, 5), 0.2))


@pytest.mark.parametrize("drawing", [Drawing(), GREEDY])
def test_an_image_whose_logits_are_not_finite_is_told(drawing: Drawing) -> None:
    model = random_model(small_config())
    given = torch.tensor([[1, 2], [1, 3], [2, 2]])
    before = sample(model, given, drawing, title=None)
    assert not not_finite(before)
    with torch.no_grad():
        model.token_embedding[3] = math.nan
    drawn = sample(model, given, drawing, title=None)
    touched = (before[:, :-1] == 3).any(dim=1)
    assert touched[1]
    assert (drawn[touched] == -1).all() and torch.equal(drawn[~touched], before[~touched])
    assert not_finite(drawn).endswith(f"(images {', '.join(map(str, touched.nonzero().flatten().tolist()))})")


@pytest.mark.parametrize("drawing", [Drawing(0, 2.0), Drawing(0, 2.0, top_k=5), Drawing(0, 4.0, top_p=0.8)])
def test_first_tokens_follow_the_networks_distribution(drawing: Drawing) -> None:
    model = random_model(small_config())
    count = 4000
    first = sample(model, torch.empty(count, 0, dtype=torch.int64), drawing, title=None)[:, 0]
    with torch.no_grad():
        logits = model(torch.zeros(1, 16, dtype=torch.int64)).logits_BTK[:, 0]
    p = probabilities(logits, drawing)[0].double()
    seen = torch.bincount(first, minlength=8).double()
    assert (seen[p == 0] == 0).all()
    possible = p > 0

    def chi2(p: Tensor) -> float:
        expected = p[possible] * count / p[possible].sum()
        return float(((seen[possible] - expected) ** 2 / expected).sum())

    assert possible.sum() >= 3
    assert chi2(p) < 24.3  # 99.9 % quantile with 7 degrees of freedom; fewer have a lower one
    assert chi2(logits.double().softmax(dim=1)[0]) > 24.3, "the temperature must matter"


def test_uniform_numbers_are_an_images_own() -> None:
    found = uniforms(7, 2, 5, 100)
    assert found.dtype == torch.float64 and found.shape == (5, 100)
    assert torch.equal(found[1:3], uniforms(7, 3, 2, 100))
    assert len(found.unique()) == 500 and found.min() >= 0 and found.max() < 1
    assert torch.equal(found[:, :30], uniforms(7, 2, 5, 100)[:, :30])
    assert not torch.equal(found, uniforms(8, 2, 5, 100))


# --- many images -----------------------------------------------------------------------------------------------


def test_images_at_once_fit_the_memory(model: ImageGPT) -> None:
    each = sum(part.nbytes for part in (*Cache(model, 1).keys, *Cache(model, 1).values))
    assert images_at_once(model, 5 * each + 1) == 5
    assert images_at_once(model, each - 1) == 0
    assert images_at_once(model, 10**15) == MOST_IMAGES


def test_one_rank_draws_all() -> None:
    prefix = torch.arange(6).view(3, 2)
    found = Ranks().share_rows(lambda rows, first: rows + 10 * first, prefix)
    assert torch.equal(found, prefix)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_k": -3}, "--top-k -3"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.01}, "--top-p 1.01"),
        ({"top_p": math.nan}, "--top-p nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Drawing(**values)  # type: ignore[arg-type]


def test_a_bert_model_draws_nothing() -> None:
    with pytest.raises(UserError, match="BERT"):
        sample(random_model(small_config("objective.name=masked_pixel")), NOTHING, Drawing())
