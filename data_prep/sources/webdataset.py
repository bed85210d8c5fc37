"""webdataset: any tars of images, the members of a sample sharing the name before its first dot.

    TARS/web-000.tar                 or a file, or a pattern such as TARS/web-{000..999}.tar or TARS/*.tar,
        a/0001.jpg                   local, http(s), s3 or gs
        a/0001.cls   17

Images are known by their suffix (.jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .ppm, ...), or are the members that
`--option image=jpg` names by all that follows a sample's key, also several such as `image=jpg;left.png`; other members
are passed over, and so is what starts with a dot or lies in a folder that does. Of a sample all images are taken:
masks, thumbnails and depth maps are to be left out by `image=`. They are in the same split, whatever share is held
out. With `--option classes=FILE` (one name a line) every image must have a `.cls` member with the number of its class
in ASCII; without it the images are unlabelled. Members may come in any order.

Which pool a tar is in is told by its name or folder, as with Parquet (`data_prep.sources._splits`): train is the pool
"train", test or else validation the pool "test". Where no tar's name tells, all are in "train"; where some do, the
others are refused. `--option pool=train` or `pool=test` says of all tars where they are.

An image's id is the tar's name, a slash and the member's name. Rejected: a link or device named like an image, a name
that is there twice (all but the first), and with classes an image without a valid one. A tar that is damaged or cut
stops the job before any of its images is used. Compressed tars are refused. Memory: some 300 bytes a member of a tar.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.files.folders import is_left_out
from data_prep.files.patterns import FileSet
from data_prep.files.remote import existing, fetched
from data_prep.files.tar import Member, members, plain_name, read_member, safe_name
from data_prep.sources import Encoded, Item, Pool, UnusableError
from data_prep.sources._class_names import read_classes
from data_prep.sources._splits import check_pool, files_of
from data_prep.sources.image_folder import SUFFIXES
from igpt_ds.errors import UserError

CLASS_FILES = ("classes",)
_LONGEST_CLASS = 64  # bytes of a class's number


@dataclass(frozen=True)
class WebDataset:
    """Tars of images; see `data_prep.sources.StreamedSource`.

    Attributes:
        pool: that of all tars; None where their names tell.
        image: the images' names after the key; None where they are known by their suffix.
    """

    tars: FileSet
    classes: list[str] | None
    pool: str | None
    image: tuple[str, ...] | None = None
    name: str = "webdataset"

    def parts(self, pool: Pool) -> list[str]:
        """The tars' names."""
        places = self.tars.places()
        names = files_of(pool, places, self.pool)
        files = [places[name] for name in names if not places[name].startswith("pipe:")]
        if missing := sorted(set(files) - set(existing(files))):
            raise UserError(f"{missing[0]}: no such file: mend the path or the pattern")
        return names

    def place(self, part: str) -> str:
        """As `data_prep.sources.PlacedSource`."""
        return self.tars.url(part)

    def stream(self, part: str) -> Iterator[Encoded]:
        """The images of one tar in their order there."""
        url = self.place(part)
        with fetched(url) as file:
            found = [member for member in members(file, url) if _is_visible(member.name)]
            labels = None if self.classes is None else _labels(file, found, len(self.classes))
            images = [member for member in found if self._is_image(member.name)]
            samples = _samples(found)
            seen: set[str] = set()
            for member in images:
                name, plain = safe_name(member.name), plain_name(member.name)
                label = None if labels is None else _label(labels, member.name)
                item = Item(f"{part}/{name}", label if isinstance(label, int) else None)
                data: bytes | OSError
                if plain in seen:
                    item, data = Item(item.id, None), UnusableError("twice in the archive")
                else:
                    data = label if isinstance(label, UnusableError) else image_bytes(file, member)
                seen.add(plain)
                yield Encoded(item, data, f"{part}/{samples[_key(member.name)]}")

    def _is_image(self, name: str) -> bool:
        if self.image is None:
            return name.lower().endswith(SUFFIXES)
        return name.rpartition("/")[2].partition(".")[2].lower() in self.image


def open_source(
    paths: list[str],
    *,
    classes: str | None = None,
    pool: str | None = None,
    image: str | None = None,
    allow_pipe: str | None = None,
) -> WebDataset:
    """Take note of the paths; the tars are looked at when they are listed and read.

    Args:
        classes: a file of class names, one a line.
        pool: "train" or "test": that of all tars, whatever their names.
        image: which members are images, by their names after the key, parted by semicolons.
        allow_pipe: "true" lets paths `pipe:COMMAND` run.
    """
    for path in paths:
        if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise UserError(f"{path}: compressed: unpack it to a plain .tar")
    tars = FileSet(tuple(paths), ".tar", pipes_allowed(allow_pipe))
    check_pool(pool)
    kinds = tuple(kind.strip().lower().lstrip(".") for kind in re.split("[;,]", image)) if image is not None else None
    if kinds and not all(kinds):
        raise UserError(f"--option image={image}: an empty name: write them as jpg;png")
    return WebDataset(tars, read_classes(classes) if classes else None, pool, kinds)


def pipes_allowed(allow_pipe: str | None) -> bool:
    """The option `allow_pipe` as a truth value."""
    if allow_pipe not in {None, "true", "false"}:
        raise UserError(f"--option allow_pipe={allow_pipe}: neither true nor false: choose one")
    return allow_pipe == "true"


def image_bytes(file: BinaryIO, member: Member) -> bytes | OSError:
    """A member's bytes, or why there are none."""
    if member.other:
        return UnusableError("not a regular file", member.other)
    try:
        return read_member(file, member.offset, member.size)
    except OSError as error:
        return error


def _is_visible(name: str) -> bool:
    return not any(is_left_out(part) for part in name.split("/") if part not in {".", ".."})


def _key(name: str) -> str:
    """A sample's key: the name up to the first dot after the last slash, as the format has it."""
    folder, slash, base = plain_name(name).rpartition("/")
    return folder + slash + base.partition(".")[0]


def _samples(found: list[Member]) -> dict[str, str]:
    """By each sample's key the name by which it is held out or not, whichever of its members are chosen as images.

    It is that of the first by name that is called like an image, or else the key.
    """
    first: dict[str, str] = {}
    names = [member.name for member in found]
    for name in (name for name in names if name.lower().endswith(SUFFIXES)):
        first[_key(name)] = min(first.get(_key(name), name), name)
    return {key: safe_name(first.get(key, key)) for key in map(_key, names)}


def _labels(file: BinaryIO, found: list[Member], count: int) -> dict[str, int | UnusableError]:
    labels: dict[str, int | UnusableError] = {}
    for member in found:
        if not member.name.lower().endswith(".cls"):
            continue
        text = image_bytes(file, member._replace(size=min(member.size, _LONGEST_CLASS)))
        value: int | UnusableError = UnusableError("no valid class", f"{text!r:.40}")
        if isinstance(text, bytes) and len(text) == member.size and text.strip().isdigit() and int(text) < count:
            value = int(text)
        # Named in full, and by the key: two images of one key may have a class each.
        for name in {plain_name(member.name)[: -len(".cls")], _key(member.name)}:
            if labels.setdefault(name, value) != value:
                labels[name] = UnusableError("no valid class", "two classes")
    return labels


def _label(labels: dict[str, int | UnusableError], name: str) -> int | UnusableError:
    full = plain_name(name).rpartition(".")[0]
    return labels.get(full, labels.get(_key(name), UnusableError("no valid class", "no .cls member")))
