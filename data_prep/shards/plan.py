"""What is to be built: a plan per split, whose fingerprint tells whether finished work may be kept.

The plan is written into the dataset directory before any shard; each shard's commit mark carries the plan's
fingerprint. The images of a source that lists them are ordered by a hash of (seed, image id), so that every shard
holds all classes. Of a streamed source the plan holds the names of the input files only, each of which becomes
shards of its own. The held-out share is chosen by a hash of the image id alone, so that another seed holds out
the same images.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import PIL

from data_prep.images.pieces import Piece, cut, pieces_of, unit_hash
from data_prep.selection.file import Selection
from data_prep.sources import Item, Pool, Source, StreamedSource, TokenSource
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.storage import storage_for
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import CROP, Transform, evaluation
from igpt_ds.reading import read_json

ROWS_PER_BLOCK = 256
CLASS_FILES = {"classes", "truth"}  # options of sources
POOL = "pool_sha256"  # of the ids of all images that a listed source's split is a share of
_MOST_SHARDS = 1_000_000  # of a split, each with its file and its mark
_TOKENS_AT_A_TIME = 512 << 20  # bytes, in all views of a listed source's slice

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Settings:
    """What the user chose for all splits."""

    resolution: int
    holdout: float
    views: int
    crop: bool
    seed: int
    rows_per_shard: int
    augment: bool = True
    exif: Literal["apply", "ignore"] = "apply"
    decoder: Literal["pillow", "fast"] = "pillow"
    storage: Literal["uint16", "packed9"] = "uint16"


@dataclass(frozen=True)
class Slice:
    """What one task builds.

    Attributes:
        views: that it writes: of an input file all, of listed images as many as its tokens' memory allows.
        piece: its images, in row order, or its input file.
        number: of the piece, of so many `pieces`.
    """

    split: Split
    views: tuple[int, ...]
    piece: Piece
    number: int
    pieces: int

    @property
    def name(self) -> str:
        """Of its first shard, or what the names of its shards begin with."""
        return f"{self.split}-{self.number:05d}" if self.piece.items is None else self.shard(0, self.views[0])

    def shard(self, number: int, view: int) -> str:
        """The name of the slice's shard of that number; of listed images, of which a view has one, that is 0."""
        if self.piece.items is not None:
            return f"{self.split}-{view * self.pieces + self.number:05d}"
        return f"{self.name}-{number * len(self.views) + view:03d}"


