"""The splits of one directory are one data set: what is refused of a split that is built beside others."""

from pathlib import Path
from typing import Any

from data_prep.shards.plan import CLASS_FILES, POOL, Plan, Split, read_record
from igpt_ds.errors import UserError

_OF_OTHERS = {*CLASS_FILES, "test", "order", "pool", "allow_pipe"}  # these change no name of a training image


def refuse_mismatch(plan: Plan, there: Path, split: Split) -> None:
    """The splits of one directory are one data set, also when they are built one after the other."""
    other = read_record(there)
    if other is None:
        return
    remedy = f"or choose another --out, or remove {there}"
    transform, held_out = other.get("transform"), other.get("holdout")
    resolution = transform.get("resolution") if isinstance(transform, dict) else None
    if "test" not in (split, plan.split) and held_out != plan.settings.holdout:
        raise UserError(
            f"{there}: was built with --holdout {held_out}, not {plan.settings.holdout:g}, so that the splits "
            f"would overlap: give the same share, {remedy}"
        )
    if "test" not in (split, plan.split) and (told := _other_pool(plan.record, other)):
        raise UserError(
            f"{there}: was built from {told}, so that the splits may overlap: "
            f"build both in one command (--split train --split val), {remedy}"
        )
    if other.get("palette_sha256") != plan.record["palette_sha256"]:
        raise UserError(f"{there}: was built with another palette: give --palette {there}/palette.npy, {remedy}")
    if resolution != plan.settings.resolution:
        raise UserError(
            f"{there}: was built with --resolution {resolution}, not {plan.settings.resolution}: "
            f"give the same, {remedy}"
        )
    if other.get("classes") != plan.record["classes"]:
        raise UserError(
            f"{there}: has {_listed(other.get('classes'))}, but {plan.split} would have "
            f"{_listed(plan.record['classes'])}: give both the same classes in the same order "
            f"(folders: as train/ and test/ of one folder), {remedy}"
        )


def _listed(classes: object) -> str:
    if not isinstance(classes, list):
        return "no classes"
    return f"{len(classes)} classes ({', '.join(map(str, classes[:4]))}{', ...' if len(classes) > 4 else ''})"


def _other_pool(mine: dict[str, Any], other: dict[str, Any]) -> str | None:
    """How the images differ that two splits are shares of, in words: an image's share depends on its id."""
    if other.get("source") != mine["source"]:
        return f"{other.get('source')}, not {mine['source']}"
    options = other.get("options")
    there = options if isinstance(options, dict) else {}
    for name in sorted({*mine["options"], *there} - _OF_OTHERS):
        if there.get(name) != mine["options"].get(name):
            return f"other images (--option {name} was {there.get(name)} and is {mine['options'].get(name)})"
    # Older versions have not kept the ids of all listed images.
    if any(other.get(name, found) != found for name, found in mine.items() if name in {"parts_sha256", POOL}):
        return "images or files of other names (they are called by their place below the path that is given)"
    return None
