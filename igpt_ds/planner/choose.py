"""What the machine decides: precision, ZeRO stage, micro-batch, recomputation and compilation, for the device at hand.

Only what the configuration leaves "auto" is chosen, and the DeepSpeed configuration where none is given. Of all ways
that fit the memory the fastest by the model of step_time.py is taken; of those that are about as fast the one with the
smallest ZeRO stage, then the least recomputation, then the least memory. Offload is for what nothing else fits.
Without a data sheet, and on a CPU, no time is planned: the least recomputation counts, then the smallest stage, then
the largest micro-batch.

Equal input gives an equal decision, on every rank.
"""

import bisect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from igpt_ds.config.batch import divide_batch, divisors
from igpt_ds.config.deepspeed import load_ds_config, offloads, resolve
from igpt_ds.config.schema import Config
from igpt_ds.config.schema import replace as changed
from igpt_ds.errors import UserError
from igpt_ds.planner.devices import INTERCONNECTS, Device, recognise
from igpt_ds.planner.layout import Layout, laid_out
from igpt_ds.planner.memory import Memory, bytes_per_rank
from igpt_ds.planner.step_time import Assumptions, StepTime, recomputed_share, step_time
from igpt_ds.text import counted

USABLE = 0.9  # of the memory: the rest goes to the driver, NCCL and fragments
_NEAR = 1.02  # about as fast
_STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_hpz")  # of ds_configs/, in the order of preference
_OFFLOADS = ("zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Here:
    """The machine at hand, as all ranks see it.

    Attributes:
        name: as its driver calls it; "CPU".
        memory: bytes that one rank may use: what is free, a rank's share of it.
        gpu: with fused kernels.
        bf16: it computes bfloat16 in hardware.
        compiles: a compiler and Python's headers are there.
        interconnect: bytes/s of a GPU between nodes (see `find_interconnect`).
        host: bytes of the processor's memory that one rank may use; by default it is taken to suffice.
    """

    name: str
    memory: int
    gpu: bool
    bf16: bool
    ranks: int
    ranks_per_node: int
    compiles: bool = True
    interconnect: float = INTERCONNECTS["ib-ndr"]
    host: int = sys.maxsize


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        config: every "auto" of [training] replaced.
        ds: DeepSpeed's source tree, as `load_ds_config` gives it: the one that was given, or the chosen one.
        ds_name: its name in ds_configs/; empty where it was given.
        line: what, for which machine, and what it will take.
    """

    config: Config
    ds: dict[str, Any]
    ds_name: str
    line: str


@dataclass(frozen=True)
class Choice:
    """One way to run a job, with its memory, and its time where the device has a data sheet."""

    layout: Layout
    ds: dict[str, Any]
    ds_name: str
    memory: Memory
    time: StepTime | None

    def fits(self, here: Here) -> bool:
        """Whether a rank's memory suffices."""
        return _fits(self.memory, here)


def decide(config: Config, ds: dict[str, Any] | None, here: Here) -> Decision:
    """Choose all that is left open.

    Args:
        config: resolution and palette size are resolved.
        ds: DeepSpeed's configuration; None: to be chosen.

    Raises:
        UserError: nothing fits, or what is specified contradicts itself or the machine.
    """
    device = recognise(here.name) if here.gpu else None
    best = choose(config, ds, here, device)
    return Decision(best.layout.config, best.ds, best.ds_name, decision_line(best, here, device))


def choose(
    config: Config, ds: dict[str, Any] | None, here: Here, device: Device | None, assumed: Assumptions | None = None
) -> Choice:
    """The way to run a job that `decide` takes, on a device with this data sheet."""
    recipe = config.training
    compiled = here.gpu and here.compiles if recipe.compile == "auto" else recipe.compile
    config = changed(config, "training", precision=_precision(config, ds, here), compile=compiled)
    if ds is not None:
        rungs = [{"": ds}]
    else:
        rungs = [{name: load_ds_config(name) for name in names} for names in (_STAGES, _OFFLOADS if here.gpu else ())]
    found: list[Choice] = []
    for trees in rungs:
        found += ways(config, trees, here, device, assumed or Assumptions())
        if fitting := [choice for choice in found if choice.fits(here)]:
            return _preferred(fitting)
    if len(found) == 1 and ds is not None:
        return found[0]  # all of it is specified, and a plan is no proof
    least, gib = min(found, key=lambda choice: choice.memory.total), 2**30
    takes, has = (
        f"{least.memory.total / gib:.3g} GiB",
        f"{USABLE * here.memory / gib:.3g} of {here.memory / gib:.3g} GiB",
    )
    if least.memory.host > USABLE * here.host:
        takes += f" and {least.memory.host / gib:.3g} of the processor's"
        has += f" and {USABLE * here.host / gib:.3g} of the processor's {here.host / gib:.3g}"
    raise UserError(
        f"{config.name} does not fit {here.name}: it takes at least {takes} a rank ({_how(least)}), and {has} can be "
        "used: "
        + ("take more or larger GPUs" if here.gpu else "take a machine with more memory, or a smaller network")
        + (", or --ds auto" if ds is not None else "")
    )


def _precision(config: Config, ds: dict[str, Any] | None, here: Here) -> str:
    """bfloat16 where the device computes it and DeepSpeed's configuration takes it, else float32."""
    named = config.training.precision
    if named == "auto":
        stated = (ds or {}).get("bf16")  # what is neither an object nor "auto" is refused by `resolve`
        stated = stated.get("enabled", "auto") if isinstance(stated, dict) else "auto"
        if stated == "auto":
            stated = here.gpu and here.bf16 and (ds is None or ds["zero_optimization"].get("stage") != 0)
        return "bfloat16" if stated else "float32"
    if named == "bfloat16" and here.gpu and not here.bf16:
        raise UserError(
            f"training.precision=bfloat16: {here.name} does not compute in it: set training.precision=float32"
        )
    return named


def ways(
    config: Config, trees: dict[str, dict[str, Any]], here: Here, device: Device | None, assumed: Assumptions
) -> Iterator[Choice]:
    """All ways that are left open; of micro-batches those that fit, and one more.

    Args:
        config: precision and compilation are chosen.
        trees: DeepSpeed configurations by name.
    """
    recipe = config.training
    share = divide_batch(recipe.batch, "auto", here.ranks, recipe.sequence_parallel).micro_batch
    for name, tree in trees.items():
        if name == "zero0" and recipe.precision == "bfloat16":
            continue
        if name == "zero3_hpz" and (not 1 < here.ranks_per_node < here.ranks or here.ranks % here.ranks_per_node):
            continue  # no groups, or none that are alike
        for micro in divisors(share) if recipe.micro_batch == "auto" else [recipe.micro_batch]:
            division = divide_batch(recipe.batch, micro, here.ranks, recipe.sequence_parallel)
            kept = changed(config, "training", micro_batch=division.micro_batch, activation_checkpointing="none")
            ds = resolve(tree, kept, division, here.ranks_per_node)
            layout, fits = laid_out(kept, ds, division, here.ranks_per_node), False
            named = recipe.activation_checkpointing
            for mode in _modes(layout, here) if named == "auto" else [named]:
                other = layout.with_training(activation_checkpointing=mode)
                time = None if device is None else step_time(other, device, here.interconnect, assumed)
                choice = Choice(other, tree, name, bytes_per_rank(other, here.gpu), time)
                fits = fits or choice.fits(here)
                yield choice
            if not fits:
                break  # nor does a larger micro-batch


def _modes(layout: Layout, here: Here) -> list[str]:
    """The forms of recomputation to be compared: where not all can be kept, as much as fits."""

    def fits(mode: str) -> bool:
        return _fits(bytes_per_rank(layout.with_training(activation_checkpointing=mode), here.gpu), here)

    if fits("none"):
        return ["none"]
    shares = range(2, layout.config.model.layers + 1)
    # The smallest number of blocks computed again, that is the largest k that fits; the memory grows with it.
    most = bisect.bisect_left(shares, True, key=lambda k: not fits(f"1/{k}"))
    return [*([f"1/{shares[most - 1]}"] if most else []), "selective", "full"]


def _fits(memory: Memory, here: Here) -> bool:
    if here.gpu:
        return memory.total <= USABLE * here.memory and memory.host <= USABLE * here.host
    return memory.total + memory.host <= USABLE * here.memory


def _preferred(fitting: list[Choice]) -> Choice:
    """The fastest, or one that is about as fast."""
    names = ["", *_STAGES, *_OFFLOADS]

    def order(choice: Choice) -> tuple[float, ...]:
        stage, recomputed = names.index(choice.ds_name), recomputed_share(choice.layout)
        if choice.time is None:
            return recomputed, stage, -choice.layout.division.micro_batch
        return stage, recomputed, choice.memory.total

    fastest = min(choice.time.step if choice.time else 0.0 for choice in fitting)
    return min((c for c in fitting if c.time is None or c.time.step <= _NEAR * fastest), key=order)


def decision_line(choice: Choice, here: Here, device: Device | None) -> str:
    """What is chosen for which machine, what it takes, and how fast it will be."""
    nodes = -(-here.ranks // here.ranks_per_node)
    name = device.label.replace(".*", " ") if device else here.name
    where = f"{here.ranks} x {name}" + (f" on {counted(nodes, 'node')}" if nodes > 1 else "")
    line = f"{where}: {_how(choice)}: {_gib(choice.memory.total)} of {_gib(here.memory)} GiB"
    if choice.memory.host:
        line += f", {_gib(choice.memory.host)} of the processor's"
    if not choice.fits(here):
        line += ", which may not suffice"
    if choice.time:
        rate = choice.layout.config.training.batch / choice.time.step
        return f"{line}, about {float(f'{rate:.2g}'):g} images/s (planned)"
    return f"{line} (planned)" + ("; no data sheet: time not planned" if here.gpu else "")


def _how(choice: Choice) -> str:
    """ "bf16, ZeRO-1, no recomputation, micro-batch 32, compiled"."""
    layout, recipe = choice.layout, choice.layout.config.training
    zero = f"ZeRO-{layout.stage}" + (" with hpZ" if layout.hpz_group > 1 else "")
    if offloads(layout.zero, "optimizer"):
        zero += " and offload"
    recomputation = {"none": "no recomputation", "full": "full recomputation", "selective": "selective recomputation"}
    parts = [
        {"bfloat16": "bf16"}.get(recipe.precision, recipe.precision),
        zero,
        recomputation.get(layout.checkpointing, f"{layout.checkpointing} of the blocks recomputed"),
        f"micro-batch {layout.division.micro_batch}",
        *(["compiled"] if recipe.compile else []),
    ]
    return ", ".join(parts)


def _gib(size: int) -> str:
    count = size / 2**30
    return f"{count:.0f}" if count >= 10 else f"{count:.1f}"
