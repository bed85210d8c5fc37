"""img2dataset: what img2dataset downloads with `--output_format webdataset`.

    WEB/00000.tar            000000017.jpg (or png, webp), 000000017.json, 000000017.txt, ...
    WEB/00000_stats.json     written when the shard is done
    WEB/00000.parquet        the metadata of all URLs, failed ones too; not read

The path is the folder (or one around several of such folders), a tar, or a pattern such as WEB/{00000..00999}.tar;
local, http(s), s3 or gs. Only tars whose NNNNN_stats.json is there count, so gaps and a download that goes on are
fine; the tar must hold as many images as the statistics state. Members may come in any order. All images are in the
pool "train", unlabelled; so folders of test or validation images (`data_prep.sources._splits`) are refused.

An image's id is PART/KEY-HASH: the tar's name without .tar, its `__key__`, and 16 digits of the sha256 that its
metadata states (of the file as it was downloaded), or of the bytes at hand where it states none. So a selection never
takes an image that another download put under an old key. The stated sha256 cannot be checked: img2dataset takes it
before it resizes and encodes the image again.

Rejected: an image whose owner opted out (which fields count: `data_prep.sources._opt_out`), or without readable
metadata, which could not tell; a key that has a second image; a link named like an image. A tar that is damaged or cut
stops the job before any of its images is used.

Only the files are read; img2dataset itself is not needed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.files.patterns import FileSet
from data_prep.files.remote import existing, fetched, scheme
from data_prep.files.tar import Member, members, plain_name, read_member, safe_name
from data_prep.sources import Encoded, Item, Pool, UnusableError
from data_prep.sources._opt_out import opted_out
from data_prep.sources._splits import split_of_folder, splits_named
from data_prep.sources.webdataset import image_bytes
from igpt_ds.errors import UserError
from igpt_ds.reading import parse_json

SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_MAX_METADATA = 1 << 20


@dataclass(frozen=True)
class Img2Dataset:
    """Finished shards of img2dataset; see `data_prep.sources.StreamedSource`."""

    tars: FileSet
    classes: None = None
    name: str = "img2dataset"

    def parts(self, pool: Pool) -> list[str]:
        """The names of the finished tars, without .tar."""
        if pool == "test":
            return []
        places = self.tars.places()
        of_folder = cache(split_of_folder)
        for name, url in places.items():
            folders = name.split("/")[:-1]
            told = [part for part in folders if {"test", "validation"} & set(splits_named(part))]
            if not told and folders and not scheme(url) and of_folder(str(Path(url).parent)) in {"test", "validation"}:
                told = folders[-1:]  # a link to one
            if told:
                raise UserError(f"{url}: in a folder {told[0]}, and not to be trained on: give the other folders")
        stats = {_stats(url): name.removesuffix(".tar") for name, url in places.items()}
        finished = [stats[url] for url in existing(stats)]
        if not finished:
            raise UserError(
                f"{self.tars.paths[0]}: no tar with its _stats.json: wait until img2dataset has finished one"
            )
        return finished

    def place(self, part: str) -> str:
        """As `data_prep.sources.PlacedSource`."""
        return self.tars.url(f"{part}.tar")

    def stream(self, part: str) -> Iterator[Encoded]:
        """The images of one tar in their order there."""
        url = self.place(part)
        expected = _successes(_stats(url))
        with fetched(url) as file:
            images: list[tuple[str, Member]] = []
            metadata: dict[str, Member] = {}
            for member in members(file, url):
                key, _, kind = member.name.rpartition(".")
                if kind in SUFFIXES:
                    images.append((key, member))
                elif kind == "json":
                    metadata[plain_name(key)] = member
            if len(images) != expected:
                raise UserError(
                    f"{url}: holds {len(images)} images, its _stats.json says {expected}: "
                    "download the shard again, or remove its _stats.json to leave it out"
                )
            seen: set[str] = set()
            for key, member in images:
                yield _encoded(file, part, key, member, metadata.get(plain_name(key)), seen)


def open_source(paths: list[str]) -> Img2Dataset:
    """Take note of the paths; the shards are looked at when they are listed and read."""
    for path in paths:
        if path.startswith("pipe:"):
            raise UserError(f"{path}: a pipe has no _stats.json: read it with the source webdataset")
    return Img2Dataset(FileSet(tuple(paths), ".tar"))


def _encoded(file: BinaryIO, part: str, key: str, member: Member, metadata: Member | None, seen: set[str]) -> Encoded:
    name, plain = safe_name(key), plain_name(key)
    if plain in seen:
        return Encoded(Item(f"{part}/{name}", None), UnusableError("twice in the archive"))
    seen.add(plain)
    described = _metadata(file, metadata)
    data = image_bytes(file, member)
    mark = ""
    if isinstance(described, dict) and re.fullmatch("[0-9a-f]{64}", str(described.get("sha256"))):
        mark = str(described["sha256"])
    elif isinstance(data, bytes):
        mark = hashlib.sha256(data).hexdigest()
    item = Item(f"{part}/{name}-{mark[:16]}" if mark else f"{part}/{name}", None)
    if isinstance(described, UnusableError):
        return Encoded(item, described)
    if field := opted_out(described):
        return Encoded(item, UnusableError("opted out", field))
    return Encoded(item, data)


def _metadata(file: BinaryIO, member: Member | None) -> dict[str, Any] | UnusableError:
    if member is None or member.other or member.size > _MAX_METADATA:
        return UnusableError("no metadata", "no .json member" if member is None else "its .json is no such file")
    try:
        found = json.loads(read_member(file, member.offset, member.size))  # tables say nothing by NaN
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else UnusableError("no metadata", "its .json is no JSON object")


def _stats(url: str) -> str:
    return url.removesuffix(".tar") + "_stats.json"


def _successes(url: str) -> int:
    with fetched(url) as file:
        data = file.read(_MAX_METADATA + 1)
    try:
        successes = parse_json(data)["successes"]
    except (ValueError, KeyError, TypeError):
        successes = None
    if type(successes) is not int:
        raise UserError(f"{url}: not the statistics that img2dataset writes: download the shard again")
    return successes
