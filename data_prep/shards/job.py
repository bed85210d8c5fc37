"""One build of dataset directories: what is to be done, and the manifests made of the commit marks at the end.

The manifest is made of the marks alone, so that it does not matter where, how often or in what order the slices
were built: the bytes depend on the plan. A build that was killed continues; shards whose mark carries the same
plan and whose bytes have the recorded hash are kept.

A trial (`max_shards`) builds the first slices of the same plan and a manifest of them, beside which `trial.json`
says how many they are; a later build of the whole keeps them.

Whoever builds here holds the lock of each split's directory, and has written its text into the file `.build` there.
Jobs of a cluster outlive the process that submitted them, and its locks: they may publish for as long as `.build` is
that of their build.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_prep.images.rejects import Tally
from data_prep.selection.file import Selection
from data_prep.shards.marks import adopt
from data_prep.shards.mismatch import refuse_mismatch
from data_prep.shards.plan import ROWS_PER_BLOCK, Plan, Settings, Split, fingerprint_of, make_plans, no_images
from data_prep.shards.task import OWNER, UNKNOWN, ShardTask, committed, records, task_of
from data_prep.sources import PlacedSource, Source, StreamedSource, TokenSource
from igpt_ds import __version__
from igpt_ds.atomic import fsync_directory, publish_file, publish_text, writing
from igpt_ds.dataset.manifest import Manifest, ShardRecord
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.lock import NAME, Lock, read, require
from igpt_ds.reading import read_json
from igpt_ds.text import visible

# A split's directory with its manifest, or None where it was there already, complete.
Results = list[tuple[Path, Manifest | None]]


@dataclass(frozen=True)
class Build:
    """A build of some splits below `out`, wherever its tasks run; picklable.

    Attributes:
        plans: of all splits that were asked for.
        to_do: those splits of them that are not there already, complete.
        created: directories that were not there before.
        token: of the build; nothing is published once another has begun. "" before it has begun.
    """

    out: Path
    palette: Palette
    plans: list[Plan]
    to_do: list[Split]
    created: list[Path]
    stale: Path | None
    max_shards: int | None
    max_reject_rate: float
    force: bool
    token: str = ""

    @property
    def images(self) -> int | None:
        """How many images all splits have, each counted once; None where it is not known."""
        counts = [plan.images(self.max_shards) for plan in self.plans]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def planned(self) -> list[Plan]:
        """The plans of the splits that are to be built."""
        return [plan for plan in self.plans if plan.split in self.to_do]

    def directory(self, plan: Plan) -> Path:
        """Of a plan's split."""
        return self.out / plan.split

    def tasks(self, plan: Plan) -> Iterator[ShardTask]:
        """A split's tasks, made as they are asked for."""
        images = self.images
        for piece in plan.slices(self.max_shards):
            yield task_of(plan, piece, self.directory(plan), self.palette, images, self.max_reject_rate, self.token)

    @contextmanager
    def owned(self) -> Iterator["Build"]:
        """This build as the only one of its splits.

        Raises:
            UserError: another process builds one of them.
        """
        directories = [self.directory(plan) for plan in self.planned]
        with ExitStack() as stack:
            locks: list[Lock] = []
            try:
                for directory in [*directories, *([self.stale] if self.stale and self.stale.is_dir() else [])]:
                    with writing(directory):
                        directory.mkdir(parents=True, exist_ok=True)
                    locks.append(Lock.take(directory))
                    stack.callback(locks[-1].release)
            except UserError:
                for path in reversed(self.created):
                    with suppress(OSError):
                        path.rmdir()
                raise
            yield replace(self, token=locks[0].token if locks else "")

    def joined(self) -> "Build":
        """This build, whose jobs another process has submitted."""
        owners = [read(self.directory(plan) / OWNER) for plan in self.planned]
        return replace(self, token=next((owner.token for owner in owners if owner), ""))

    def prepare(self) -> None:
        """Make the splits' directories ready: nothing of another plan in them, and no manifest until the end."""
        places = {self.directory(plan) for plan in self.planned}
        again = {place for place in places if (place / "manifest.json").exists() or (place / OWNER).exists()}
        for plan in self.planned if self.token else ():
            owner = (self.directory(self.planned[0]) / NAME).read_text(encoding="utf-8")
            publish_text(self.directory(plan) / OWNER, owner)
        if self.stale:
            _clear(self.stale, "val")
        for plan in self.planned:
            directory = self.directory(plan)
            if not self.force:
                _refuse_other(plan, directory)  # it may have been built since this build was planned
            difference = plan.difference(directory)
            shards = len(list(directory.glob(f"{plan.split}-?????*.tar")))
            if not self.force and (other := plan.of_other_views(directory)):
                difference = None
                told = (
                    f"{directory}: was of {other['views']} view(s), now {plan.views}: shards of views in both are kept"
                )
                sys.stderr.write(visible(f"igpt-data: {told}") + "\n")
                count = plan.views * len(plan.pieces)
                adopt(directory, plan.split, fingerprint_of(other), plan.fingerprint, count)
            if difference and shards and not self.force:
                told = f"{directory}: {shards} shards of another plan's unfinished build are removed: {difference}"
                sys.stderr.write(visible(f"igpt-data: {told}") + "\n")
            if self.force or difference:
                _clear(directory, plan.split)
            with writing(directory):
                for name in ("manifest.json", "trial.json"):
                    (directory / name).unlink(missing_ok=True)
                for path in directory.glob(".*.tmp"):  # what a killed build left behind
                    path.unlink(missing_ok=True)
                fsync_directory(directory)
            if directory in again and not isinstance(plan.source, StreamedSource):
                # Damaged since it was complete, or of an older version: what its images were is not known any more.
                for piece in plan.slices():
                    stamp = directory / f".{piece.name}.input"
                    if (directory / f"{piece.name}.json").exists() and not stamp.exists():
                        publish_text(stamp, UNKNOWN)
            publish_text(directory / "plan.json", json.dumps(plan.record, indent=1) + "\n")
            self.palette.save(directory / "palette.npy")

    def finish(self) -> Results:
        """Merge the marks of all slices into the manifests: of all splits, or of none."""
        merged = {plan.split: self._merge(plan) for plan in self.planned}
        whole = Tally()
        for tally, *_ in merged.values():
            whole.add(tally)
        whole.judge(self.max_reject_rate, self.images or whole.seen)
        for plan in self.planned:
            if not merged[plan.split][1]:
                raise self._nothing(plan, merged[plan.split][0])
        manifests = {plan.split: self._publish(plan, *merged[plan.split]) for plan in self.planned}
        for plan in self.planned:
            (self.directory(plan) / OWNER).unlink(missing_ok=True)
            if not _is_trial(plan, self.max_shards):  # which the whole goes on from
                for path in self.directory(plan).glob(f".{plan.split}-*.input"):
                    path.unlink(missing_ok=True)
        return [(self.directory(plan), manifests.get(plan.split)) for plan in self.plans]

    def made(self) -> Results | None:
        """What `finish` gave elsewhere; None where it has not run."""
        if not all(_complete(self.directory(plan), plan, self.max_shards) for plan in self.planned):
            return None
        manifests = {plan.split: Manifest.load(self.directory(plan)) for plan in self.planned}
        return [(self.directory(plan), manifests.get(plan.split)) for plan in self.plans]

    def clean_up(self) -> None:
        """After a failure: finished shards are kept for the next run, but not a dataset without any."""
        small = self.images is not None and all(self.images < plan.settings.rows_per_shard for plan in self.plans)
        # Less than one full shard's work is not worth a half dataset.
        if small or not any(any(path.glob("*.tar")) for path in self.created):
            for path in reversed(self.created):
                if path != self.out:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.rmdir()  # unless another split is there

    def _merge(self, plan: Plan) -> tuple[Tally, list[ShardRecord], float]:
        """What the marks say: images, shards, the palette's squared error in all of them.

        The rejects go into a file, for there may be millions.
        """
        directory, tally = self.directory(plan), Tally()
        require(directory / OWNER, self.token)
        shards: list[ShardRecord] = []
        squared_error = 0.0
        with publish_file(directory / "rejects.jsonl") as file:
            for task in self.tasks(plan):
                marks = committed(task, thorough=False)
                if not marks or not marks[-1].last:
                    raise UserError(f"{directory}: {task.slice.name} is not built: the same command again continues")
                for record, error in records(task, marks):
                    shards.append(record)
                    squared_error += error
                if task.slice.views[0] != 0:
                    continue  # The other views reject the same images.
                tally.seen += marks[-1].seen
                for rejected in (each for mark in marks for each in mark.rejected):
                    tally.reject(rejected)
                    file.write(json.dumps(rejected._asdict()).encode() + b"\n")
        if not tally.rejected:
            (directory / "rejects.jsonl").unlink(missing_ok=True)
        return tally, sorted(shards, key=lambda shard: shard.view), squared_error

    def _nothing(self, plan: Plan, tally: Tally) -> UserError:
        if tally.seen:
            return UserError(f"{self.directory(plan)}: every image was rejected: look at the images of the source")
        if _is_trial(plan, self.max_shards):
            return UserError(
                f"--max-shards {self.max_shards}: no image for {plan.split} in so few: "
                f"raise it, or leave {plan.split} out with --split"
            )
        if not any(self._merge(each)[0].seen for each in self.planned):
            first, more = plan.pieces[0].part, len(plan.pieces) - 1
            first = plan.source.place(first) if isinstance(plan.source, PlacedSource) else first
            files = f"{first} and {more} more files" if more else first
            image = plan.record["options"].get("image")
            remedy = f"mend --option image={image}, or the path" if image else "mend the path"
            return UserError(f"{plan.source.name}: no images in {files}: {remedy}")
        return no_images(plan.split, plan.settings.holdout)

    def _publish(self, plan: Plan, tally: Tally, shards: list[ShardRecord], squared_error: float) -> Manifest:
        record: dict[str, Any] = plan.record
        resolution = plan.settings.resolution
        pixels = sum(shard.rows for shard in shards) * resolution**2
        # Six digits: the last ones of a sum may differ between processors, the manifest's bytes must not.
        distortion = {"distortion": float(f"{squared_error / pixels:.6g}")}
        if isinstance(plan.source, TokenSource):
            distortion = {}  # their pixels are not known
        manifest = Manifest(
            rows=tally.seen - tally.rejected,
            sequence_length=resolution**2,
            resolution=resolution,
            rows_per_block=ROWS_PER_BLOCK,
            storage=plan.settings.storage,
            palette={"k": self.palette.k, "sha256": self.palette.sha256, **distortion},
            source=record["source"],
            split=plan.split,
            views=plan.views,
            transform=record["transform"],
            seed=record["seed"],
            classes=record["classes"],
            versions={"igpt_ds": __version__, "numpy": np.__version__, "pillow": PIL.__version__},
            rejected=tally.rejected,
            shards=shards,
        )
        if _is_trial(plan, self.max_shards):
            publish_text(self.directory(plan) / "trial.json", json.dumps({"max_shards": self.max_shards}) + "\n")
        require(self.directory(plan) / OWNER, self.token)
        manifest.save(self.directory(plan))
        return manifest


