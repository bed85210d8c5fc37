"""What the machine decides of a training, and what a run keeps of it.

Four values of [training] and the DeepSpeed configuration may be "auto": the planner chooses them for the machine at
hand (planner/choose.py). A run keeps them: on the same machine "auto" is what the run has, so that a command may name
the preset again, or not. On another machine what had been decided is decided anew, and what a person had named stays.
The precision belongs to the recipe once a run has begun: it stays on any machine.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from igpt_ds.config.batch import Division, divide_batch
from igpt_ds.config.deepspeed import DECIDED, load_ds_config, remembered, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config, replace
from igpt_ds.errors import UserError
from igpt_ds.planner.choose import Here, decide
from igpt_ds.planner.layout import Layout, laid_out
from igpt_ds.reading import read_json
from igpt_ds.run.directory import Run

VALUES = ("precision", "micro_batch", "activation_checkpointing", "compile")  # of [training]
_MACHINE = {"name": str, "ranks": int, "ranks_per_node": int, "memory_gib": int}
_AS_MUCH = 0.9  # of the memory that there was: what is free is never twice the same


@dataclass(frozen=True)
class Kept:
    """What a run that has begun trains with.

    Attributes:
        values: its `VALUES`, by name, and as "ds" its DeepSpeed configuration before it was resolved.
        decided: what of these nobody named: as they were decided, the name in ds_configs/ for "ds".
        machine: what they were decided for, see `_MACHINE`; empty where all was named.
    """

    values: dict[str, Any]
    decided: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> "Kept":
        """The rest of it, where some values are to be decided anew."""
        values = {name: value for name, value in self.values.items() if name not in names}
        return dataclasses.replace(self, values=values)


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    Attributes:
        config: "auto" where it leaves a value to the machine.
        ds: the DeepSpeed configuration; None: left to the machine.
        kept: of the run that is to go on; None: a new one.
    """

    config: Config
    ds: dict[str, Any] | None = None
    kept: Kept | None = None

    @property
    def known(self) -> Config:
        """The configuration as far as it is known without the machine."""
        return _filled(self.config, self.kept) if self.kept else self.config


@dataclass(frozen=True)
class Settled:
    """A training on a machine.

    Attributes:
        config: without "auto".
        ds, ds_source: the DeepSpeed configuration, resolved and before.
        ranks_per_node: GPUs of a machine.
        how: what the machine is to do and why, in a line.
        decided: what of it nobody named, and for which machine: see `read_kept`. Empty: all was named.
    """

    config: Config
    ds: dict[str, Any]
    ds_source: dict[str, Any]
    division: Division
    ranks_per_node: int
    how: str
    decided: dict[str, Any]

    @property
    def layout(self) -> Layout:
        """The training on its machines, for the planner."""
        return laid_out(self.config, self.ds, self.division, self.ranks_per_node)

    def ds_record(self) -> dict[str, Any]:
        """What RUN/ds.json holds."""
        return remembered(self.ds_source, self.ds) | ({DECIDED: self.decided} if self.decided else {})


def read_kept(run: Run) -> Kept | None:
    """What a run has written of it; None if it has not begun. In older runs everything counts as named."""
    if not run.ds_config.exists():
        return None
    values: dict[str, Any] = {"ds": load_ds_config(str(run.ds_config))}
    if run.config.exists():
        training = load_config(run.config).training
        values |= {name: getattr(training, name) for name in VALUES}
    try:
        told = read_json(run.ds_config).get(DECIDED, {"values": {}})
        # A value that a person has changed in config.toml is named.
        decided = {name: v for name, v in told["values"].items() if name == "ds" or values.get(name) == v}
        machine = {key: kind(told["machine"][key]) for key, kind in _MACHINE.items()} if decided else {}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.ds_config}: its {DECIDED} cannot be read: delete it, and all counts as named") from error
    return Kept(values, decided, machine)


def settle(asked: Asked, here: Here) -> Settled:
    """Decide what is left to the machine; the configuration must have met its data.

    Raises:
        UserError: nothing fits, or what is named contradicts itself or the machine.
    """
    config, ds, kept = asked.config, asked.ds, asked.kept or Kept({})
    whole = _divided(config, here)
    left = [name for name in VALUES if getattr(config.training, name) == "auto"] + (["ds"] if ds is None else [])
    if kept.values.get("micro_batch") == "auto":  # an older run holds its whole share at once
        kept = dataclasses.replace(kept, values={**kept.values, "micro_batch": whole.micro_batch})
    left = [name for name in left if name in kept.decided or name not in kept.values]
    again = [name for name in left if name in kept.values and name != "precision"]
    other = _what_is_another(kept, config, whole, here) if kept.machine else ""
    if other:
        kept = kept.without(again)
    config, ds = _filled(config, kept), ds or kept.values.get("ds")
    decision = decide(config, ds, here)
    config = decision.config
    division = _divided(config, here)
    resolved = resolve(decision.ds, config, division, here.ranks_per_node)
    values = {name: getattr(config.training, name, decision.ds_name or kept.decided.get("ds")) for name in left}
    machine = kept.machine if kept.machine and not other else _record(here)
    decided = {"machine": machine, "values": values} if values else {}
    differs = other and any(values[name] != kept.decided.get(name) for name in again)
    how = f"decided anew, as {other}: {decision.line}" if differs else decision.line
    return Settled(config, resolved, decision.ds, division, here.ranks_per_node, how, decided)


def _filled(config: Config, kept: Kept) -> Config:
    """With what the run keeps where the configuration has "auto"."""
    left = [name for name in VALUES if getattr(config.training, name) == "auto"]
    return replace(config, "training", **{name: kept.values[name] for name in left if name in kept.values})


def _divided(config: Config, here: Here) -> Division:
    recipe = config.training
    return divide_batch(recipe.batch, recipe.micro_batch, here.ranks, recipe.sequence_parallel)


def _what_is_another(kept: Kept, config: Config, whole: Division, here: Here) -> str:
    """Why what was decided holds no more, in words; "" where it holds."""
    then, now = kept.machine, _record(here)
    precision, micro_batch = kept.values.get("precision"), kept.values.get("micro_batch", 1)
    if any(then[key] != now[key] for key in ("name", "ranks", "ranks_per_node")):
        return f"the run was on {then['ranks']} x {then['name']}, {then['ranks_per_node']} a node"
    if here.memory < _AS_MUCH * then["memory_gib"] * 2**30:
        return f"a rank had {then['memory_gib']} GiB"
    if kept.decided.get("compile") and not here.compiles:
        return "there was a compiler"
    if config.training.precision not in ("auto", precision):
        return f"the run was in {precision}"
    if whole.batch // whole.replicas % micro_batch:
        return f"micro-batches of {micro_batch} do not divide a rank's images"
    return ""


def _record(here: Here) -> dict[str, Any]:
    return {
        "name": here.name,
        "ranks": here.ranks,
        "ranks_per_node": here.ranks_per_node,
        "memory_gib": here.memory // 2**30,
    }
