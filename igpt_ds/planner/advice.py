"""What limits a job, and what would make it fit or faster: what `choose` would do with everything left open."""

from dataclasses import replace
from typing import Any

from igpt_ds.config.deepspeed import ds_presets, load_ds_config, resolve
from igpt_ds.config.schema import replace as changed
from igpt_ds.errors import UserError
from igpt_ds.planner.choose import Choice, Here, choose
from igpt_ds.planner.devices import Device
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.step_time import Assumptions
from igpt_ds.text import size_text

_WORTH = 0.97  # a choice is named that takes at most this share of the time


def advise(chosen: Choice, here: Here, device: Device, assumed: Assumptions) -> list[str]:
    """Sentences: what to change, most important first. Empty: nothing better is known."""
    layout, time = chosen.layout, chosen.time
    assert time is not None
    open_config = changed(
        layout.config, "training", micro_batch="auto", activation_checkpointing="auto", compile="auto"
    )
    advice = []
    try:
        best = choose(open_config, None, here, device, assumed)
    except UserError as error:
        advice.append(str(error))
    else:
        assert best.time is not None
        gain, how = best.time.step / time.step, _differences(best, layout)
        if not chosen.fits(here):
            advice.append(f"it does not fit: {how}: {size_text(best.memory.total)} a GPU")
        elif gain <= _WORTH:
            advice.append(f"{how}: by this model {gain:.2f} of the time, {size_text(best.memory.total)} a GPU")
    if time.host > time.device:
        advice.append(
            "the processor takes longer to start the kernels than the GPU to run them: a larger micro-batch or fewer "
            "GPUs would use them better"
        )
    elif time.hidden_messages + time.messages > time.computation:
        advice.append(
            "messages take longer than the computation: fewer GPUs, a larger batch, or a faster network would use the "
            "GPUs better"
        )
    if not layout.bf16 and device.bf16 > 2 * device.peak(layout.config.training.precision):
        advice.append(
            f"--set training.precision=bfloat16: {device.bf16 / device.fp32:.0f} times the peak of float32, with "
            "float32 master weights; the paper found float32 to give slightly better representations"
        )
    batch = layout.config.training.batch
    if layout.division.replicas == batch:
        advice.append(
            f"one image a rank: the batch of {batch} caps data parallelism here; more GPUs need sequence parallelism "
            "(training.sequence_parallel) or a larger batch"
        )
    return advice


def _differences(choice: Choice, other: Layout) -> str:
    """How to make this choice, coming from another layout."""
    ours, recipe = choice.layout.config.training, other.config.training
    found = [f"--ds {choice.ds_name}"] if choice.layout.zero != other.zero else []
    for key in ("micro_batch", "activation_checkpointing", "compile"):
        value = choice.layout.division.micro_batch if key == "micro_batch" else getattr(ours, key)
        before = other.division.micro_batch if key == "micro_batch" else getattr(recipe, key)
        if value != before:
            found.append(f"--set training.{key}={str(value).lower()}")
    return " ".join(found)


def limits(chosen: Choice, here: Here) -> dict[str, Any]:
    """What bounds the job: the step's longest part, memory, and the number of ranks."""
    time, layout = chosen.time, chosen.layout
    assert time is not None
    passes = time.computation + time.gradients
    parts = {
        "computation": passes,
        "messages": max(0.0, time.hidden_messages - passes) + time.messages,
        "optimizer": time.optimizer,
        "waiting": time.waiting,
    }
    if time.host > time.device:
        parts = {"host": time.host}
    longest = max(parts, key=lambda name: parts[name])
    return {
        "step": longest,
        "share": parts[longest] / time.step,
        "memory_bytes": here.memory,
        "memory_share": chosen.memory.total / here.memory,
        "fits": chosen.fits(here),
        "data_parallel_ranks": layout.config.training.batch,
        "sequence_parallel_ranks": layout.config.model.heads,
    }


def presets(layout: Layout) -> dict[str, Layout]:
    """The same job under each of ds_configs/*.json that it can run with."""
    found = {}
    for name in ds_presets():
        tree = load_ds_config(name)
        if layout.bf16 and tree["zero_optimization"]["stage"] == 0:
            continue
        if name == "zero3_hpz" and layout.ranks % layout.ranks_per_node:
            continue  # nodes that are not alike
        zero = resolve(tree, layout.config, layout.division, layout.ranks_per_node)["zero_optimization"]
        if "zero_hpz_partition_size" in zero and zero["zero_hpz_partition_size"] == 1:
            continue  # without groups it is plain ZeRO-3
        found[name] = replace(layout, zero=zero)
    return found
