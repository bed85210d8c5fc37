"""Build dataset directories from a source: plan, build each shard, write the manifest last.

A shard is built by a pure function of its task (`build_shard`), which publishes it and its commit mark. A
build that was killed continues: shards whose mark carries the same plan and whose bytes have the recorded
hash are kept. The bytes depend on the plan alone, never on how often or in what order shards were built.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from data_prep.plan import ROWS_PER_BLOCK, Plan, Settings, make_plans
from data_prep.rejects import Rejected, Rejects, pixels
from data_prep.sources import Item, Source
from data_prep.transforms import Transform
from igpt_ds import __version__
from igpt_ds.atomic import fsync_directory, publish_text, sha256_file, writing
from igpt_ds.errors import UserError
from igpt_ds.manifest import Manifest, ShardRecord
from igpt_ds.palette import Palette
from igpt_ds.shards import Dataset, read_mark, write_shard


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to build one shard; picklable."""

    directory: Path
    name: str
    view: int
    plan: str  # the plan's fingerprint
    palette: Palette
    source: Source
    items: list[Item]
    transform: Transform
    id_width: int
    images: int  # of the whole job: what the reject rate is a share of
    max_reject_rate: float


@dataclass(frozen=True)
class ShardResult:
    """A built shard (None: no image could be used) and the images that could not."""

    record: ShardRecord | None
    rejected: list[Rejected]


def build_shard(task: ShardTask, tick: Callable[[], object] | None = None) -> ShardResult:
    """Read, transform, encode and publish the images of one shard, in their order.

    Raises:
        UserError: more images are rejected than allowed in the whole job, or the shard cannot be written.
    """
    rejects = Rejects(task.images, task.max_reject_rate)
    tokens, kept = [], []
    for item in task.items:
        found = pixels(task.source, item.id, task.transform, task.view)
        if isinstance(found, np.ndarray):
            tokens.append(task.palette.encode(found).reshape(-1))
            kept.append(item)
        else:
            rejects.add([found])
        if tick:
            tick()
    if not kept:
        return ShardResult(None, rejects.found)
    ids = [item.id.encode("utf-8", "surrogateescape") for item in kept]
    labels = None
    if task.source.classes is not None:
        labels = np.array([item.label for item in kept], np.int64)
    record = write_shard(
        task.directory,
        task.name,
        np.stack(tokens),
        np.array(ids, dtype=f"S{task.id_width}"),
        labels,
        rows_per_block=ROWS_PER_BLOCK,
        view=task.view,
        note={"plan": task.plan, "rejected": [list(rejected) for rejected in rejects.found]},
    )
    return ShardResult(record, rejects.found)


def committed(task: ShardTask) -> ShardResult | None:
    """The shard of a task from an earlier run, if it was committed by the same plan and is still whole."""
    mark = read_mark(task.directory, task.name)
    if mark is None:
        return None
    record, note = mark
    path = task.directory / f"{task.name}.tar"
    try:
        whole = path.stat().st_size == record.bytes and sha256_file(path) == record.sha256
        if whole and note["plan"] == task.plan:
            return ShardResult(record, [Rejected(*each) for each in note["rejected"]])
    except (OSError, KeyError, TypeError):
        pass
    return None


def build(
    source: Source,
    out: Path,
    palette: Palette,
    settings: Settings,
    *,
    max_reject_rate: float = 0.0,
    force: bool = False,
    tick: Callable[[], object] | None = None,
    start: Callable[[int], object] | None = None,
) -> list[tuple[Path, Manifest | None]]:
    """Build OUT/train and, where anything is held out, OUT/val.

    Args:
        force: build anew over whatever OUT holds.
        tick: called after each image.
        start: called once, with the number of images (views counted) that are to be read.

    Returns:
        Each split's directory with its manifest, or None where it was there already, complete.

    Raises:
        UserError: settings out of range, OUT holds another dataset, too many rejects, OUT cannot be written.
    """
    plans = make_plans(source, palette, settings)
    stale = out / "val" if len(plans) == 1 else None
    if not force:
        for plan in plans:
            _refuse_other(plan, out / plan.split)
        if stale and (stale / "manifest.json").exists():
            raise UserError(
                f"{stale}: is there, but --holdout 0 makes no validation split: "
                "choose another --out, or --force to replace it"
            )
    created = [path for path in (out, *(out / plan.split for plan in plans)) if not path.exists()]
    to_do = [plan for plan in plans if force or not _complete(out / plan.split, plan)]
    images = sum(len(plan.items) for plan in plans)
    try:
        if stale:
            _clear(stale, "val")
        tasks = {}
        for plan in to_do:
            _prepare(plan, out / plan.split, palette, force)
            tasks[plan.split] = _tasks(
                plan, out / plan.split, source, palette, images=images, max_reject_rate=max_reject_rate
            )
        found = {task.name: committed(task) for split in tasks.values() for task in split}
        if start:
            start(sum(len(task.items) for split in tasks.values() for task in split if not found[task.name]))
        rejects = Rejects(images, max_reject_rate)
        built: dict[str, list[ShardResult]] = {}
        for name, split in tasks.items():
            built[name] = []
            for task in split:
                result = found[task.name] or build_shard(task, tick)
                built[name].append(result)
                # The other views reject the same images.
                rejects.add(result.rejected if task.view == 0 else ())
        # Only now: the manifests of both splits, or of none.
        manifests = {plan.split: _finish(plan, out / plan.split, palette, built[plan.split]) for plan in to_do}
    except UserError:
        # Finished shards are kept for the next run; less than one full shard's work is not worth a half dataset.
        if images < settings.rows_per_shard or not any(out.glob("*/*.tar")):
            for path in reversed(created):
                shutil.rmtree(path, ignore_errors=True)
        raise
    return [(out / plan.split, manifests.get(plan.split)) for plan in plans]


