"""The arithmetic of a run against the real network, torch's own FLOP counter and the paper's size of the job."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt_ds.config.file import load_config, presets
from igpt_ds.config.size import block_parameters, flops_per_image, parameter_count
from igpt_ds.model.transformer import ImageGPT, initialise

SHAPE = ["model.layers=3", "model.width=24", "model.heads=4", "data.resolution=5", "data.palette_size=11"]


@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_flops_equal_what_torch_counts(objective: str) -> None:
    config = load_config("tiny", [*SHAPE, f"objective.name={objective}", "training.activation_checkpointing=none"])
    model = ImageGPT(config)
    initialise(model, 0)
    images = 2
    tokens = torch.zeros(images, config.sequence_length, dtype=torch.int64)
    # The plain attention: the fused one is not counted on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).logits_BTK.sum().backward()
    counted = counter.get_total_flops()
    # It computes, and torch counts, both halves of a causal attention; the model needs one.
    n, d, layers = config.sequence_length, config.model.width, config.model.layers
    unneeded = images * layers * 12 * n * n * d // 2 if config.causal else 0
    assert counted - unneeded == images * flops_per_image(config)


def test_the_size_of_the_xl_job() -> None:
    xl = load_config("xl")
    images = xl.training.steps * xl.training.batch
    assert images * xl.sequence_length == pytest.approx(5.2e11, rel=0.01)
    assert images * flops_per_image(xl) == pytest.approx(2.4e22, rel=0.03)


def test_six_flops_a_parameter_and_token_with_attention_beside_it() -> None:
    xl = load_config("xl")
    d, layers, n = 3072, 60, 4096
    parameters = 12 * layers * d * d + 512 * d
    causal = n * (6 * parameters + 6 * layers * n * d)
    assert flops_per_image(xl) == causal
    bert = load_config("xl", ["objective.name=masked_pixel"])
    assert flops_per_image(bert) == causal + n * 6 * layers * n * d


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("objective", ["next_pixel", "masked_pixel"])
def test_the_parameters_are_those_of_the_real_network(preset: str, objective: str) -> None:
    found = load_config(preset, [f"objective.name={objective}"])
    facts = [] if found.data.resolution else ["data.resolution=8", "data.palette_size=16"]
    classes = load_config(preset, ["finetune.classes=10", *facts])
    for config in (load_config(preset, [f"objective.name={objective}", *facts]), classes):
        with torch.device("meta"):
            model = ImageGPT(config)
        assert parameter_count(config) == sum(p.numel() for p in model.parameters())
        assert block_parameters(config) == sum(p.numel() for p in model.blocks[0].parameters())
