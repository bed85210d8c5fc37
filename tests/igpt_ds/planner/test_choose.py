"""What the machine decides: over a table of machines, against all ways there are, and around what is specified."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config, recomputed_blocks
from igpt_ds.errors import UserError
from igpt_ds.planner.choose import Decision, Here, decide
from igpt_ds.planner.devices import recognise
from igpt_ds.planner.layout import lay_out
from igpt_ds.planner.memory import bytes_per_rank
from igpt_ds.planner.step_time import Assumptions, step_time

GIB = 2**30
# Names as drivers give them, and what is free on a GPU on which nothing runs.
FREE = {
    "NVIDIA H100 80GB HBM3": 78.5,
    "NVIDIA H200": 139.2,
    "NVIDIA GeForce RTX 4090": 23.1,
    "Tesla V100-SXM2-32GB": 31.2,
}
H100, H200, RTX_4090, V100 = FREE
KEYS = ("precision", "micro_batch", "activation_checkpointing", "compile")


def left_open(preset: str, *changes: str) -> Config:
    return load_config(preset, [*(f"training.{key}=auto" for key in KEYS), *changes])


def gpus(name: str, ranks: int = 1, **changes: Any) -> Here:
    here = Here(name, int(FREE.get(name, 24) * GIB), True, name != V100, ranks, min(ranks, 8))
    return replace(here, **changes)


def cpus(ranks: int = 2, gib: float = 8, **changes: Any) -> Here:
    return replace(Here("CPU", int(gib * GIB), False, False, ranks, ranks), **changes)


def said(decision: Decision) -> tuple[str, str, int, str, bool]:
    recipe = decision.config.training
    assert isinstance(recipe.micro_batch, int) and isinstance(recipe.compile, bool)
    return decision.ds_name, recipe.precision, recipe.micro_batch, recipe.activation_checkpointing, recipe.compile


@pytest.mark.parametrize(
    ("preset", "here", "expected", "line"),
    [
        ("s", gpus(H100), ("zero1", "bfloat16", 32, "none", True), "1 x H100: bf16, ZeRO-1, no recomputation, micro-"),
        ("m", gpus(H100), ("zero1", "bfloat16", 16, "none", True), "compiled: 26 of 78 GiB, about 160 images/s"),
        ("l", gpus(H100), ("zero1", "bfloat16", 16, "none", True), "59 of 78 GiB, about 61 images/s (planned)"),
        ("xl", gpus(H200), ("zero1", "bfloat16", 2, "selective", True), "selective recomputation, micro-batch 2"),
        ("xl", gpus(H100, 8), ("zero3", "bfloat16", 2, "none", True), "no recomputation, micro-batch 2, compiled: 60"),
        ("xl", gpus(H200, 64), ("zero3", "bfloat16", 1, "none", True), "64 x H200 on 8 nodes: bf16, ZeRO-3, no"),
        ("s", gpus(RTX_4090), ("zero1", "bfloat16", 16, "none", True), "1 x RTX 4090: bf16"),
        # Its states are 24 GiB.
        ("l", gpus(RTX_4090), ("zero2_offload", "bfloat16", 8, "none", True), "ZeRO-2 and offload"),
        ("s", gpus(V100), ("zero0", "float32", 2, "none", True), "1 x V100: float32, ZeRO-0"),
        ("tiny", cpus(), ("zero0", "float32", 8, "none", False), "2 x CPU: float32, ZeRO-0, no recomputation, micro-"),
    ],
    ids=lambda value: value.name if isinstance(value, Here) else str(value),
)
def test_the_machine_decides(preset: str, here: Here, expected: tuple[Any, ...], line: str) -> None:
    config = left_open(preset, *(["data.resolution=8", "data.palette_size=16"] if preset == "tiny" else []))
    decision = decide(config, None, here)
    assert said(decision) == expected
    assert line in decision.line
    assert "\n" not in decision.line and len(decision.line) < 200
    assert decision == decide(config, None, here)  # as every rank decides
    # It is complete, DeepSpeed's part takes it, and the recipe is as it was.
    training = decision.config.training
    assert "auto" not in dataclasses.astuple(training)
    division = divide_batch(training.batch, training.micro_batch, here.ranks)
    assert resolve(decision.ds, decision.config, division, here.ranks_per_node)
    kept = {key: getattr(config.training, key) for key in KEYS}
    assert replace(decision.config, training=replace(training, **kept)) == config


@pytest.mark.parametrize(
    ("preset", "here"),
    [
        ("s", gpus(H100)),
        ("l", gpus(H100)),
        ("xl", gpus(H200)),
        ("xl", gpus(H100, 8)),
        ("m", gpus(RTX_4090)),
        ("xl", gpus(H200, 64, interconnect=2e9)),
    ],
    ids=lambda value: f"{value.ranks} x {value.name}" if isinstance(value, Here) else str(value),
)
def test_of_all_ways_that_fit_none_is_better(preset: str, here: Here) -> None:
    config = left_open(preset, "training.precision=bfloat16", "training.compile=true")
    device, share, layers = recognise(here.name), config.training.batch // here.ranks, config.model.layers
    assert device is not None
    stages = ["zero1", "zero2", "zero3", *(["zero3_hpz"] if here.ranks > here.ranks_per_node else [])]
    found = {}
    for mode in ["none", "selective", "full", *(f"1/{k}" for k in range(2, layers + 1))]:
        for micro in (m for m in range(1, share + 1) if share % m == 0):
            facts = [f"training.micro_batch={micro}", f"training.activation_checkpointing={mode}"]
            one = left_open(preset, "training.precision=bfloat16", "training.compile=true", *facts)
            for stage in stages:
                layout = lay_out(one, stage, here.ranks // here.ranks_per_node, here.ranks_per_node)
                memory = bytes_per_rank(layout).total
                if memory <= 0.9 * here.memory:
                    seconds = step_time(layout, device, here.interconnect, Assumptions()).step
                    found[stage, micro, mode] = (seconds, memory)
    stage, _, micro, mode, _ = said(decide(config, None, here))
    seconds, memory = found[stage, micro, mode]
    assert seconds <= 1.02 * min(found.values())[0]
    # Nothing that is about as fast has a smaller stage, nor with this one less recomputation, nor then less memory.
    near = {way: facts for way, facts in found.items() if facts[0] <= 1.02 * min(found.values())[0]}
    assert stages.index(stage) == min(stages.index(way[0]) for way in near)

    def again(way: str) -> float:
        every = recomputed_blocks(way)
        return len(range(0, layers, every)) if every else 0

    alike = {way: facts for way, facts in near.items() if way[0] == stage}
    assert again(mode) <= min(again(way[2]) for way in alike)
    assert memory <= min(facts[1] for way, facts in alike.items() if way[2] == mode)


def test_what_is_specified_stays() -> None:
    here = gpus(H100, 8)
    for key, value in (("micro_batch", "4"), ("activation_checkpointing", "selective"), ("compile", "false")):
        decision = decide(left_open("l", f"training.{key}={value}"), None, here)
        assert str(getattr(decision.config.training, key)).lower() == value
    decision = decide(left_open("l", "training.precision=tf32"), None, here)
    assert decision.config.training.precision == "tf32" and decision.line.startswith("8 x H100: tf32, ZeRO-")
    given = load_ds_config("zero3")
    decision = decide(left_open("l"), given, here)
    assert decision.ds == given and decision.ds_name == "" and "ZeRO-3" in decision.line


def test_nothing_is_compiled_without_a_compiler_nor_on_a_cpu() -> None:
    assert decide(left_open("s"), None, gpus(H100)).config.training.compile
    assert not decide(left_open("s"), None, gpus(H100, compiles=False)).config.training.compile
    assert not decide(left_open("s"), None, cpus()).config.training.compile


def test_precision_follows_the_device_and_what_deepspeeds_configuration_takes() -> None:
    def precision(ds: dict[str, Any] | None, here: Here, *changes: str) -> str:
        return decide(left_open("s", *changes), ds, here).config.training.precision

    assert precision(None, gpus(H100)) == "bfloat16"
    assert precision(None, gpus(V100)) == "float32"
    assert precision(None, cpus()) == "float32"
    assert precision(None, cpus(), "training.precision=bfloat16") == "bfloat16"
    assert precision(load_ds_config("zero0"), gpus(H100)) == "float32"  # which has no bfloat16
    assert precision(load_ds_config("zero1"), gpus(H100)) == "bfloat16"
    stated = {**load_ds_config("zero1"), "bf16": {"enabled": False}}
    assert precision(stated, gpus(H100)) == "float32"
    with pytest.raises(UserError, match=r"training\.precision=bfloat16: Tesla V100-SXM2-32GB does not compute in it"):
        precision(None, gpus(V100), "training.precision=bfloat16")


def test_a_gpu_without_a_data_sheet_is_filled_as_its_memory_allows() -> None:
    decision = decide(left_open("s"), None, gpus("NVIDIA X1", memory=24 * GIB))
    assert said(decision) == ("zero1", "bfloat16", 32, "none", True)
    assert decision.line.endswith("GiB (planned); no data sheet: time not planned")
    # Less memory: a smaller micro-batch first, then recomputation.
    assert said(decide(left_open("s"), None, gpus("NVIDIA X1", memory=4 * GIB)))[2:4] == (4, "none")
    small = decide(left_open("xl"), None, gpus("NVIDIA X1", 64, memory=20 * GIB))
    assert said(small)[0] == "zero3" and "/" in said(small)[3]


def test_a_cpu_plans_no_time_and_keeps_its_unfused_norms() -> None:
    decision = decide(left_open("s"), None, cpus(1, 64))
    assert "images/s" not in decision.line and "data sheet" not in decision.line
    planned = bytes_per_rank(lay_out(decision.config, "zero0", 1, 1), gpu=False).total
    assert f"{planned / GIB:.0f} of 64 GiB" in decision.line
    # 18 units a block in place of 16: what just fits a GPU does not fit a CPU.
    config = left_open("s", "training.precision=float32", "training.micro_batch=16", "training.compile=false")
    layout = lay_out(replace(config, training=replace(config.training, activation_checkpointing="none")), "zero0", 1, 1)
    just = int(bytes_per_rank(layout).total / 0.9) + 1
    assert said(decide(config, None, gpus("NVIDIA X1", memory=just)))[3] == "none"
    assert said(decide(config, None, cpus(1, just / GIB)))[3] != "none"


def test_offload_is_for_what_nothing_else_fits() -> None:
    decision = decide(left_open("xl"), None, gpus(H100))
    assert decision.ds_name == "zero2_offload"
    # Master weights, moments and two copies of the gradients, 20 bytes a parameter.
    assert "127 of the processor's" in decision.line
    assert "offload" not in decide(left_open("xl"), None, gpus(H200)).line
    # What the processor cannot hold is no way out.
    assert decide(left_open("xl"), None, gpus(H100, host=142 * GIB)).ds_name == "zero2_offload"
    with pytest.raises(UserError) as caught:
        decide(left_open("xl"), None, gpus(H100, host=140 * GIB))
    assert "GiB and 140 of the processor's a rank (bf16, ZeRO-3 and offload" in str(caught.value)
    assert "of 78.5 GiB and 126 of the processor's 140 can be used: take more or larger GPUs" in str(caught.value)
    assert "offload" not in decide(left_open("xl"), None, gpus(H200, host=0)).line
    # A processor's memory is not relieved by it.
    with pytest.raises(UserError, match="take a machine with more memory, or a smaller network") as caught:
        decide(left_open("l"), None, cpus(1, 16))
    assert "offload" not in str(caught.value)
    with pytest.raises(UserError, match="or --ds auto"):
        decide(left_open("l"), load_ds_config("zero3_offload"), cpus(1, 16))


def test_a_second_copy_of_the_weights_where_the_network_is_slow() -> None:
    fast, slow = (decide(left_open("xl"), None, gpus(H200, 64, interconnect=rate)) for rate in (50e9, 3e9))
    assert (fast.ds_name, slow.ds_name) == ("zero3", "zero3_hpz")
    assert "ZeRO-3 with hpZ" in slow.line
    # Nodes that are not alike have no groups.
    uneven = decide(left_open("xl", "training.batch=60"), None, gpus(H200, 60, interconnect=3e9))
    assert "ZeRO-" in uneven.line and "hpZ" not in uneven.line


def test_what_does_not_fit_is_refused_with_the_least_that_would_be_needed() -> None:
    with pytest.raises(UserError) as caught:
        decide(left_open("xl"), None, gpus("NVIDIA X1", memory=2 * GIB))
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith("igpt-xl does not fit NVIDIA X1: it takes at least ")
    assert "full recomputation, micro-batch 1" in told
    assert "1.8 of 2 GiB can be used: take more or larger GPUs" in told
    # One that is held to one configuration may be let go of it.
    with pytest.raises(UserError, match="larger GPUs, or --ds auto"):
        decide(left_open("xl"), load_ds_config("zero1"), gpus(H100, 2))


def test_what_is_wholly_specified_is_not_refused() -> None:
    facts = ("precision=bfloat16", "micro_batch=8", "activation_checkpointing=none", "compile=false")
    config = load_config("xl", [f"training.{fact}" for fact in facts])
    decision = decide(config, load_ds_config("zero1"), gpus(H100, 8))
    assert decision.config == config
    assert "which may not suffice" in decision.line


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.micro_batch=3: does not divide the 16 images of a rank"):
        decide(left_open("s", "training.micro_batch=3"), None, gpus(H100, 8))
    with pytest.raises(UserError, match="caps data parallelism at 64 ranks"):
        decide(left_open("xl"), None, gpus(H200, 128))
