"""parquet: tables of images as today's hubs keep them, with Hugging Face's layout understood.

    HUB/data/train-00000-of-00294.parquet         image: struct<bytes: binary, path: string>
    HUB/data/validation-00000-of-00014.parquet    label: int64, a ClassLabel with its names in the schema

The path is the folder, a file, or a pattern; local, http(s), s3 or gs. Which pool a file is in is told by its name, or
else by the nearest folder of such a name, as on the hub (`data_prep.sources._splits`: `cifar10-test.parquet`,
`data/my_test_file.parquet`, `val/0.parquet`): `train` is the pool "train"; `test` is the pool "test", or `validation`
where there are no `test` files or `--option test=validation` says so. Where no file's name tells, all are in "train";
where some do, the others are refused. `--option pool=train` or `pool=test` says of all files where they are. ImageNet
on the hub needs `--option test=validation`, since its `test` files have no labels.

The image column is the only one that holds images, or `--option image=COLUMN`: a struct with `bytes`, or plain binary.
The label column is the only ClassLabel, or `--option label=COLUMN`; with `--option classes=FILE` (one name a line) it
can be any column of integers; other names than a ClassLabel's own are refused. Without a ClassLabel or these options
the images are unlabelled, and so they are with `--option label=none`. All files must agree.

An image's id is the file's name, a slash and its row. Rejected: a row without bytes (a path alone is not followed) or,
with labels, without a class. Read row by row; in memory is a page as its writer cut it, some 1 000 rows maybe. Needs
pyarrow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, BinaryIO

from data_prep.files.patterns import FileSet
from data_prep.files.remote import existing, fetched, opened
from data_prep.sources import Encoded, Item, Pool, UnusableError
from data_prep.sources._class_names import read_classes
from data_prep.sources._splits import check_pool, files_of, split_named, test_split
from igpt_ds.errors import UserError
from igpt_ds.images import MAX_BYTES
from igpt_ds.reading import parse_json

CLASS_FILES = ("classes",)
_LONGEST = 300  # characters of columns' names in a message
_LARGE, _MOST_PACKED = 256 << 20, 100  # a row group's images of more bytes cannot be packed more than so many times


@dataclass(frozen=True)
class Columns:
    """Where a table has its images and labels.

    Attributes:
        image: the column.
        nested: is it a struct whose field "bytes" holds the image?
        label: the column of class numbers; None for unlabelled images.
        names: the classes' names that the schema states for it.
    """

    image: str
    nested: bool
    label: str | None
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Parquet:
    """Tables of images; see `data_prep.sources.StreamedSource`."""

    files: FileSet
    columns: Columns
    classes: list[str] | None
    chosen: tuple[str | None, str | None, str | None]  # the options image, label and classes
    test: str | None
    pool: str | None = None
    name: str = "parquet"

    def parts(self, pool: Pool) -> list[str]:
        """The names of the pool's files."""
        return files_of(pool, self.files.places(), self.pool, self.test)

    def place(self, part: str) -> str:
        """As `data_prep.sources.PlacedSource`."""
        return self.files.url(part)

    def stream(self, part: str) -> Iterator[Encoded]:
        """The images of one file, by row."""
        url = self.place(part)
        with fetched(url) as file:
            table = _table(file, url)
            columns = _columns(table.schema_arrow, url, *self.chosen)
            if columns != self.columns:
                raise UserError(f"{url}: other columns or classes than the first file: read them one by one")
            for row, (image, label) in enumerate(_rows(table, columns, url)):
                found = Item(f"{part}/{row:08d}", label)
                data: bytes | OSError = UnusableError("no image", "the row has no bytes")
                if image is not None:
                    data = image
                if self.classes is not None and (label is None or not 0 <= label < len(self.classes)):
                    found, data = Item(found.id, None), UnusableError("no valid class", str(label))
                yield Encoded(found, data)


def open_source(
    paths: list[str],
    *,
    image: str | None = None,
    label: str | None = None,
    classes: str | None = None,
    test: str | None = None,
    pool: str | None = None,
) -> Parquet:
    """Look at the columns of the first file.

    Args:
        image: the column of images.
        label: the column of class numbers, or "none".
        classes: a file of class names, one a line.
        test: which files are the pool "test": "test" or "validation".
        pool: "train" or "test": that of all files, whatever their names.
    """
    check_pool(pool)
    test_split((), test)
    files = FileSet(tuple(paths), ".parquet")
    first = files.url(files.names()[0])
    if not existing([first]):
        raise UserError(f"{first}: no such file: mend the path or the pattern")
    with opened(first) as file:
        columns = _columns(_table(file, first).schema_arrow, first, image, label, classes)
    names = read_classes(classes) if classes else columns.names
    if columns.label is None or names is None:
        return Parquet(files, columns, None, (image, label, classes), test, pool)
    if columns.names and (differing := [pair for pair in zip_longest(columns.names, names) if pair[0] != pair[1]]):
        own, given = (name or "none" for name in differing[0])
        raise UserError(f"{classes}: names {given} where the column {columns.label} of {first} has {own}: leave it out")
    return Parquet(files, columns, list(names), (image, label, classes), test, pool)


