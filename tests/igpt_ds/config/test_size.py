"""The arithmetic of a run against the real network, torch's own FLOP counter and the paper's size of the job."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.file import load_config, presets
from igpt_ds.config.schema import Config
from igpt_ds.config.size import block_parameters, flops_per_image, parameter_count
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.objectives import next_pixel
from igpt_ds.planner.devices import peak_flops
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import activation_bytes, bytes_per_rank

GIB = 2**30
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
    assert peak_flops(name) == tera * 1e12


# An L40 is no L4, and an A1000 no A100.
@pytest.mark.parametrize("name", ["", "cpu", "NVIDIA T4", "NVIDIA L40", "NVIDIA A10", "NVIDIA RTX A1000"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def laid_out(config: Config, stage: int, world: int, **zero: object) -> Layout:
    recipe = config.training
    division = divide_batch(recipe.batch, recipe.micro_batch, world, recipe.sequence_parallel)
    return Layout(config, {"stage": stage, "reduce_bucket_size": 1, **zero}, division, 8)


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_states_are_divided_as_the_stage_says(stage: int, world: int, precision: str) -> None:
    config = load_config("xl", [f"training.precision={precision}", "training.micro_batch=1"])
    count = parameter_count(config)
    memory = bytes_per_rank(laid_out(config, stage, world))
    weight = 2 if precision == "bfloat16" else 4
    expected = {
        "master": 4 * count / world,
        "moments": 8 * count / world,
        # In bfloat16 stage 1 holds those of a micro-batch beside their sum.
        "gradients": 4 * count / (world if stage >= 2 else 1) + (2 * count if (stage, weight) == (1, 2) else 0),
        "parameters": weight * count / (world if stage == 3 else 1),
    }
    for kind, size in expected.items():
        assert getattr(memory, kind) == pytest.approx(size, abs=16), kind
    assert memory.states == sum(getattr(memory, kind) for kind in expected)
    if stage == 3:  # measured: 20 bytes a parameter of the shard in float32, 18 in bfloat16
        assert memory.states * world / count == pytest.approx(20 if precision == "float32" else 18, rel=1e-6)


def test_without_zero_there_is_no_master_copy() -> None:
    config = load_config("s")
    assert bytes_per_rank(laid_out(config, 0, 8)).states == 16 * parameter_count(config)


def test_a_second_copy_within_a_node_and_states_in_the_processors_memory() -> None:
    config = load_config("xl")
    count, cpu = parameter_count(config), {"device": "cpu"}
    plain = bytes_per_rank(laid_out(config, 3, 64))
    grouped = bytes_per_rank(laid_out(config, 3, 64, zero_hpz_partition_size=8))
    assert grouped.total - plain.total == grouped.second_copy == pytest.approx(2 * count / 8, abs=8)
    away = bytes_per_rank(laid_out(config, 3, 64, offload_optimizer=cpu, offload_param=cpu))
    assert (away.states, away.optimizer_step) == (0, 0)
    # Weights, master, moments, gradients as they come and flat.
    assert away.host == pytest.approx((2 + 4 + 8 + 4 + 4) * count / 64, rel=1e-6)
    half = bytes_per_rank(laid_out(config, 2, 64, offload_optimizer=cpu))
    assert half.states == half.parameters == 2 * count


def test_gradients_come_as_activations_go() -> None:
    # Much of both: 48 blocks of activations, and a whole network of gradients.
    config = load_config("l", ["training.activation_checkpointing=none"])
    once = bytes_per_rank(laid_out(config, 0, 128))
    several = bytes_per_rank(laid_out(load_config("l", ["training.micro_batch=1"]), 0, 1))
    assert once.total < once.states + once.activations
    assert once.total >= once.states - once.gradients + max(once.activations, once.gradients)
    # Those of earlier micro-batches are there from the beginning.
    assert several.total == several.states + several.buffers + several.activations


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing() -> None:
    config = load_config("l", ["training.micro_batch=1"])
    four = load_config("l", ["training.micro_batch=4"])
    one, many = (activation_bytes(laid_out(c, 3, 8))[0] for c in (config, four))
    assert many == 4 * one
    everything, some = (
        activation_bytes(laid_out(config, 3, 8).with_training(activation_checkpointing=mode))[0]
        for mode in ("none", "selective")
    )
    # At least the inputs of all blocks with it; every block's inside without; attention's outputs in between.
    unit = 4 * 1024 * 1536
    assert unit * 48 < one < everything / 5
    assert some - one == unit * 47
    assert activation_bytes(laid_out(config, 3, 8).with_training(activation_checkpointing="full"))[0] == one


def test_ranks_that_share_an_image_share_its_activations() -> None:
    config = load_config("xl", ["training.micro_batch=1"])
    alone = activation_bytes(laid_out(config, 3, 64))[0]
    shared = load_config("xl", ["training.micro_batch=1", "training.sequence_parallel=4"])
    assert activation_bytes(laid_out(shared, 3, 64))[0] == pytest.approx(alone / 4, rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_activations_are_what_the_network_keeps_for_its_backward_pass(checkpointing: str) -> None:
    shape = ["model.layers=6", "model.width=128", "data.resolution=16", "training.batch=4"]
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
    planned = activation_bytes(laid_out(config, 3, 1), gpu=False)[0]
    unit = images * 256 * 128 * 4
    # The plan adds the logits and their gradient, and gradients on their way (of 6 units the final norm keeps 3); and
    # the block that is recomputed.
    planned -= 3 * unit + 8 * images * 256 * 512
    if checkpointing == "full":
        measured += 17 * unit
    assert measured == pytest.approx(planned, rel=0.03)
