"""What a run is to be made of: configuration, data, run directory; and what it will need."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.config.schema import Config
from igpt_ds.config.size import parameter_count
from igpt_ds.doctor.report import Check
from igpt_ds.errors import UserError
from igpt_ds.text import counted

if TYPE_CHECKING:
    from igpt_ds.train.job import Job

SAMPLED_ROWS = 64
_BYTES_A_PARAMETER = 12  # of a checkpoint: weights and two moments in float32


@dataclass(frozen=True)
class Request:
    """What the command line asks about: the same words as `igpt-ds pretrain`'s."""

    data: tuple[str, ...] = ()
    run: Path | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    ds: str | None = None


@dataclass(frozen=True)
class Need:
    """What a run takes on so many ranks, in bytes."""

    checkpoint: int
    rank: int  # model states and activations, by plan
    bfloat16: bool
    kept: int  # checkpoints that stay


@dataclass(frozen=True)
class Plan:
    """As much of the job as could be worked out, and the fault that stopped it."""

    config: Config | None = None
    job: "Job | None" = None
    need: Need | None = None
    ranks: int = 1
    fault: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        return self.config.data.sources if self.config else ()


def make_plan(request: Request, count: int, ranks_per_node: int | None = None, local_rank: int = 0) -> Plan:
    """Go as far as `igpt-ds pretrain` would before its ranks meet; faults are kept, not raised.

    Args:
        count: ranks of the run, on machines like this one.
        ranks_per_node: None: 8, as most nodes have, or all where there are fewer.
        local_rank: this process's, whose device is looked at.
    """
    from igpt_ds.distributed.device import at_hand
    from igpt_ds.distributed.ranks import Ranks
    from igpt_ds.planner.memory import bytes_per_rank
    from igpt_ds.run.directory import Run
    from igpt_ds.train.begin import pretraining
    from igpt_ds.train.job import prepare
    from igpt_ds.train.machine import Settled, settle

    run = Run(request.run) if request.run else None
    if request.preset is None and not (run and run.config.exists()):
        return Plan(ranks=count)
    here = at_hand(Ranks(0, count, local_rank, ranks_per_node or min(count, 8)))
    settled: Settled | None = None
    asked, job, fault = None, None, ""
    try:
        asked = pretraining(request.preset, run, request.data, request.overrides, request.ds)
        if asked.config.data.sources:
            settled = job = prepare(asked, here)
    except UserError as error:
        fault = str(error)
    if asked is None:
        return Plan(ranks=count, fault=fault)
    config = asked.known
    if settled is None and config.data.resolution and config.data.palette_size:
        try:
            settled = settle(asked, here)
        except UserError as error:
            fault = fault or str(error)
    if settled is None:
        return Plan(config, None, None, count, fault)
    config = settled.config
    need = Need(
        checkpoint=_BYTES_A_PARAMETER * parameter_count(config),
        rank=bytes_per_rank(settled.layout, here.gpu).total,
        bfloat16=config.training.precision == "bfloat16",
        kept=config.checkpoint.keep,
    )
    return Plan(config, job, need, count, fault)


def judge_job(planned: Plan) -> Check:
    """Configuration, DeepSpeed configuration, number of ranks and data fit together."""
    if planned.fault:
        return Check("job", "FAIL", planned.fault, "mend what the message names: pretrain would refuse it, too")
    assert planned.config is not None
    name = planned.config.name
    if planned.job is None:
        return Check("job", "WARN", f"{name}: not held against data", "name it with --data")
    division = planned.job.division
    value = (
        f"{name}: {parameter_count(planned.config):,} parameters, batch {division.batch} = {division.world} ranks "
        f"x {division.micro_batch} x {division.accumulation} accumulated; {planned.job.how}"
    )
    return Check("job", "OK", value)