def begin(
    source: Source,
    out: Path,
    palette: Palette,
    settings: Settings,
    *,
    splits: tuple[Split, ...] | None = None,
    selection: Selection | None = None,
    options: dict[str, str] | None = None,
    max_shards: int | None = None,
    max_reject_rate: float = 0.0,
    force: bool = False,
) -> Build:
    """Plan a build of OUT/SPLIT for each split and look at what OUT holds; nothing is written.

    Args:
        splits: "train" is the pool "train" without the share that is held out, "val" that share, "test" the pool
            "test". By default train, and val where anything is held out.
        selection: only its images are built.
        options: that the source was opened with; they are recorded in the plan.
        max_shards: a trial: only the first so many shards of each view; of a streamed source, those of the first
            so many input files.
        max_reject_rate: the share of images that may be skipped because they cannot be read.
        force: build anew over whatever OUT holds.
    """
    default: tuple[Split, ...] = ("train", "val") if settings.holdout > 0 else ("train",)
    chosen = splits or default
    planned = make_plans(source, palette, settings, chosen, selection, options)
    plans = [plan.as_begun(out / plan.split) for plan in planned]
    stale = out / "val" if "train" in chosen and settings.holdout == 0 else None
    if not force:
        for plan in plans:
            _refuse_other(plan, out / plan.split)
        if stale and (stale / "manifest.json").exists():
            raise UserError(
                f"{stale}: is there, but --holdout 0 makes no validation split: "
                "choose another --out, or --force to replace it"
            )
    others: list[Split] = [each for each in ("train", "val", "test") if each not in chosen]
    for other in others:
        if not (force and stale == out / other):  # that one goes
            for plan in plans:
                refuse_mismatch(plan, out / other, other)
    return Build(
        out=out,
        palette=palette,
        plans=plans,
        to_do=[plan.split for plan in plans if force or not _complete(out / plan.split, plan, max_shards)],
        created=[path for path in (out, *(out / plan.split for plan in plans)) if not path.exists()],
        stale=stale,
        max_shards=max_shards,
        max_reject_rate=max_reject_rate,
        force=force,
    )


