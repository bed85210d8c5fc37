"""What the machine decides: precision, ZeRO stage, micro-batch, recomputation and compilation, for the device at hand.

Only what the configuration leaves "auto" is chosen, and the DeepSpeed configuration where none is given. Of all ways
that fit the memory the fastest by the model of step_time.py is taken; of those that are about as fast the one with the
smallest ZeRO stage, then the least recomputation, then the least memory. Without a data sheet, and on a CPU, no time is
planned: the least recomputation counts, then the smallest stage, then the largest micro-batch.

Equal input gives an equal decision, on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from igpt_ds.config.batch import divide_batch, divisors
from igpt_ds.config.deepspeed import load_ds_config, offloads, resolve
from igpt_ds.config.schema import Config
from igpt_ds.config.schema import replace as changed
from igpt_ds.errors import UserError
from igpt_ds.planner.devices import INTERCONNECTS, Device, recognise
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import Memory, bytes_per_rank
from igpt_ds.planner.step_time import Assumptions, StepTime, assumed_mfu, recomputed_share, step_time
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
    """

    name: str
    memory: int
    gpu: bool
    bf16: bool
    ranks: int
    ranks_per_node: int
    compiles: bool = True
    interconnect: float = INTERCONNECTS["ib-ndr"]


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
        return self.memory.total <= USABLE * here.memory


def decide(config: Config, ds: dict[str, Any] | None, here: Here) -> Decision:
    """Choose all that is left open.

    Args:
        config: resolution and palette size are resolved.
        ds: DeepSpeed's configuration; None: to be chosen.

    Raises:
        UserError: nothing fits, or what is specified contradicts itself or the machine.
    """
    recipe = config.training
    precision = _precision(config, ds, here)
    compiled = here.gpu and here.compiles if recipe.compile == "auto" else recipe.compile
    config = changed(config, "training", precision=precision, compile=compiled)
    device = recognise(here.name) if here.gpu else None
    best = _best(config, ds, here, device)
    recipe = best.layout.config.training
    return Decision(best.layout.config, best.ds, best.ds_name, _line(best, here, device))


def _precision(config: Config, ds: dict[str, Any] | None, here: Here) -> str:
    """bfloat16 where the device computes it and DeepSpeed's configuration takes it, else float32."""
    named = config.training.precision
    if named == "auto":
        stated = (ds or {}).get("bf16", {}).get("enabled", "auto")
        stage = (ds or {}).get("zero_optimization", {}).get("stage", 1)
        if stated == "auto":
            stated = here.gpu and here.bf16 and stage != 0
        return "bfloat16" if stated else "float32"
    if named == "bfloat16" and here.gpu and not here.bf16:
        raise UserError(f"training.precision=bfloat16: {here.name} does not compute in it: write float32")
    return named


def _best(config: Config, ds: dict[str, Any] | None, here: Here, device: Device | None) -> Choice:
    least: Choice | None = None
    for names in (_STAGES, _OFFLOADS) if ds is None else ((),):
        trees = {name: load_ds_config(name) for name in names} if ds is None else {"": ds}
        found = list(ways(config, trees, here, device))
        fitting = [choice for choice in found if choice.fits(here)]
        if fitting:
            return _preferred(fitting)
        least = min([*found, *([least] if least else [])], key=lambda choice: choice.memory.total)
    assert least is not None
    if ds is not None and not _open(config):
        return least  # all of it is specified, and a plan is no proof
    gib = 2**30
    raise UserError(
        f"{config.name} does not fit {here.name}: the least is {least.memory.total / gib:.3g} GiB a rank "
        f"({_how(least)}), {USABLE * here.memory / gib:.3g} of {here.memory / gib:.3g} GiB can be used: "
        + ("take more or larger GPUs" if here.gpu else "take a machine with more memory, or a smaller network")
        + ("" if ds is None else ", or another --ds")
    )


def _open(config: Config) -> bool:
    return "auto" in (config.training.micro_batch, config.training.activation_checkpointing)


def ways(config: Config, trees: dict[str, dict[str, Any]], here: Here, device: Device | None) -> Iterator[Choice]:
    """All ways that are left open, by DeepSpeed configuration; of micro-batches those that fit, and one more."""
    recipe = config.training
    for name, tree in trees.items():
        if name == "zero0" and recipe.precision == "bfloat16":
            continue
        if name == "zero3_hpz" and not 1 < here.ranks_per_node < here.ranks:
            continue  # without groups it is plain ZeRO-3
        share = divide_batch(recipe.batch, None, here.ranks, recipe.sequence_parallel).micro_batch
        for micro in divisors(share) if recipe.micro_batch == "auto" else [recipe.micro_batch]:
            division = divide_batch(recipe.batch, micro, here.ranks, recipe.sequence_parallel)
            one = changed(config, "training", micro_batch=division.micro_batch)
            zero = resolve(tree, one, division, here.ranks_per_node)["zero_optimization"]
            fits = False
            for mode in _modes(recipe.activation_checkpointing):
                layout = Layout(one, zero, division, here.ranks_per_node).with_training(activation_checkpointing=mode)
                memory = bytes_per_rank(layout, here.gpu)
                choice = Choice(layout, tree, name, memory, _time(layout, device, here))
                fits = fits or choice.fits(here)
                yield choice
            if not fits:
                break  # nor does a larger micro-batch


def _modes(named: str) -> tuple[str, ...]:
    return ("none", "selective", "full") if named == "auto" else (named,)


def _time(layout: Layout, device: Device | None, here: Here) -> StepTime | None:
    if device is None:
        return None
    return step_time(layout, device, here.interconnect, Assumptions(mfu=assumed_mfu(layout)))


def _preferred(fitting: list[Choice]) -> Choice:
    """The fastest, or one that is about as fast."""
    names = [*_STAGES, *_OFFLOADS]

    def order(choice: Choice) -> tuple[float, ...]:
        stage = names.index(choice.ds_name) if choice.ds_name else 0
        recomputed = recomputed_share(choice.layout)
        if choice.time is None:
            return recomputed, stage, -choice.layout.division.micro_batch
        return stage, recomputed, choice.memory.total

    fastest = min(choice.time.step if choice.time else 0.0 for choice in fitting)
    return min((c for c in fitting if c.time is None or c.time.step <= _NEAR * fastest), key=order)


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


def _line(choice: Choice, here: Here, device: Device | None) -> str:
    size = f"{_gib(choice.memory.total)} of {_gib(here.memory)} GiB"
    nodes = -(-here.ranks // here.ranks_per_node)
    where = f"{here.ranks} x {_short(here.name)}" + (f" on {counted(nodes, 'node')}" if nodes > 1 else "")
    line = f"{where}: {_how(choice)}: {size}"
    if not choice.fits(here):
        line += ", more than can be used"
    if choice.time:
        rate = choice.layout.config.training.batch / choice.time.step
        return f"{line}, about {float(f'{rate:.2g}'):g} images/s (planned)"
    return f"{line} (planned)" + ("; no data sheet: time not planned" if here.gpu else "")


def _gib(size: int) -> str:
    count = size / 2**30
    return f"{count:.0f}" if count >= 10 else f"{count:.1f}"


def _short(name: str) -> str:
    device = recognise(name)
    return device.label.replace(".*", " ") if device else name
