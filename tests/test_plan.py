"""The arithmetic of a run against torch's own FLOP counter and the paper's size of the job."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt_ds import plan
from igpt_ds.config import load_config
from igpt_ds.ds_config import Division
from igpt_ds.model import ImageGPT, initialise
from igpt_ds.objectives import next_pixel

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
    assert counted - unneeded == images * plan.flops_per_image(config)


def test_the_size_of_the_xl_job() -> None:
    xl = load_config("xl")
    images = xl.training.steps * xl.training.batch
    assert images * xl.sequence_length == pytest.approx(5.2e11, rel=0.01)
    assert images * plan.flops_per_image(xl) == pytest.approx(2.4e22, rel=0.03)


def test_six_flops_a_parameter_and_token_with_attention_beside_it() -> None:
    xl = load_config("xl")
    d, layers, n = 3072, 60, 4096
    parameters = 12 * layers * d * d + 512 * d
    causal = n * (6 * parameters + 6 * layers * n * d)
    assert plan.flops_per_image(xl) == causal
    bert = load_config("xl", ["objective.name=masked_pixel"])
    assert plan.flops_per_image(bert) == causal + n * 6 * layers * n * d


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_the_peak_is_found_by_name(name: str, tera: int) -> None:
    assert plan.peak_flops(name) == tera * 1e12


# An L40 is no L4, and an A1000 no A100.
@pytest.mark.parametrize("name", ["", "cpu", "NVIDIA T4", "NVIDIA L40", "NVIDIA A10", "NVIDIA RTX A1000"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert plan.peak_flops(name) is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_states_are_divided_as_the_stage_says(stage: int, world: int, precision: str) -> None:
    config = load_config("xl", [f"training.precision={precision}"])
    count = plan.parameter_count(config)
    memory = plan.bytes_per_rank(config, stage, Division(world, 1, 64 // world))
    weight = 2 if precision == "bfloat16" else 4
    expected = {
        "master_and_moments": 12 * count / world,
        "gradients": 4 * count / (world if stage >= 2 else 1),
        "weights": weight * count / (world if stage == 3 else 1),
    }
    for kind, size in expected.items():
        assert getattr(memory, kind) == pytest.approx(size, abs=16), kind
    assert memory.total == memory.weights + memory.gradients + memory.master_and_moments + memory.activations
    if stage == 3:  # measured: 20 bytes a parameter of the shard in float32, 18 in bfloat16
        states = memory.total - memory.activations
        assert states * world / count == pytest.approx(20 if precision == "float32" else 18, rel=1e-6)


def test_without_zero_there_is_no_master_copy() -> None:
    config = load_config("s")
    memory = plan.bytes_per_rank(config, 0, Division(8, 16, 1))
    assert memory.total - memory.activations == 16 * plan.parameter_count(config)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing() -> None:
    config = load_config("l")
    one, four = (plan.bytes_per_rank(config, 3, Division(8, m, 16 // m)).activations for m in (1, 4))
    assert four == 4 * one
    kept = load_config("l", ["training.activation_checkpointing=none"])
    everything = plan.bytes_per_rank(kept, 3, Division(8, 1, 16)).activations
    # At least the inputs of all blocks with it; every block's inside without.
    inputs = 4 * 1024 * 1536 * 48
    assert inputs < one < everything / 5


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_activations_are_what_the_network_keeps_for_its_backward_pass(checkpointing: str) -> None:
    shape = ["model.layers=6", "model.width=128", "data.resolution=16"]
    config = load_config("s", [*shape, f"training.activation_checkpointing={checkpointing}"])
    model, images = ImageGPT(config), 4
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 512, (images, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens).logits_BTK
        assert logits is not None
        next_pixel.image_losses(logits, tokens, None).mean()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    planned = plan.bytes_per_rank(config, 3, Division(1, images, 1)).activations
    if checkpointing == "full":
        # The plan adds the block that is recomputed.
        measured += 17 * images * 256 * 128 * 4
    assert measured == pytest.approx(planned, rel=0.15 if checkpointing == "full" else 0.03)