@dataclass(frozen=True)
class Plan:
    """One split's plan.

    Attributes:
        pieces: the split's images in row order, a shard's in each; or the input files of a streamed source.
        record: the choices that the bytes depend on, as JSON; they stand in DATA/SPLIT/plan.json.
    """

    split: Split
    source: Source
    settings: Settings
    transform: Transform
    views: int
    pieces: list[Piece]
    selection: Selection | None
    record: dict[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the record."""
        return fingerprint_of(self.record)

    @property
    def passes(self) -> int:
        """How often the split's images are read."""
        return len(self._groups)

    @property
    def _groups(self) -> list[tuple[int, ...]]:
        """The views that are made at a time, of one reading of the images."""
        if isinstance(self.source, StreamedSource):
            return [tuple(range(self.views))]
        tokens = 2 * self.settings.resolution**2 * len(self.pieces[0].items or ())
        size = max(1, _TOKENS_AT_A_TIME // tokens)
        return [tuple(range(first, min(first + size, self.views))) for first in range(0, self.views, size)]

    def slices(self, limit: int | None = None) -> Iterator[Slice]:
        """What is to be built, piece by piece; `limit`: only the first so many of each view."""
        for views in self._groups:
            for number, piece in enumerate(self.pieces[:limit]):
                yield Slice(self.split, views, piece, number, len(self.pieces))

    def images(self, limit: int | None = None) -> int | None:
        """How many images a view's slices have; None where it is not known before they are read."""
        if isinstance(self.source, StreamedSource):
            return None
        return sum(len(piece.names) for piece in self.pieces[:limit])

    def difference(self, directory: Path) -> str | None:
        """How the plan in a dataset directory differs from this one, in words; None when they agree."""
        other = read_record(directory)
        if other is None:
            return "it holds no readable plan.json"
        mine, other = _meaning(self.record), _meaning(other)
        differing = [key for key in sorted({**mine, **other}) if mine.get(key) != other.get(key)]
        return (
            ", ".join(f"{key} was {_short(other.get(key))} and is {_short(mine.get(key))}" for key in differing) or None
        )

    def of_other_views(self, directory: Path) -> dict[str, Any] | None:
        """The plan in a directory, as its record, if it is this one but for the number of views.

        None of a streamed source: the views of an input file take turns, so other numbers of them have other shards.
        """
        other = read_record(directory)
        if not other or isinstance(self.source, StreamedSource) or type(other.get("views")) is not int:
            return None
        same = _meaning({**other, "views": self.views}) == _meaning(self.record)
        return other if same and other["views"] != self.views else None

    def as_begun(self, directory: Path) -> "Plan":
        """This plan in the words of the one in a directory, if that means the same: its shards bear its fingerprint."""
        other = read_record(directory)
        return self if other is None or _meaning(other) != _meaning(self.record) else replace(self, record=other)


def fingerprint_of(record: dict[str, Any]) -> str:
    """Hex sha256 of a plan's record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _meaning(record: dict[str, Any]) -> dict[str, Any]:
    """Without what other splits hold, and names of files of classes or labels, which the plan holds itself."""
    record = {name: value for name, value in record.items() if name != POOL}
    if isinstance(options := record.get("options"), dict):
        record["options"] = {name: value for name, value in options.items() if name not in CLASS_FILES}
    return record


def read_record(directory: Path) -> dict[str, Any] | None:
    """The plan that stands in a dataset directory; None where there is none."""
    try:
        record = read_json(directory / "plan.json")
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else {}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def belongs(split: Split, holdout: float) -> Callable[[str], bool]:
    """Does an image of the split's pool, by its id, belong to the split?"""
    if split == "test" or holdout == 0:
        return lambda _: split != "val"
    return lambda image_id: (unit_hash("holdout", image_id) < holdout) == (split == "val")


def make_plans(
    source: Source,
    palette: Palette,
    settings: Settings,
    splits: tuple[Split, ...],
    selection: Selection | None = None,
    options: dict[str, str] | None = None,
) -> list[Plan]:
    """Plan each split.

    Args:
        selection: only its images are built.
        options: that the source was opened with, for the record.
    """
    _check(settings, splits)
    if isinstance(source, TokenSource) and (settings.crop or settings.resolution != source.side):
        raise UserError(
            f"{source.name}: images of {source.side} x {source.side} tokens, which are taken as they are: "
            f"add --no-crop --resolution {source.side}"
        )
    storage_for(settings.storage, palette.k)  # refuses what it cannot hold
    if selection and selection.source != source.name:
        raise UserError(
            f"{selection.path}: was made from {selection.source}, not from {source.name}: select from this source"
        )
    pools: dict[Pool, tuple[list[Item] | list[Piece], str | None]] = {}
    plans = []
    for split in splits:
        pool: Pool = "test" if split == "test" else "train"
        if pool not in pools:
            pools[pool] = _pool(source, pool, selection)
        transform = _transform(split, settings)
        plans.append(_plan(split, source, *pools[pool], palette, settings, transform, selection, options or {}))
    return plans


def _transform(split: Split, settings: Settings) -> Transform:
    if split == "train" and settings.augment and settings.crop:
        return Transform("random", settings.resolution, settings.seed, exif=settings.exif, decoder=settings.decoder)
    return evaluation(settings.resolution, settings.crop, exif=settings.exif, decoder=settings.decoder)


def _check(settings: Settings, splits: tuple[Split, ...]) -> None:
    if settings.crop and settings.resolution > CROP:
        raise UserError(
            f"--resolution {settings.resolution}: larger than the crop of {CROP} pixels: "
            "choose a smaller one, or --no-crop for square images"
        )
    if settings.views > 1 and not (settings.crop and settings.augment):
        raise UserError(
            f"--views {settings.views}: without random crops all views are the same: "
            "leave out --views, or --no-crop and --no-augment"
        )
    if "val" in splits and settings.holdout == 0:
        raise UserError("--split val: --holdout 0 holds nothing out: give a share, or leave out --split val")


def _pool(source: Source, pool: Pool, selection: Selection | None) -> tuple[list[Item] | list[Piece], str | None]:
    """What a pool holds of the selection and, of listed images, a hash of the ids of all."""
    found = pieces_of(source, pool, 0) if isinstance(source, StreamedSource) else source.items(pool)
    if not found:
        raise UserError(
            f"{source.name}: has no images for --split {pool}: leave it out, or mend the path "
            "or the names in it, which tell train from test (docs/data.md)"
        )
    if isinstance(source, StreamedSource):
        missing = [
            piece.part for piece in cast(list[Piece], found) if selection and piece.part not in selection.members
        ]
        if selection and missing:
            raise UserError(
                f"{selection.path}: was made without {missing[0]}: select again from all that is to be built"
            )
        return found, None
    ids = "\0".join(sorted(item.id for item in cast(list[Item], found)))
    content = hashlib.sha256(ids.encode("utf-8", "surrogateescape")).hexdigest()
    if selection is None:
        return found, content
    kept = selection.kept("")
    items = [item for item in cast(list[Item], found) if item.id.encode("utf-8", "surrogateescape") in kept]
    if len(items) != len(kept):
        raise missing_selected(selection, source.name, len(kept) - len(items), len(kept))
    return items, content


def missing_selected(selection: Selection, where: str, missing: int, of: int) -> UserError:
    """The input has changed since the selection was made."""
    return UserError(f"{where}: {missing} of the {of} images that {selection.path} keeps are not there: select again")


def _plan(
    split: Split,
    source: Source,
    pool: list[Item] | list[Piece],
    pool_sha256: str | None,
    palette: Palette,
    settings: Settings,
    transform: Transform,
    selection: Selection | None,
    options: dict[str, str],
) -> Plan:
    content = hashlib.sha256()
    views = settings.views if split == "train" else 1
    record: dict[str, Any] = {
        "source": source.name,
        "options": options,
        "split": split,
        "classes": source.classes,
        "selection_sha256": selection.sha256 if selection else None,
        "palette_sha256": palette.sha256,
        "views": views,
        "holdout": None if split == "test" else settings.holdout,
        "seed": settings.seed,
        "transform": transform.record(),
        "storage": settings.storage,
        "rows_per_shard": settings.rows_per_shard,
        "rows_per_block": ROWS_PER_BLOCK,
        "pillow": PIL.__version__,  # another release may decode and resize to other pixels
    }
    if isinstance(source, StreamedSource):
        pieces = cast(list[Piece], pool)
        for piece in pieces:
            content.update(f"{piece.part}\0".encode("utf-8", "surrogateescape"))
        record |= {"parts": len(pieces), "parts_sha256": content.hexdigest()}
    else:
        every = cast(list[Item], pool)
        mine = belongs(split, settings.holdout)
        order = f"order {settings.seed}"
        items = sorted((item for item in every if mine(item.id)), key=lambda item: (unit_hash(order, item.id), item.id))
        if not every and selection:
            raise UserError(f"{selection.path}: keeps no image: select again")
        if (shards := -(-len(items) // settings.rows_per_shard) * views) > _MOST_SHARDS:
            raise UserError(
                f"--rows-per-shard {settings.rows_per_shard}: {shards:,} shards in {views} view(s) for {split}: "
                "choose larger shards, or fewer views"
            )
        if not items:
            raise no_images(split, settings.holdout, len(every))
        for item in items:
            content.update(f"{item.label}\0{item.id}\0".encode("utf-8", "surrogateescape"))
        record |= {"images": len(items), "images_sha256": content.hexdigest(), POOL: pool_sha256}
        pieces = cut(items, settings.rows_per_shard)
    return Plan(split, source, settings, transform, views, pieces, selection, record)


def no_images(split: Split, holdout: float, pool: int | None = None) -> UserError:
    """A split that is empty; `pool`: the images that were to be shared out."""
    which = "validation" if split == "val" else "training"
    many = "all" if pool is None else str(pool)
    return UserError(
        f"--holdout {holdout:g}: of {many} images none is left for {which}: "
        "choose another share, or 0 for no validation"
    )
