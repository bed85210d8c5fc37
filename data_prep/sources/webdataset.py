"""webdataset: any tars of images, the members of a sample sharing the name before its first dot.

    TARS/web-000.tar                 or a file, or a pattern such as TARS/web-{000..999}.tar or TARS/*.tar,
        a/0001.jpg                   local, http(s), s3 or gs
        a/0001.cls   17

Images are known by their suffix (.jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .ppm, ...); other members are passed over,
and so are names that start with a dot. With `--option classes=FILE` (one name a line) every image must have a `.cls`
member with the number of its class in ASCII; without it the images are unlabelled. Members may come in any order. All
images are in the pool "train", or with `--option pool=test` in the pool "test".

An image's id is the tar's name, a slash and the member's name. Rejected: a link or device named like an image, a name
that is there twice (all but the first), and with classes an image without a valid one. A tar that is damaged or cut
stops the job before any of its images is used. Compressed tars are refused. Memory: some 300 bytes a member of a tar.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.files.patterns import FileSet
from data_prep.files.remote import existing, fetched
from data_prep.files.tar import Member, members, read_member, safe_name
from data_prep.sources import Encoded, Item, Pool, UnusableError
from data_prep.sources._class_names import read_classes
from data_prep.sources.image_folder import SUFFIXES
from igpt_ds.errors import UserError


@dataclass(frozen=True)
class WebDataset:
    """Tars of images; see `data_prep.sources.StreamedSource`."""

    tars: FileSet
    classes: list[str] | None
    pool: Pool
    name: str = "webdataset"

    def parts(self, pool: Pool) -> list[str]:
        """The tars' names."""
        if pool != self.pool:
            return []
        places = self.tars.places()
        files = [url for url in places.values() if not url.startswith("pipe:")]
        if missing := sorted(set(files) - set(existing(files))):
            raise UserError(f"{missing[0]}: no such file: mend the path or the pattern")
        return list(places)

    def stream(self, part: str) -> Iterator[Encoded]:
        """The images of one tar in their order there."""
        url = self.tars.url(part)
        with fetched(url) as file:
            found = [member for member in members(file, url) if _is_visible(member.name)]
            labels = None if self.classes is None else _labels(file, found, len(self.classes))
            seen: set[str] = set()
            for member in found:
                if not member.name.lower().endswith(SUFFIXES):
                    continue
                name = safe_name(member.name)
                label = None if labels is None else _label(labels, member.name)
                item = Item(f"{part}/{name}", label if isinstance(label, int) else None)
                if name in seen:
                    yield Encoded(item, UnusableError("twice in the archive"))
                    continue
                seen.add(name)
                if isinstance(label, UnusableError):
                    yield Encoded(item, label)
                else:
                    yield Encoded(item, image_bytes(file, member))


def open_source(
    paths: list[str], *, classes: str | None = None, pool: str | None = None, allow_pipe: str | None = None
) -> WebDataset:
    """Take note of the paths; the tars are looked at when they are listed and read.

    Args:
        classes: a file of class names, one a line.
        pool: "train" (as without it) or "test".
        allow_pipe: "true" lets paths `pipe:COMMAND` run.
    """
    for path in paths:
        if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise UserError(f"{path}: compressed: unpack it to a plain .tar")
    tars = FileSet(tuple(paths), ".tar", pipes_allowed(allow_pipe))
    if pool not in {None, "train", "test"}:
        raise UserError(f"--option pool={pool}: no such pool: choose train or test")
    return WebDataset(tars, read_classes(classes) if classes else None, "test" if pool == "test" else "train")


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
    return not name.rpartition("/")[2].startswith(".")


def _key(name: str) -> str:
    """A sample's key: the name up to the first dot after the last slash, as the format has it."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _labels(file: BinaryIO, found: list[Member], count: int) -> dict[str, int | UnusableError]:
    labels: dict[str, int | UnusableError] = {}
    for member in found:
        if not member.name.endswith(".cls"):
            continue
        text = image_bytes(file, member._replace(size=min(member.size, 64)))
        value: int | UnusableError = UnusableError("no valid class", f"{text!r:.40}")
        if isinstance(text, bytes) and text.strip().isdigit() and int(text) < count:
            value = int(text)
        # Named in full, and by the key: two images of one key may have a class each.
        for name in {member.name.removesuffix(".cls"), _key(member.name)}:
            if labels.setdefault(name, value) != value:
                labels[name] = UnusableError("no valid class", "two classes")
    return labels


def _label(labels: dict[str, int | UnusableError], name: str) -> int | UnusableError:
    full = name.rpartition(".")[0]
    return labels.get(full, labels.get(_key(name), UnusableError("no valid class", "no .cls member")))
