"""The model of a step's computation: against estimates that were made by hand, and against plain sums."""

from dataclasses import replace

import pytest

from igpt_ds.config.size import flops_per_image
from igpt_ds.planner.devices import DEVICES, Device
from igpt_ds.planner.kernels import compute_seconds
from igpt_ds.planner.layout import Layout, lay_out
from igpt_ds.planner.step_time import Assumptions, step_time
from tests.helpers.plans import specified

H200 = DEVICES["h200"]
FLASH = replace(H200, attention="flash")
# The estimates took 28 bytes a parameter and micro-batch for gradients, and 54 for the optimiser's step.
ESTIMATED = Assumptions(gradient_bytes=(0, 0, 0, 28), gradient_share_bytes=(0, 0, 0, 0), optimizer_bytes=(0, 0, 0, 54))
# Of a network that scales its activations in passes of their own, four times as wide as the others.
SCALED = replace(ESTIMATED, passes=(34, 46))
LEAN = replace(ESTIMATED, gradient_bytes=(0, 0, 0, 12))  # gradients are added where they arise
ENDLESS = 1e30


def one_gpu(preset: str, micro: int, batch: int, mode: str, *changes: str) -> Layout:
    facts = (f"training.micro_batch={micro}", f"training.batch={batch}", f"training.activation_checkpointing={mode}")
    return lay_out(specified(preset, *facts, *changes), "zero3", 1, 1)


# Milliseconds an image of iGPT-XL on one H200 under ZeRO-3, estimated kernel by kernel: matrix products at 770 to 790
# TFLOP/s, passes over memory at 4.0 TB/s.
@pytest.mark.parametrize(
    ("micro", "batch", "mode", "compiled", "device", "assumed", "milliseconds"),
    [
        (1, 1, "full", False, FLASH, SCALED, 533),
        (2, 2, "full", False, FLASH, SCALED, 471),
        (4, 4, "full", False, FLASH, SCALED, 441),
        (4, 4, "full", True, FLASH, ESTIMATED, 420),
        (4, 4, "full", True, H200, ESTIMATED, 391),
        (2, 64, "selective", True, H200, ESTIMATED, 370),
        (2, 64, "selective", True, H200, LEAN, 361),
        (1, 64, "1/4", True, H200, LEAN, 311),
    ],
)
def test_the_largest_networks_step_is_near_what_was_estimated(
    micro: int, batch: int, mode: str, compiled: bool, device: Device, assumed: Assumptions, milliseconds: float
) -> None:
    layout = one_gpu("xl", micro, batch, mode, f"training.compile={str(compiled).lower()}")
    assert 1e3 * step_time(layout, device, 50e9, assumed).device / batch == pytest.approx(milliseconds, rel=0.05)


@pytest.mark.parametrize("preset", ["s", "l-bert"])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
def test_where_memory_is_endlessly_fast_the_flops_remain(preset: str, precision: str) -> None:
    layout = one_gpu(preset, 4, 8, "none", f"training.precision={precision}")
    # Attention's backward pass does five products, for four that the model's FLOPs count.
    fast = replace(H200, bandwidth=ENDLESS)
    n, d, layers = 1024, layout.config.model.width, layout.config.model.layers
    pairs = n * n / (1 if preset == "l-bert" else 2)
    attention = 8 * layers * (2 + 5) * 2 * pairs * d
    products = 8 * flops_per_image(layout.config) - 8 * layers * (2 + 4) * 2 * pairs * d
    peak = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}[precision]
    share = Assumptions().attention["cudnn" if precision == "bfloat16" else "efficient"]
    expected = products / (0.89 * peak) + attention / (share * peak)
    assert compute_seconds(layout, fast, Assumptions()) == pytest.approx(expected)


def test_where_arithmetic_is_endlessly_fast_the_bytes_remain() -> None:
    layout = one_gpu("s", 4, 8, "none")
    fast = replace(H200, bf16=ENDLESS)
    tokens, d, k = 4 * 1024, 512, 512
    moved = 0
    for inputs, outputs in [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)] * 24 + [(d, k)]:
        for _ in ("forward", "gradient of the input", "gradient of the weights"):
            moved += 2 * (tokens * (inputs + outputs) + inputs * outputs)
    moved += 24 * (18 + 30) * 2 * tokens * d + 28 * tokens * k
    expected = 2 * moved / (0.83 * 4.8e12)  # two micro-batches
    assert compute_seconds(layout, fast, Assumptions()) == pytest.approx(expected)


def test_what_is_computed_again_counts_by_its_blocks() -> None:
    def seconds(mode: str, *changes: str) -> float:
        return compute_seconds(one_gpu("xl", 1, 1, mode, *changes), H200, Assumptions())

    none, full = seconds("none"), seconds("full")
    for k, blocks in ((2, 30), (4, 15), (7, 9), (60, 1)):
        assert seconds(f"1/{k}") - none == pytest.approx(blocks / 60 * (full - none))
    # Selective: all of it but attention's forward pass, of 4 n² d / 2 FLOPs a block.
    attention = 60 * 2 * 4096**2 * 3072 / (0.55 * 989e12)
    assert full - seconds("selective") == pytest.approx(attention)
    assert seconds("none", "training.compile=true") < none


def test_ranks_that_share_an_image_share_its_computation() -> None:
    alone, shared = (
        lay_out(specified("xl", "training.micro_batch=1", f"training.sequence_parallel={k}"), "zero3", k, 64)
        for k in (1, 4)
    )
    heavy = replace(H200, bandwidth=ENDLESS)
    assert compute_seconds(shared, heavy, Assumptions()) == pytest.approx(
        compute_seconds(alone, heavy, Assumptions()) / 4
    )
