"""`igpt-ds plan`: what it says, what it refuses, and the stated model of a step's time in closed form."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.cli import cli
from igpt_ds.config.size import attention_flops_per_image, flops_per_image, parameter_count
from igpt_ds.errors import UserError
from igpt_ds.planner.communication import transfers
from igpt_ds.planner.devices import DEVICES
from igpt_ds.planner.gathering import gathering
from igpt_ds.planner.layout import Layout, lay_out, module_sizes
from igpt_ds.planner.report import Machine, make_plan
from igpt_ds.planner.step_time import Assumptions, recomputed_share, step_time
from igpt_ds.planner.text import plan_text
from tests.helpers.plans import specified

H200 = DEVICES["h200"]


def laid_out(preset: str = "xl", nodes: int = 8, gpus: int = 8, ds: str = "zero3", *overrides: str) -> Layout:
    return lay_out(specified(preset, *overrides), ds, nodes, gpus)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cli(["plan", *arguments, "--json"], standalone_mode=False)
    return dict(json.loads(capsys.readouterr().out))


def test_the_command_tells_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--ds", "zero3", "--set", "training.activation_checkpointing=full")
    found = planned(capsys, "xl", "--nodes", "8", "--gpus-per-node", "8", "--device", "h200", *asked)
    config = specified("xl")
    assert found["parameters"] == parameter_count(config) == 6_810_875_904
    assert found["flops_per_step"] == 64 * flops_per_image(config)
    assert found["checkpoint_bytes"] == 12 * found["parameters"]
    assert found["dataset_bytes"]["uint16"] == 1_281_167 * 4096 * 2
    kinds = {"parameters", "gradients", "master", "moments", "activations", "buffers", "live", "total"}
    assert kinds <= set(found["bytes_per_rank"])
    assert found["bytes_per_rank"]["moments"] == pytest.approx(8 * found["parameters"] / 64, abs=8)
    assert found["communication_bytes_per_step"]["total"] > 0
    assert found["days"] == pytest.approx(2_000_000 * found["step_seconds"] / 86400)
    assert found["tokens_per_second"] == pytest.approx(64 * 4096 / found["step_seconds"])
    assert found["images_per_second"] == pytest.approx(64 / found["step_seconds"])
    assert found["decision"].startswith("64 x H200 on 8 nodes: bf16, ZeRO-3, full recomputation, micro-batch 1")
    assert found["limits"]["data_parallel_ranks"] == 64
    assert found["limits"]["fits"] is True
    activations = found["activation_bytes"]
    assert activations["full"] < activations["selective"] < activations["none"]
    assert activations["full"] == found["bytes_per_rank"]["activations"]
    assert set(found["by_ds_config"]) == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload"}


@pytest.mark.parametrize("preset", ["s", "m-bert", "l48", "xl"])
def test_the_tables_tell_the_same(preset: str) -> None:
    found = make_plan(laid_out(preset, 2), Machine("h100"))
    text = plan_text(found)
    assert f"{found['parameters']:,} parameters" in text
    assert f"{found['bytes_per_rank']['total'] / 2**30:.2f}" in text
    for name in found["by_ds_config"]:
        assert name in text
    assert "By assumptions, not measured" in text
    tables = text.split("\n\n")[1:]
    assert len(tables) == 4
    # Columns are aligned: a figure ends where its heading does.
    for line in tables[1].splitlines()[2:]:
        assert len(line) == len(tables[1].splitlines()[1])


def test_a_batch_of_64_caps_data_parallelism_at_64_ranks() -> None:
    assert laid_out(nodes=8).division.replicas == 64
    with pytest.raises(UserError) as caught:
        laid_out(nodes=16)
    told = str(caught.value)
    assert "training.batch=64: caps data parallelism at 64 ranks, not 128" in told
    for way in ("start 64 ranks", "training.batch=128", "training.sequence_parallel=2"):
        assert way in told
    with pytest.raises(UserError, match="24 ranks cannot share it evenly"):
        laid_out(nodes=3)


def test_ranks_that_share_an_image_go_past_the_cap() -> None:
    config = specified("xl", "training.sequence_parallel=8")
    layout = lay_out(config, "zero3", 64, 8)
    assert (layout.ranks, layout.division.replicas, layout.division.micro_batch) == (512, 64, 1)
    exchange = next(t for t in transfers(layout) if t.operation == "exchange heads")
    # q, k, v and the output of 60 blocks, forward, recomputed and backward: 7/8 of a rank's tokens go to others.
    assert exchange.sent == 4 * 3 * 60 * (4096 // 8) * 3072 * 2 * 7 // 8
    kept = layout.with_training(activation_checkpointing="none")
    assert exchange.sent == 1.5 * next(t for t in transfers(kept) if t.operation == "exchange heads").sent
    with pytest.raises(UserError, match=r"training\.sequence_parallel=8: does not divide 4 ranks"):
        lay_out(config, "zero3", 1, 4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny"], "plan: tiny takes resolution and palette_size from its data: add --set data.resolution=32"),
        (["xl", "--device", "h300"], "device h300: its data sheet is not here: choose b200, h200"),
        (["xl", "--interconnect", "carrier-pigeon"], "interconnect carrier-pigeon: unknown: choose ib-xdr"),
        (["xl", "--interconnect", "-5"], "interconnect -5: unknown"),
        (["xl", "--interconnect", "nan"], "interconnect nan: unknown"),
        (["xl", "--ds", "zero9"], "DeepSpeed configuration zero9: no such file"),
        (
            ["xl", "--ds", "zero0", "--set", "training.precision=bfloat16"],
            "training.precision=bfloat16: needs ZeRO stage 1 to 3",
        ),
        (["none"], "preset none: there is none of this name"),
        (["s", "--set", "finetune.patience=3"], "takes its classes from its data"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        cli(["plan", *arguments], standalone_mode=False)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_3_gathers_twice_and_scatters_once() -> None:
    layout = laid_out("xl", 8)
    parameters = parameter_count(layout.config)
    sent = {t.operation: t.sent for t in transfers(layout)}
    assert sent["scatter gradients"] == 2 * parameters * 63 // 64
    # But for what the end of the forward pass leaves for the beginning of the backward pass.
    found = gathering(layout)
    assert 0.95 * 2 * parameters < found.forward + found.backward < 2 * parameters
    # At most so much counts as there; and a message lasts from its first parameter's use to its last one's.
    messages = 2 * layout.zero["stage3_prefetch_bucket_size"]
    there = layout.zero["stage3_max_live_parameters"] + 4 * 3072**2 + sum(module_sizes(layout.config).root)
    assert there < found.live < there + messages


@pytest.mark.parametrize(("ds", "factor"), [("zero1", 3), ("zero2", 3), ("zero3", 3)])
def test_all_stages_move_three_times_the_parameters(ds: str, factor: int) -> None:
    layout = laid_out("xl", 8, 8, ds)
    total = sum(t.sent for t in transfers(layout))
    assert total == pytest.approx(factor * 2 * parameter_count(layout.config) * 63 / 64, rel=0.02)


def test_accumulation_multiplies_what_every_micro_batch_needs() -> None:
    once, four = (
        {t.operation: t.sent for t in transfers(laid_out("xl", 1, 8, ds, f"training.micro_batch={m}"))}
        for ds in ("zero3",)
        for m in (8, 2)
    )
    for operation in ("gather weights", "scatter gradients"):
        assert four[operation] == pytest.approx(4 * once[operation], rel=1e-6)
    for ds, times in (("zero1", 1), ("zero2", 4)):
        one, more = (
            {t.operation: t.sent for t in transfers(laid_out("xl", 1, 8, ds, f"training.micro_batch={m}"))}
            for m in (8, 2)
        )
        assert more["reduce gradients"] == times * one["reduce gradients"]
        assert more["gather weights"] == one["gather weights"]


# Bytes a parameter, as benchmarks/gradients.py counts them: with one micro-batch, each further one; Adam's own are 28.
@pytest.mark.parametrize(
    ("ds", "precision", "one", "further"),
    [
        ("zero0", "float32", 4, 12),
        ("zero1", "bfloat16", 36, 18),
        ("zero2", "bfloat16", 76, 38),
        ("zero3", "bfloat16", 78, 40),
    ],
)
def test_what_one_gpu_moves_for_its_gradients_and_states(ds: str, precision: str, one: int, further: int) -> None:
    for accumulation in (1, 4):
        facts = (f"training.precision={precision}", f"training.micro_batch={128 // accumulation}")
        layout = laid_out("s", 1, 1, ds, *facts)
        assert transfers(layout) == []
        time = step_time(layout, H200, 50e9, Assumptions())
        moved = (28 + one + (accumulation - 1) * further) * parameter_count(layout.config)
        assert time.gradients + time.optimizer == pytest.approx(moved / (4.8e12 * 0.83))
        assert time.device == pytest.approx(time.computation + time.gradients + time.optimizer)
        assert time.messages == time.hidden_messages == time.waiting == 0


@pytest.mark.parametrize(("gpus", "of_all"), [(1, 12), (8, 24)])
def test_stage_1_in_bfloat16_goes_over_all_gradients(gpus: int, of_all: int) -> None:
    layout = laid_out("s", 1, gpus, "zero1")
    count = parameter_count(layout.config)
    expected = (34 / gpus + of_all) * count / (4.8e12 * 0.83)
    assert step_time(layout, H200, 50e9, Assumptions()).optimizer == pytest.approx(expected)


def test_ranks_share_the_summing_up_of_gradients() -> None:
    layout = laid_out("xl", 8)
    count = parameter_count(layout.config)
    time = step_time(layout, H200, 50e9, Assumptions())
    assert time.gradients == pytest.approx((12 + 28 / 64) * count / (4.8e12 * 0.83))
    assert time.optimizer == pytest.approx(66 / 64 * count / (4.8e12 * 0.83))


def test_the_time_of_messages_in_closed_form() -> None:
    layout = laid_out("xl", 8)
    assumed = Assumptions(hop=0.0, hop_between_nodes=0.0)
    time = step_time(layout, H200, 10e9, assumed)
    seconds = {t.operation: s for t, s in time.transfers}
    # Of what is scattered 7/8 come from other nodes, through 8 GPUs' network of 10 GB/s.
    expected = 2 * parameter_count(layout.config) * 7 / 8 / (8 * 10e9 * 0.8)
    assert seconds["scatter gradients"] == pytest.approx(expected)
    # A faster network leaves the links within a node.
    fast = step_time(layout, H200, 1e15, assumed)
    within = 2 * parameter_count(layout.config) * 63 / 64 / (450e9 * 0.8)
    assert {t.operation: s for t, s in fast.transfers}["scatter gradients"] == pytest.approx(within)
    # A delay a hop: 7 between nodes and 56 within, for each of 61 buckets.
    late = step_time(layout, H200, 10e9, replace(assumed, hop=1e-6, hop_between_nodes=1e-5))
    buckets = math.ceil(parameter_count(layout.config) / layout.zero["reduce_bucket_size"])
    delay = {t.operation: s for t, s in late.transfers}["scatter gradients"] - expected
    assert delay == pytest.approx(buckets * (56e-6 + 7e-5))


def test_the_processor_sets_the_pace_of_small_steps() -> None:
    quick = Assumptions(host=(0.0, 0.0, 0.0, 0.0))
    layout = laid_out("s", 1, 8, "zero3", "training.micro_batch=4")  # four micro-batches of 24 blocks
    slow = Assumptions(host=(0.0, 0.0, 0.0, 1.0))
    assert step_time(layout, H200, 50e9, slow).step == 4 * 24
    kept = layout.with_training(activation_checkpointing="none")
    some = layout.with_training(activation_checkpointing="1/5")  # 5 of the 24
    assert step_time(kept, H200, 50e9, slow).step == pytest.approx(4 * 24 * slow.host_kept)
    assert step_time(some, H200, 50e9, slow).step == pytest.approx(4 * (5 + 19 * slow.host_kept))
    compiled = layout.with_training(compile=True)
    assert step_time(compiled, H200, 50e9, slow).step == pytest.approx(4 * 24 * slow.host_compiled)
    time = step_time(layout, H200, 50e9, quick)
    assert time.host == 0 and time.step == time.device > 0


def test_hpz_waits_for_each_tensor() -> None:
    plain, grouped = (step_time(laid_out("xl", 8, 8, ds), H200, 50e9, Assumptions()) for ds in ("zero3", "zero3_hpz"))
    assert (plain.waiting, grouped.waiting) == (0, pytest.approx(360 * 50e-6))
    passes = max(grouped.computation + grouped.gradients, grouped.hidden_messages)
    assert grouped.device == pytest.approx(passes + grouped.messages + grouped.optimizer + grouped.waiting)


def test_overlap_hides_messages_behind_the_computation() -> None:
    layout = laid_out("xl", 8)
    apart = replace(layout, zero={**layout.zero, "overlap_comm": False})
    assumed = Assumptions(host=(0.0, 0.0, 0.0, 0.0))
    hidden, added = (step_time(each, H200, 50e9, assumed) for each in (layout, apart))
    assert hidden.computation > hidden.hidden_messages > 0
    assert added.hidden_messages == 0
    assert added.step - hidden.step == pytest.approx(hidden.hidden_messages)
    # Where the network is slow the messages set the pace.
    slow = step_time(layout, H200, 1e9, assumed)
    assert slow.step == pytest.approx(slow.hidden_messages + slow.messages + slow.optimizer)
    # Beside what is computed gradients are summed up.
    assert hidden.step == pytest.approx(hidden.computation + hidden.gradients + hidden.messages + hidden.optimizer)


def test_recomputation_takes_a_third_of_the_blocks() -> None:
    full = laid_out("xl")
    selective, none = (full.with_training(activation_checkpointing=mode) for mode in ("selective", "none"))
    head = 6 * 4096 * 512 * 3072 / flops_per_image(full.config)
    assert recomputed_share(full) == pytest.approx((1 - head) / 3)
    attention = attention_flops_per_image(full.config) / flops_per_image(full.config)
    assert recomputed_share(full) - recomputed_share(selective) == pytest.approx(attention / 3)
    assert recomputed_share(none) == 0
    fourth = full.with_training(activation_checkpointing="1/4")
    assert recomputed_share(fourth) == pytest.approx((1 - head) / 12)


def test_a_measured_mfu_takes_the_place_of_the_model() -> None:
    layout = laid_out("xl", 1)
    found = make_plan(layout, Machine(mfu=0.4))
    assert found["step_parts"]["computation"] == pytest.approx(found["flops_per_step"] / (8 * 989e12 * 0.4))
    assert found["assumptions"]["mfu"] == pytest.approx(0.4)
    # Of other ways to run it the kernels are as much slower or faster.
    kept = make_plan(layout, Machine())["assumptions"]["mfu"]
    assert found["assumptions"]["speed"] == pytest.approx(0.4 / kept)


def test_one_gpu_has_no_columns_of_messages() -> None:
    text = plan_text(make_plan(laid_out("s", 1, 1), Machine("h100")))
    told = ("Messages of a step", "GB sent", "messages beside", "between GPUs", "a message's delay")
    assert not any(each in text for each in told) and "(--mfu sets it); see docs/plan.md." in text
    text = plan_text(make_plan(laid_out("s", 1, 2), Machine("h100")))
    assert all(each in text for each in told[:2] + told[3:])


def advice(layout: Layout, **machine: Any) -> str:
    return "\n".join(make_plan(layout, Machine(**machine))["advice"])


def test_what_fits_faster_is_named() -> None:
    told = advice(laid_out("xl", 8))
    changes = "--set training.activation_checkpointing=none --set training.compile=true"
    assert re.search(rf"{changes}: by this model 0\.[67]\d of the time", told)
    assert "one image a rank: the batch of 64 caps data parallelism here" in told
    better = laid_out("xl", 8).with_training(activation_checkpointing="none", compile=True)
    assert "of the time" not in advice(better)


def test_what_does_not_fit_is_mended_or_given_up() -> None:
    layout = laid_out("xl", 1, 2, "zero1")
    found = make_plan(layout, Machine("a100"))
    assert found["limits"]["fits"] is False
    assert "it does not fit: --ds zero3 --set training.micro_batch=" in found["advice"][0]
    # 6.8 billion parameters never fit a small GPU alone, but with everything in the processor's memory.
    assert "it does not fit: --ds zero3_offload" in advice(laid_out("xl", 1, 1), device="l4")
    huge = laid_out("xl", 1, 1, "zero3", "model.width=24576", "model.layers=96")
    assert "does not fit l4: it takes at least" in advice(huge, device="l4")


def test_float32_is_named_where_it_costs() -> None:
    assert "training.precision=bfloat16: 15 times the peak of float32" in advice(
        laid_out("l", 1, 8, "zero3", "training.precision=float32")
    )
    assert "precision" not in advice(laid_out("xl", 1))
    assert "precision" not in advice(laid_out("s", 1, 8, "zero3", "training.precision=float32"), device="v100")


def test_hpz_is_worth_it_where_the_network_is_slow() -> None:
    layout = laid_out("xl", 8).with_training(activation_checkpointing="none")
    found = make_plan(layout, Machine("h200", "5"))
    groups, plain = found["by_ds_config"]["zero3_hpz"], found["by_ds_config"]["zero3"]
    assert groups["step_seconds"] < 0.8 * plain["step_seconds"]
    assert groups["bytes_per_rank"] - plain["bytes_per_rank"] == pytest.approx(2 * found["parameters"] / 8, abs=16)
    assert found["limits"]["step"] == "messages"
    assert "messages take longer than the computation" in "\n".join(found["advice"])


def test_a_dry_run_tells_the_plan_of_its_job(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pretrain", "--preset", "tiny", "--data", str(digits), "--dry-run", "--nodes", "4"]
    cli([*arguments, "--gpus-per-node", "4", "--device", "a100"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "16 x a100: 4 nodes of 4" in out
    assert "epochs of the first source" in out
    assert "533 images are" in out
    assert "Memory of a rank" in out and "zero3_hpz" in out