def _refuse_other(plan: Plan, directory: Path) -> None:
    difference = plan.difference(directory)
    if difference is None or not directory.is_dir():
        return
    if (directory / "manifest.json").exists():
        raise UserError(
            f"{directory}: holds another dataset ({difference}): choose another --out, or --force to replace it"
        )
    # An unfinished build of ours has its plan. Anything else is not ours to clear away.
    if not (directory / "plan.json").exists() and any(directory.glob("[!.]*")):
        raise UserError(f"{directory}: is not empty and no unfinished build: choose another --out")


def _complete(directory: Path, plan: Plan) -> bool:
    try:
        Dataset.open(directory)
    except UserError:
        return False
    return plan.difference(directory) is None


def _prepare(plan: Plan, directory: Path, palette: Palette, force: bool) -> None:
    """Make a split's directory ready: nothing of another plan in it, and no manifest until the end."""
    if force or plan.difference(directory):
        _clear(directory, plan.split)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "manifest.json").unlink(missing_ok=True)
        for path in directory.glob(".*.tmp"):  # what a killed build left behind
            path.unlink()
        fsync_directory(directory)
    publish_text(directory / "plan.json", json.dumps(plan.record, indent=1) + "\n")
    palette.save(directory / "palette.npy")


def _tasks(
    plan: Plan, directory: Path, source: Source, palette: Palette, *, images: int, max_reject_rate: float
) -> list[ShardTask]:
    return [
        ShardTask(
            directory=directory,
            name=name,
            view=view,
            plan=plan.fingerprint,
            palette=palette,
            source=source,
            items=plan.items[first:last],
            transform=plan.transform,
            id_width=plan.id_width,
            images=images,
            max_reject_rate=max_reject_rate,
        )
        for name, view, first, last in plan.shards
    ]


def _finish(plan: Plan, directory: Path, palette: Palette, built: list[ShardResult]) -> Manifest:
    shards = [result.record for result in built if result.record is not None]
    first_view = zip(built, plan.shards, strict=True)
    rejected = [each for result, (_, view, _, _) in first_view if view == 0 for each in result.rejected]
    if not shards:
        raise UserError(f"{directory}: every image was rejected: look at the images of the source")
    if rejected:
        lines = "".join(json.dumps(each._asdict()) + "\n" for each in rejected)
        publish_text(directory / "rejects.jsonl", lines)
    record = plan.record
    resolution = record["transform"]["resolution"]
    manifest = Manifest(
        rows=len(plan.items) - len(rejected),
        sequence_length=resolution**2,
        resolution=resolution,
        rows_per_block=ROWS_PER_BLOCK,
        storage="uint16",
        palette={"k": palette.k, "sha256": palette.sha256},
        source=record["source"],
        split=plan.split,
        views=record["views"],
        transform=record["transform"],
        seed=record["seed"],
        classes=record["classes"],
        versions={"igpt_ds": __version__, "numpy": np.__version__, "pillow": PIL.__version__},
        rejected=len(rejected),
        shards=shards,
    )
    manifest.save(directory)
    return manifest


def _clear(directory: Path, split: str) -> None:
    """Remove a dataset, its manifest first; files of other names stay."""
    with writing(directory):
        (directory / "manifest.json").unlink(missing_ok=True)
        for path in [*directory.glob(f"{split}-?????*.tar"), *directory.glob(f"{split}-?????*.json")]:
            path.unlink()
        for name in ("palette.npy", "plan.json", "rejects.jsonl"):
            (directory / name).unlink(missing_ok=True)