def read_data(folders: Sequence[str], validated: bool | None) -> dict[str, Any]:
    """Open each dataset (manifest, palette, sizes of all shards) and read some rows of each.

    Args:
        folders: which hold train/ and val/.
        validated: whether the run validates, on val/ of the first folder; None: no configuration is known.

    Returns:
        "value", what was found; "faults" and "warnings".
    """
    from igpt_ds.loading.splits import open_split

    faults, warnings, first, images = [], [], None, 0
    for number, folder in enumerate(folders):
        for split in ("train", "val"):
            wanted = split == "train" or (number == 0 and validated is True)
            if not wanted and not (Path(folder) / split).is_dir():
                if number == 0 and validated is None and Path(folder).is_dir():
                    warnings.append(f"{folder}: has no {split}/")
                continue
            try:
                dataset = open_split(folder, split)
                _read_some_rows(dataset)
            except UserError as error:
                faults.append(str(error))
                continue
            images += dataset.rows if split == "train" else 0
            first = first or dataset
            if dataset.palette.sha256 != first.palette.sha256:
                faults.append(f"{dataset.path}: another palette than {first.path}'s")
            if dataset.manifest.resolution != first.manifest.resolution:
                faults.append(
                    f"{dataset.path}: resolution {dataset.manifest.resolution}, but {first.path} has "
                    f"{first.manifest.resolution}"
                )
    value = ""
    if first is not None:
        value = (
            f"{images:,} images to train on, {first.manifest.resolution} x {first.manifest.resolution} in "
            f"{first.palette.k} colours; sizes right, {SAMPLED_ROWS} random rows of each split readable"
        )
    return {"value": value, "faults": list(dict.fromkeys(faults)), "warnings": warnings}


def _read_some_rows(dataset: Any) -> None:
    """Random rows: in range of the palette, and turned into pixels."""
    shards = dataset.manifest.shards
    pairs = []
    for shard in random.choices(range(len(shards)), weights=[shard.rows for shard in shards], k=SAMPLED_ROWS):
        pairs.append((shard, random.randrange(shards[shard].rows)))
    dataset.palette.decode(dataset.read_many(sorted(pairs)))


def judge_data(fact: dict[str, Any]) -> Check:
    """Datasets are whole in size, readable and alike; igpt-data verify reads every byte."""
    if fact["faults"]:
        return Check(
            "data", "FAIL", "; ".join(fact["faults"]), "igpt-data verify DATA/train reads every byte of a dataset"
        )
    if fact["warnings"]:
        value = "; ".join([*fact["warnings"], fact["value"]])
        return Check("data", "WARN", value, "build it with igpt-data shards, or set training.validate_every=0")
    return Check("data", "OK", f"{fact['value']} (igpt-data verify reads every byte)")


def read_run(path: Path, planned: Plan) -> dict[str, Any]:
    """What is in the run directory, and what of it would stop a pre-training that goes on with it.

    Returns:
        "value", "faults" and "warnings"; "present", the bytes of the checkpoints there.
    """
    from igpt_ds.checkpoint.names import list_checkpoints
    from igpt_ds.config.file import load_config
    from igpt_ds.run.directory import Run

    run = Run(path)
    faults, warnings = [], []
    checkpoints = list_checkpoints(run.checkpoints)
    present = sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir())
    try:
        run.require_writable()
        if run.config.exists():
            load_config(run.config)
        elif path.exists() and any(path.iterdir()):
            warnings.append(f"{path}: is not empty, but no run directory (no config.toml)")
    except UserError as error:
        faults.append(str(error))
    newest, damaged = _newest(checkpoints)
    if damaged:
        (warnings if newest else faults).append(damaged)
    if newest is not None:
        value = f"would go on from step {newest.step} (written by {counted(newest.world, 'rank')}; sizes right)"
        if planned.job is not None:
            faults += [
                f"{newest.path}: {key} was {newest.identity.get(key)}, but now is {now}"
                for key, now in planned.job.identity().items()
                if newest.identity.get(key) != now
            ]
    else:
        value = "no checkpoint yet" if path.exists() else f"{path} is to be made"
    return {"value": value, "faults": faults, "warnings": warnings, "present": present}


def _newest(checkpoints: Sequence[Path]) -> tuple[Any, str]:
    """The newest checkpoint that is whole in size, or None; and what is wrong with the very newest."""
    from igpt_ds.checkpoint.read import Checkpoint

    fault = ""
    for path in reversed(checkpoints):
        try:
            return Checkpoint.open(path), fault
        except UserError as error:
            fault = fault or str(error)
    return None, fault


def judge_run(fact: dict[str, Any]) -> Check:
    """The run directory can be written, and what it holds belongs to this job."""
    remedy = "igpt-ds checkpoints RUN tells of all of them"
    if fact["faults"]:
        return Check("run", "FAIL", "; ".join(fact["faults"]), f"mend what is named, or choose another RUN; {remedy}")
    if fact["warnings"]:
        return Check("run", "WARN", "; ".join([*fact["warnings"], fact["value"]]), remedy)
    return Check("run", "OK", fact["value"])
