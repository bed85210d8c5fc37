"""The class of each official validation image of ILSVRC 2012, which the devkit gives by a numbering of its own.

`ILSVRC2012_validation_ground_truth.txt` has one number an image, in the order of the images' names. These ILSVRC ids,
1 to 1000, are not the order of the sorted synsets (n01440764, n01443537, ...) that labels follow everywhere else;
`meta.mat` says which synset has which id. A file of numbers alone does not tell which of both orders it follows, and
the wrong one gives labels that look right, so it must be said.

Source: readme.txt of ILSVRC2012_devkit_t12.
"""

import codecs
import io
import re
from pathlib import Path

from data_prep.files.remote import opened
from data_prep.files.tar import gunzipped, members
from igpt_ds.errors import UserError

WNID = re.compile(r"n[0-9]{8}")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
GZIP = b"\x1f\x8b"
_LARGEST = 1 << 26
_FORM = (
    "write one class a line in the order of the images' names, or NAME CLASS or NAME,CLASS, in UTF-8 "
    "(Kaggle's LOC_val_solution.csv is such a file)"
)
_HELP = "give the devkit, or --option order=ilsvrc or order=synset with a file of numbers"


def validation_synsets(truth: Path, order: str | None, images: list[str], synsets: list[str]) -> list[str]:
    """The synset of each validation image.

    Args:
        truth: the devkit (a folder, .tar.gz or .tar), a text file with one line an image: a number or a synset, which
            the image's name may precede; or Kaggle's LOC_val_solution.csv.
        order: "ilsvrc" (the devkit's ids) or "synset" (positions, from 0 or 1, among the sorted synsets).
        images: the images' names, sorted.
        synsets: the known synsets, sorted; may be empty with a devkit.
    """
    files = _devkit(truth) if truth.is_dir() or _is_archive(truth) else {}
    if files:
        if order == "synset":
            raise UserError(f"{truth}: the devkit's numbers are ILSVRC ids: leave out --option order")
        order = "ilsvrc"
    data = files.get(TRUTH) if files else _read(truth)
    if data is None:
        raise UserError(f"{truth}: holds no {TRUTH}: give the folder or archive ILSVRC2012_devkit_t12")
    values = _values(data, truth, images)
    if all(WNID.fullmatch(value) for value in values):
        return values
    if not all(re.fullmatch("[0-9]{1,6}", value) for value in values):
        raise UserError(f"{truth}: neither numbers nor synsets such as n01440764: {_HELP}")
    numbers = [int(value) for value in values]
    if order == "ilsvrc":
        beside = truth.parent / "meta.mat"
        names = _meta(files["meta.mat"] if "meta.mat" in files else _read(beside), truth)
        if unknown := sorted(set(numbers) - set(names)):
            raise UserError(f"{truth}: the ILSVRC id {unknown[0]} is not in meta.mat: {_HELP}")
        return [names[number] for number in numbers]
    if order != "synset":
        raise UserError(f"{truth}: numbers, of which order is not said: {_HELP}")
    first = min(numbers)
    if not synsets or first > 1 or set(numbers) != set(range(first, first + len(synsets))):
        raise UserError(f"{truth}: its numbers are not those of the {len(synsets)} synsets at hand: {_HELP}")
    return [synsets[number - first] for number in numbers]


def devkit_synsets(devkit: Path) -> list[str]:
    """The synsets of a devkit that images are labelled with, sorted."""
    return sorted(_meta(_devkit(devkit).get("meta.mat"), devkit).values())


def _values(data: bytes, truth: Path, images: list[str]) -> list[str]:
    if b"\0" in data:
        raise UserError(f"{truth}: no plain text, UTF-16 maybe: {_FORM}")
    text = data.removeprefix(codecs.BOM_UTF8).decode("ascii", "replace")
    is_table = re.search("[,;]", text.partition("\n")[0]) is not None  # name,class and boxes
    rows = (re.sub('[,;"]', " ", line).split() for line in text.splitlines())
    lines = [row[: 2 if is_table else None] for row in rows if row]
    has_title = is_table or len(lines) == len(images) + 1
    if has_title and not re.fullmatch(rf"{WNID.pattern}|[0-9]+", lines[0][-1]):
        lines = lines[1:]
    if len(lines) != len(images):
        raise UserError(
            f"{truth}: {len(lines)} lines for {len(images)} validation images: one of both is incomplete, or {_FORM}"
        )
    named = all(len(line) == 2 for line in lines)
    if not named and not all(len(line) == 1 for line in lines):
        raise UserError(f"{truth}: not one class a line: {_FORM}")
    if named:
        by_name = {name.rpartition("/")[2].removesuffix(".JPEG"): value for name, value in lines}
        if missing := [name for name in images if name.removesuffix(".JPEG") not in by_name]:
            raise UserError(f"{truth}: no line for {missing[0]}: one of both is incomplete, or {_FORM}")
        return [by_name[name.removesuffix(".JPEG")] for name in images]
    return [line[0] for line in lines]


def _is_archive(path: Path) -> bool:
    with opened(str(path)) as file:
        begin = file.read(512)
    return begin.startswith(GZIP) or begin[257:262] == b"ustar"


def _devkit(path: Path) -> dict[str, bytes]:
    """The devkit's files that are needed, by name."""
    wanted = {TRUTH, "meta.mat"}
    if path.is_dir():
        places = [path / "data" / name if (path / "data").is_dir() else path / name for name in wanted]
        return {place.name: _read(place) for place in places if place.is_file()}
    with opened(str(path)) as file:
        packed = file.read(2) == GZIP
    with gunzipped(path, 1 << 30) if packed else opened(str(path)) as file:
        found = {}
        for member in members(file, str(path)):
            name = member.name.rpartition("/")[2]
            if name in wanted and member.other is None and member.size <= _LARGEST:
                file.seek(member.offset)
                found[name] = file.read(member.size)
    return found


def _read(path: Path) -> bytes:
    with opened(str(path)) as file:
        return file.read(_LARGEST)


def _meta(data: bytes | None, where: Path) -> dict[int, str]:
    """Synset by ILSVRC id, of the synsets without children: the others are not used for classification."""
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(data or b""), squeeze_me=True)["synsets"]
        found = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows.reshape(-1) if int(row["num_children"]) == 0
        }
    except Exception as error:  # MATLAB files from outside make the reader raise anything
        raise UserError(f"{where}: no readable meta.mat: give the folder or archive ILSVRC2012_devkit_t12") from error
    if not found or not all(WNID.fullmatch(synset) for synset in found.values()):
        raise UserError(f"{where}: its meta.mat names no synsets such as n01440764: fetch the devkit again")
    return found
