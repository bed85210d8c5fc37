"""Initial weights: the paper's distributions, and that only seed, name and shape decide them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from igpt_ds.config.file import load_config
from igpt_ds.model.transformer import ImageGPT, initialise

WIDTH, LAYERS = 256, 3


def build(seed: int = 0, layers: int = LAYERS, width: int = WIDTH, objective: str = "next_pixel") -> ImageGPT:
    shape = [f"model.layers={layers}", f"model.width={width}", "model.heads=4", "data.resolution=16"]
    model = ImageGPT(load_config("tiny", [*shape, "data.palette_size=512", f"objective.name={objective}"]))
    initialise(model, seed)
    return model


def weights(model: ImageGPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected_deviation(name: str) -> float:
    """The released code's standard deviations."""
    if name in ("token_embedding", "start") or ".mlp." in name:
        return 0.02
    if name == "position_embedding":
        return 0.01
    if name.endswith("attention.qkv.weight"):
        return 1 / math.sqrt(WIDTH)
    assert name.endswith("attention.out.weight")
    return 1 / math.sqrt(WIDTH * LAYERS)


def test_each_kind_of_parameter_has_its_distribution() -> None:
    drawn = 0
    for name, parameter in weights(build()).items():
        if name.endswith("gain"):
            assert (parameter == 1).all()
        elif name == "head.weight":
            assert (parameter == 0).all()
        else:
            drawn += 1
            count, sigma = parameter.numel(), expected_deviation(name)
            values = parameter.double().flatten() / sigma
            # 5 standard errors of a normal sample's mean, deviation and share within one sigma.
            assert abs(values.mean()) < 5 / math.sqrt(count), name
            assert abs(values.std() - 1) < 5 / math.sqrt(2 * count), name
            share = math.erf(1 / math.sqrt(2))
            assert abs((values.abs() < 1).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / count), name
    assert drawn == 3 + 4 * LAYERS


def test_the_same_seed_gives_the_same_weights_whatever_came_before() -> None:
    first = weights(build())
    torch.manual_seed(99)
    torch.rand(7)
    again = weights(build())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_order_of_construction_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first, model = weights(build()), build(seed=1)
    backwards = list(model.named_parameters())[::-1]
    monkeypatch.setattr(model, "named_parameters", lambda: iter(backwards))
    initialise(model, seed=0)
    assert all(torch.equal(first[name], parameter) for name, parameter in backwards)


def test_shared_names_have_the_same_weights_at_any_depth_and_for_both_objectives() -> None:
    first = weights(build())
    deeper = weights(build(layers=12))
    for name, parameter in first.items():
        if name.endswith("attention.out.weight"):
            torch.testing.assert_close(deeper[name] * 2, parameter)  # 1/sqrt(d L): 12 layers, not 3
        else:
            assert torch.equal(deeper[name], parameter), name
    bert = weights(build(objective="masked_pixel"))
    assert set(first) - set(bert) == {"start"}
    assert all(torch.equal(first[name], parameter) for name, parameter in bert.items())


@pytest.mark.parametrize("seed", [1, 2, 2**31, 2**32, 2**32 + 1, 2**63 - 1])
def test_another_seed_gives_other_weights(seed: int) -> None:
    first, other = weights(build(width=64)), weights(build(seed=seed, width=64))
    for name in first:
        if not name.endswith("gain") and name != "head.weight":
            correlation = torch.corrcoef(torch.stack([first[name].flatten(), other[name].flatten()]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(first[name].numel()), name


def test_no_two_parameters_share_their_numbers() -> None:
    # The head of each parameter's stream, up to its scale, at the depth of the largest preset.
    heads = set()
    drawn = 0
    for name, parameter in weights(build(layers=60, width=16)).items():
        if not name.endswith("gain") and name != "head.weight":
            head = parameter.double().flatten()[:8]
            heads.add(tuple((head / head.norm()).mul(1e4).round().tolist()))
            drawn += 1
    assert len(heads) == drawn == 3 + 4 * 60


def test_parameters_are_gathered_one_at_a_time() -> None:
    model = build(seed=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    open_now: list[str] = []
    gathered: list[str] = []

    @contextmanager
    def gather(parameter: Tensor) -> Iterator[None]:
        assert not open_now
        open_now.append(names[id(parameter)])
        yield
        gathered.append(open_now.pop())

    initialise(model, 0, gather)
    assert gathered == list(names.values())
    first = weights(build())
    assert all(torch.equal(first[name], parameter) for name, parameter in weights(model).items())


def test_parameters_that_are_given_stay_as_they_are() -> None:
    first, model = weights(build()), build(seed=1)
    given = {name for number, name in enumerate(first) if number % 2}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model, 0, given=given)
    for name, parameter in weights(model).items():
        assert parameter.isnan().all() if name in given else torch.equal(parameter, first[name]), name