def _refuse_other(plan: Plan, directory: Path) -> None:
    difference = plan.difference(directory)
    if difference is None or not directory.is_dir():
        return
    other = plan.of_other_views(directory)
    if (directory / "manifest.json").exists() and not (other and other["views"] < plan.views):
        raise UserError(
            f"{directory}: holds another dataset ({difference}): choose another --out, or --force to replace it"
        )
    # An unfinished build of ours has its plan. Anything else is not ours to clear away.
    if not (directory / "plan.json").exists() and any(directory.glob("[!.]*")):
        raise UserError(f"{directory}: is not empty and no unfinished build: choose another --out")


def _is_trial(plan: Plan, max_shards: int | None) -> bool:
    return max_shards is not None and max_shards < len(plan.pieces)


def _complete(directory: Path, plan: Plan, max_shards: int | None) -> bool:
    """Is all there that is asked for?"""
    if plan.difference(directory) is not None:
        return False
    try:
        Dataset.open(directory)
        trial = read_json(directory / "trial.json")
    except FileNotFoundError:
        return True
    except (UserError, OSError, ValueError):
        return False
    return bool(_is_trial(plan, max_shards) and trial == {"max_shards": max_shards})


def _clear(directory: Path, split: str) -> None:
    """Remove a dataset, its manifest first; files of other names stay."""
    with writing(directory):
        (directory / "manifest.json").unlink(missing_ok=True)
        for path in [
            *directory.glob(f"{split}-?????*.tar"),
            *directory.glob(f"{split}-?????*.json"),
            *directory.glob(f".{split}-*.input"),
        ]:
            path.unlink(missing_ok=True)
        for name in ("palette.npy", "plan.json", "rejects.jsonl", "trial.json"):
            (directory / name).unlink(missing_ok=True)