def split_of(name: str) -> str:
    """ "train", "test" or "validation": of the file's name, else of the nearest folder that says so."""
    return split_named(name) or "train"


def _table(file: BinaryIO, url: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{url}: Parquet needs pyarrow: pip install "igpt-ds[parquet]"') from None
    try:
        return pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except Exception as error:
        raise _damaged(url, error) from error


def _columns(schema: Any, url: str, image: str | None, label: str | None, classes: str | None) -> Columns:
    import pyarrow
    from pyarrow import types

    is_view = getattr(types, "is_binary_view", lambda _: False)  # not in old versions

    def holds_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or is_view(kind))

    def is_nested(kind: Any) -> bool:
        at = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        return at >= 0 and holds_bytes(kind.field(at).type)

    kinds = {field.name: field.type for field in schema}
    nested = [name for name, kind in kinds.items() if is_nested(kind)]
    images = [image] if image else nested or [name for name, kind in kinds.items() if holds_bytes(kind)]
    fitting = [name for name in images if name in kinds and (is_nested(kinds[name]) or holds_bytes(kinds[name]))]
    if len(fitting) != 1 or len(images) != 1:
        what = f"column {image} holds no images" if image else f"{len(fitting)} columns hold bytes, not one"
        raise UserError(f"{url}: {what}: choose one with --option image=COLUMN from {_some(kinds)}")
    names = _class_labels(schema)
    if label is None and not classes and len(names) > 1:
        raise UserError(
            f"{url}: {len(names)} columns of classes: choose one with --option label=COLUMN from {_some(names)}"
        )
    chosen = label or (next(iter(names)) if len(names) == 1 else None)
    if chosen == "none" or (chosen is None and not classes):
        return Columns(fitting[0], fitting[0] in nested, None, None)
    if chosen is None or not types.is_integer(kinds.get(chosen, pyarrow.null())):
        what = "--option classes needs --option label" if chosen is None else f"column {chosen} holds no class numbers"
        raise UserError(f"{url}: {what}: choose --option label=COLUMN from {_some(kinds)}")
    if not classes and not names.get(chosen):
        raise UserError(f"{url}: column {chosen} has no class names: give them with --option classes=FILE")
    return Columns(fitting[0], fitting[0] in nested, chosen, names.get(chosen))


def _class_labels(schema: Any) -> dict[str, tuple[str, ...] | None]:
    """The names of each column that the schema's own description calls a ClassLabel; None: not a list of names."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: _names(feature.get("names"))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _some(columns: Iterable[str]) -> str:
    """Columns, not too many of them, in a line."""
    text = ", ".join(columns)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _names(found: object) -> tuple[str, ...] | None:
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        return None
    return tuple(found) if len(set(found)) == len(found) else None


def _rows(table: Any, columns: Columns, url: str) -> Iterator[tuple[bytes | None, int | None]]:
    """Each row's image, the first MAX_BYTES + 1 bytes at most, and its label."""
    wanted = [columns.image, *([columns.label] if columns.label else [])]
    path = f"{columns.image}.bytes" if columns.nested else columns.image
    try:
        _refuse_bombs(table.metadata, path, url)
        # One by one: a dictionary may hold the same 60 MiB for every row.
        for batch in table.iter_batches(1, columns=wanted, use_threads=False):
            image = batch.column(columns.image)
            if columns.nested:
                image = image.flatten()[image.type.get_field_index("bytes")]
            found = image[0].as_buffer()
            label = batch.column(columns.label)[0].as_py() if columns.label else None
            yield None if found is None else found[: MAX_BYTES + 1].to_pybytes(), label
    except UserError:
        raise
    except Exception as error:
        raise _damaged(url, error) from error


def _refuse_bombs(metadata: Any, path: str, url: str) -> None:
    """Refuse images that are packed as images cannot be, for a page of them is unpacked as a whole."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            if chunk.path_in_schema == path and size > max(_LARGE, _MOST_PACKED * packed):
                raise UserError(
                    f"{url}: {packed:,} bytes of images that unpack to {size:,}: no images pack so well: fetch it again"
                )


def _damaged(url: str, error: Exception) -> UserError:
    return UserError(f"{url}: not a whole Parquet file ({' '.join(str(error).split())[:200]}): fetch it again")
