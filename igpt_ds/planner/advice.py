"""What limits a job, and what would make it fit or faster: the same arithmetic, over the choices that a user has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from igpt_ds.config.batch import divisors
from igpt_ds.config.deepspeed import ds_presets, load_ds_config, offloads, resolve
from igpt_ds.planner.devices import Device
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import Memory, bytes_per_rank
from igpt_ds.planner.step_time import Assumptions, StepTime, recomputed_share, step_time

USABLE = 0.9  # of a device's memory: the rest goes to the driver, NCCL and fragments
_WORTH = 0.97  # a choice is named that takes at most this share of the time
_MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """One way to run the job.

    Attributes:
        ds: the name in ds_configs/ of its DeepSpeed configuration; None: the one that was asked for.
    """

    layout: Layout
    memory: Memory
    time: StepTime
    ds: str | None = None

    def fits(self, device: Device) -> bool:
        """Whether a rank's memory suffices."""
        return self.memory.total <= USABLE * device.memory

    def differs(self, other: Layout) -> list[str]:
        """How to make this choice, coming from another."""
        ours, found = self.layout, []
        if self.ds is not None:
            found.append(f"--ds {self.ds}")
        if ours.division.micro_batch != other.division.micro_batch:
            found.append(f"--set training.micro_batch={ours.division.micro_batch}")
        if ours.checkpointing != other.checkpointing:
            found.append(f"--set training.activation_checkpointing={ours.checkpointing}")
        return found


def judge(layout: Layout, device: Device, network: float, assumptions: Assumptions, ds: str | None = None) -> Choice:
    """Memory and time of a layout."""
    return Choice(layout, bytes_per_rank(layout), step_time(layout, device, network, assumptions), ds)


def choices(layout: Layout, device: Device, network: float, assumptions: Assumptions) -> Iterator[Choice]:
    """Stages, hpZ and offload, micro-batches and checkpointing on the same GPUs."""
    share = layout.config.training.batch // layout.division.replicas
    layouts: dict[str | None, Layout] = {None: layout}
    layouts.update({name: other for name, other in presets(layout).items() if other.zero != layout.zero})
    for name, base in layouts.items():
        for micro in divisors(share):
            division = replace(layout.division, micro_batch=micro, accumulation=share // micro)
            fits = False
            for mode in _MODES:
                other = replace(base, division=division).with_training(activation_checkpointing=mode)
                # The kernels reach what they reach: only the recomputation differs.
                mfu = assumptions.mfu * (1 + recomputed_share(layout)) / (1 + recomputed_share(other))
                choice = judge(other, device, network, replace(assumptions, mfu=mfu), name)
                fits = fits or choice.fits(device)
                yield choice
            if not fits:
                break  # nor does a larger micro-batch


def advise(chosen: Choice, device: Device, network: float, assumptions: Assumptions) -> list[str]:
    """Sentences: what to change, most important first. Empty: nothing better is known."""
    layout = chosen.layout
    fitting = [c for c in choices(layout, device, network, assumptions) if c.fits(device)]
    # Offload only where nothing else fits; it is slow, and by its model's assumptions only.
    fitting = [c for c in fitting if not offloads(c.layout.zero, "optimizer")] or fitting
    advice = []
    if not fitting:
        least = min(choices(layout, device, network, assumptions), key=lambda c: c.memory.total)
        advice.append(
            f"nothing fits: the least is {_gib(least.memory.total)} a GPU ({' '.join(least.differs(layout)) or 'this'}"
            f"), {_gib(USABLE * device.memory)} are there: take more GPUs or larger ones"
        )
    else:
        fastest = min(c.time.step for c in fitting)
        # Of those that are about as fast, the one that changes least.
        near = [c for c in fitting if c.time.step <= 1.02 * fastest]
        best = min(near, key=lambda c: (len(c.differs(layout)), -c.layout.division.micro_batch, c.memory.total))
        gain = best.time.step / chosen.time.step
        how = " ".join(best.differs(layout))
        if not chosen.fits(device):
            advice.append(f"it does not fit: {how}: {_gib(best.memory.total)} a GPU")
        elif gain <= _WORTH:
            advice.append(f"{how}: by this model {gain:.2f} of the time, {_gib(best.memory.total)} a GPU")
    if chosen.time.hidden_messages + chosen.time.messages > chosen.time.computation:
        advice.append(
            "messages take longer than the computation: fewer GPUs, a larger batch, or a faster network would use the "
            "GPUs better"
        )
    if not layout.bf16 and device.bf16 > 2 * device.fp32:
        advice.append(
            f"--set training.precision=bfloat16: {device.bf16 / device.fp32:.0f} times the peak of float32, with "
            "float32 master weights; the paper found float32 to give slightly better representations"
        )
    batch, world = layout.config.training.batch, layout.division.replicas
    if world == batch:
        advice.append(
            f"one image a rank: the batch of {batch} caps data parallelism here; more GPUs need sequence parallelism "
            "(training.sequence_parallel) or a larger batch"
        )
    return advice


def limits(chosen: Choice, device: Device) -> dict[str, Any]:
    """What bounds the job: the step's longest part, memory, and the number of ranks."""
    time, layout = chosen.time, chosen.layout
    parts = {
        "computation": time.computation,
        "messages": max(0.0, time.hidden_messages - time.computation) + time.messages,
        "optimizer": time.optimizer,
    }
    return {
        "step": max(parts, key=lambda name: parts[name]),
        "share": parts[max(parts, key=lambda name: parts[name])] / time.step,
        "memory_bytes": int(device.memory),
        "memory_share": chosen.memory.total / device.memory,
        "fits": chosen.fits(device),
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
        zero = resolve(tree, layout.config, layout.division, layout.ranks_per_node)["zero_optimization"]
        if "zero_hpz_partition_size" in zero and zero["zero_hpz_partition_size"] == 1:
            continue  # without groups it is plain ZeRO-3
        found[name] = replace(layout, zero=zero)
    return found


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
