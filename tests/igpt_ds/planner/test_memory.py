"""Bytes of a rank by kind: closed forms, and what the real network keeps for its backward pass."""

import dataclasses

import pytest
import torch

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.schema import Config
from igpt_ds.config.size import parameter_count
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import next_pixel
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import activation_bytes, bytes_per_rank
from tests.helpers.plans import specified


def laid_out(config: Config, stage: int, world: int, **zero: object) -> Layout:
    recipe = config.training
    division = divide_batch(recipe.batch, recipe.micro_batch, world, recipe.sequence_parallel)
    return Layout(config, {"stage": stage, "reduce_bucket_size": 1, **zero}, division, 8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_states_are_divided_as_the_stage_says(stage: int, world: int, precision: str) -> None:
    config = specified("xl", f"training.precision={precision}", "training.micro_batch=1")
    count = parameter_count(config)
    memory = bytes_per_rank(laid_out(config, stage, world))
    weight = 2 if precision == "bfloat16" else 4
    expected = {
        "master": 4 * count / world,
        "moments": 8 * count / world,
        # Stage 1 sends those in float32 away as they come, where there is one micro-batch (of a batch of 64).
        "gradients": 4 * count / (world if stage >= 2 or (world, weight) == (64, 4) else 1),
        "parameters": weight * count / (world if stage == 3 else 1),
    }
    for kind, size in expected.items():
        assert getattr(memory, kind) == pytest.approx(size, abs=16), kind
    assert memory.states == sum(getattr(memory, kind) for kind in expected)
    if stage == 3:  # measured: 20 bytes a parameter of the shard in float32, 18 in bfloat16
        assert memory.states * world / count == pytest.approx(20 if precision == "float32" else 18, rel=1e-6)


def test_without_zero_there_is_no_master_copy() -> None:
    config = specified("s", "training.precision=float32")
    assert bytes_per_rank(laid_out(config, 0, 8)).states == 16 * parameter_count(config)


def test_a_second_copy_within_a_node_and_states_in_the_processors_memory() -> None:
    config = specified("xl")
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
    config = specified("l", "training.precision=float32", "training.activation_checkpointing=none")
    once = bytes_per_rank(laid_out(config, 0, 128))
    few = specified("l", "training.precision=float32", "training.micro_batch=1")
    several = bytes_per_rank(laid_out(few, 0, 1))
    assert once.total < once.states + once.activations
    assert once.total >= once.states - once.gradients + max(once.activations, once.gradients)
    # Those of earlier micro-batches are there from the beginning; in the end 500 million at a time are copied.
    assert several.total == several.states + max(several.activations, 4 * 500_000_000)


@pytest.mark.parametrize(("stage", "bucket"), [(2, 2), (3, 4)])
def test_the_copy_of_a_bucket_has_the_type_in_which_ranks_sum_up_and_so_has_stage_3s_bucket(
    stage: int, bucket: int
) -> None:
    config = specified("s", "training.batch=8", "training.micro_batch=1")
    usual = laid_out(config, stage, 8, reduce_bucket_size=20_000_000)
    double = dataclasses.replace(usual, summed_in="fp32")
    assert bytes_per_rank(usual).buffers == 2 * 20_000_000
    assert bytes_per_rank(double).buffers == bucket * 20_000_000
    # The peak of stage 2 comes with the copy, that of stage 3 before it, in the forward pass.
    assert bytes_per_rank(double).total - bytes_per_rank(usual).total == 2 * 20_000_000


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing() -> None:
    config = specified("l", "training.precision=float32", "training.micro_batch=1")
    four = specified("l", "training.precision=float32", "training.micro_batch=4")
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
    config = specified("xl", "training.micro_batch=1")
    alone = activation_bytes(laid_out(config, 3, 64))[0]
    shared = specified("xl", "training.micro_batch=1", "training.sequence_parallel=4")
    assert activation_bytes(laid_out(shared, 3, 64))[0] == pytest.approx(alone / 4, rel=1e-6)


@pytest.mark.parametrize("mode", ["none", "selective", "full", "1/2", "1/3", "1/5"])
@pytest.mark.parametrize("layers", range(1, 12))
def test_the_most_is_held_when_the_backward_pass_begins(layers: int, mode: str) -> None:
    config = specified(
        "l", "training.micro_batch=1", f"model.layers={layers}", f"training.activation_checkpointing={mode}"
    )
    unit, inside, every = 1024 * 1536 * 2, 16, int(mode[2:]) if "/" in mode else 1
    kept = [inside if mode == "none" or layer % every else {"selective": 2}.get(mode, 1) for layer in range(layers)]
    # Block by block, from the last one: it is there in full, and those before it as they were kept.
    most = max(sum(kept[:layer]) + inside for layer in range(layers))
    begins, _ = activation_bytes(laid_out(config, 3, 8))
    assert begins == unit * (most + 6) + 1024 * 512 * (2 + 8)


@pytest.mark.parametrize("checkpointing", ["full", "none", "1/2", "1/5"])
def test_activations_are_what_the_network_keeps_for_its_backward_pass(checkpointing: str) -> None:
    shape = ["model.layers=6", "model.width=128", "data.resolution=16", "training.batch=4"]
    config = specified("s", *shape, "training.precision=float32", f"training.activation_checkpointing={checkpointing}")
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
    # the last block, if it is one that is recomputed.
    planned -= 3 * unit + 8 * images * 256 * 512
    if checkpointing in ("full", "1/5"):
        measured += 17 * unit
    assert measured == pytest.approx(planned, rel=0.03)
