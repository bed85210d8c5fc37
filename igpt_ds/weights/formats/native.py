"""Our own runs and checkpoints as a source, and as a destination a run that holds weights alone.

    DST/config.toml, palette.npy (where it is known), checkpoints/step-N/

Such a run is probed, sampled, evaluated and fine-tuned as any other. It has no moments of Adam, so a training cannot
go on from it; `pretrain --from` begins one with its weights.
"""

import math
from collections.abc import Callable
from pathlib import Path

import igpt_ds
from igpt_ds.atomic import publish_text
from igpt_ds.checkpoint.names import list_checkpoints, step_directory
from igpt_ds.checkpoint.read import Checkpoint, newest_valid, rank_file
from igpt_ds.checkpoint.safetensors_stream import Precision, Streamed
from igpt_ds.checkpoint.write import publish_checkpoint, write_part
from igpt_ds.config.file import from_tree, to_toml
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.weights.base import Weights, chunks
from igpt_ds.weights.formats._facts import record

NAME, FOLDER, PRECISIONS = "native", True, ("float32",)


def is_run(path: Path) -> bool:
    """Whether it is a run directory, be it one without a checkpoint yet."""
    run = Run(path)
    return run.config.is_file() or run.checkpoints.is_dir()


def recognises(path: Path) -> bool:
    """Whether it is one checkpoint of a run."""
    return (path / "checkpoint.json").is_file()


def read(path: Path) -> Checkpoint:
    """As `Checkpoint.open`."""
    return Checkpoint.open(path)


def read_run(path: Path, step: int | None, verify: bool) -> Checkpoint:
    """The checkpoint of a step, or the newest one: the newest whole one, if `verify`."""
    there = list_checkpoints(Run(path).checkpoints)
    if step is not None:
        directory = step_directory(Run(path).checkpoints, step)
        if directory not in there:
            steps = ", ".join(str(int(other.name[5:])) for other in there)
            raise UserError(f"{path}: no checkpoint of step {step}: choose one of those there: {steps or 'none'}")
        found = Checkpoint.open(directory)
        if verify:
            found.verify()
        return found
    if not there:
        raise UserError(f"{path}: no run directory and no checkpoint: nothing is saved yet: pre-train it first")
    if not verify:
        return Checkpoint.open(there[-1])
    newest = newest_valid(there, lambda fault: fault, LOGGER.warning)
    assert newest is not None, "an empty list alone gives None"
    return newest


def write(
    weights: Weights,
    palette: Palette | None,
    folder: Path,
    precision: Precision,
    tick: Callable[[int], object],
    shard_bytes: int,
) -> dict[str, str]:
    """Write a run directory into the empty `folder`; return file -> sha256."""
    facts = record(weights, palette)
    step = weights.step
    run = Run(folder)
    hidden = run.checkpoints / f".{step_directory(run.checkpoints, step).name}.tmp"
    hidden.mkdir(parents=True)
    tensors, slices = [], {}
    for name, facts_of in weights.tensors.items():
        count = math.prod(facts_of["shape"])
        tensors.append(Streamed(f"{name}:weight", (count,), lambda name=name: chunks(weights, name)))  # type: ignore[misc]
        slices[name] = [list(facts_of["shape"]), 0, count]
    digest = write_part(hidden / rank_file(0), tensors, slices, tick)
    content = {
        "identity": facts["identity"],
        "config": facts["config"],
        "ds_config": {},
        "code_version": igpt_ds.__version__,
        "progress": {"weights_only": True},
    }
    final = step_directory(run.checkpoints, step)
    publish_checkpoint(hidden, final, step, 1, content)
    publish_text(run.config, to_toml(from_tree(facts["config"], str(weights.path))))
    if palette is not None:
        palette.save(run.palette)
    return {str((final / rank_file(0)).relative_to(folder)): digest}
