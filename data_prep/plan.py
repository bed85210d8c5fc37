"""What is to be built: a plan per split, whose fingerprint tells whether finished work may be kept.

The plan is written into the dataset directory before any shard; each shard's commit mark carries the plan's
fingerprint. Rows are ordered by a hash of (seed, image id), so that every shard holds all classes, and the
held-out share is chosen by a hash of the image id alone, so that another seed holds out the same images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from data_prep.sources import Item, Source
from data_prep.transforms import CROP, Transform, evaluation
from igpt_ds.errors import UserError
from igpt_ds.palette import Palette

ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Settings:
    """What the user chose for both splits."""

    resolution: int
    holdout: float
    views: int
    crop: bool
    seed: int
    rows_per_shard: int


@dataclass(frozen=True)
class Plan:
    """One split's plan.

    Attributes:
        split: "train" or "val".
        items: its images in row order.
        shards: (name, view, first item, last item + 1) of every shard.
        id_width: bytes of the longest id.
        record: the choices that the bytes depend on, as JSON; they stand in DATA/SPLIT/plan.json.
    """

    split: str
    items: list[Item]
    transform: Transform
    shards: list[tuple[str, int, int, int]]
    id_width: int
    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the record."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def difference(self, directory: Path) -> str | None:
        """How the plan in a dataset directory differs from this one, in words; None when they agree."""
        try:
            other = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "it holds no readable plan.json"
        if other == self.record:
            return None
        other = other if isinstance(other, dict) else {}
        mine = self.record
        return ", ".join(
            f"{key} was {_short(other.get(key))} and is {_short(mine.get(key))}"
            for key in sorted({**mine, **other})
            if mine.get(key) != other.get(key)
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unit_hash(purpose: str, image_id: str) -> float:
    """A number in [0, 1) from a hash of the id; `purpose` keeps different uses independent."""
    key = f"{purpose}\0{image_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / (1 << 48)


def make_plans(source: Source, palette: Palette, settings: Settings) -> list[Plan]:
    """Split a source's images and plan "train" and, where anything is held out, "val".

    Raises:
        UserError: settings out of range, or a split without images.
    """
    _check(settings)
    items = sorted(source.items(), key=lambda item: (_unit_hash(f"order {settings.seed}", item.id), item.id))
    held_out = [item for item in items if _unit_hash("holdout", item.id) < settings.holdout]
    kept = [item for item in items if _unit_hash("holdout", item.id) >= settings.holdout]
    if not kept or (settings.holdout > 0 and not held_out):
        which = "validation" if kept else "training"
        raise UserError(
            f"--holdout {settings.holdout:g}: of {len(items)} images none is left for {which}: "
            "choose another share, or 0 for no validation"
        )
    crop = Transform("random" if settings.crop else "none", settings.resolution, settings.seed)
    plans = [_plan("train", source, kept, palette, settings, transform=crop, views=settings.views)]
    if held_out:
        transform = evaluation(settings.resolution, settings.crop)
        plans.append(_plan("val", source, held_out, palette, settings, transform=transform, views=1))
    return plans


def _check(settings: Settings) -> None:
    if settings.crop and settings.resolution > CROP:
        raise UserError(
            f"--resolution {settings.resolution}: larger than the crop of {CROP} pixels: "
            "choose a smaller one, or --no-crop for square images"
        )
    if settings.views > 1 and not settings.crop:
        raise UserError(
            f"--views {settings.views}: without the crop step all views are the same: leave out --views or --no-crop"
        )


def _plan(
    split: str,
    source: Source,
    items: Sequence[Item],
    palette: Palette,
    settings: Settings,
    *,
    transform: Transform,
    views: int,
) -> Plan:
    step = settings.rows_per_shard
    starts = range(0, len(items), step)
    shards = [
        (f"{split}-{view * len(starts) + i:05d}", view, start, min(start + step, len(items)))
        for view in range(views)
        for i, start in enumerate(starts)
    ]
    content = hashlib.sha256()
    for item in items:
        content.update(f"{item.label}\0{item.id}\0".encode("utf-8", "surrogateescape"))
    record = {
        "source": source.name,
        "split": split,
        "images": len(items),
        "images_sha256": content.hexdigest(),
        "classes": source.classes,
        "palette_sha256": palette.sha256,
        "views": views,
        "holdout": settings.holdout,
        "seed": settings.seed,
        "transform": transform.record(),
        "rows_per_shard": step,
        "rows_per_block": ROWS_PER_BLOCK,
        "pillow": PIL.__version__,  # another release may decode and resize to other pixels
    }
    width = max(len(item.id.encode("utf-8", "surrogateescape")) for item in items)
    return Plan(split, list(items), transform, shards, width, record)
