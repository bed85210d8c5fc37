"""Where images come from: one module a source, found by its name.

A source module has a docstring that says which layout it reads, and `open_source(paths, **options) -> Source`,
whose keyword arguments (all `str | None = None`) are the options that `--option name=value` sets. Options that name
a file of classes stand in its `CLASS_FILES`, if it has such. Where the images are tokens already (`TokenSource`), their
palette is the second argument, `palette`. To add a source is to add a file here; nothing else
changes.

A source holds up to two pools of images, as they were published: "train", of which a share can be held out as the
validation split, and "test". There are two kinds of sources:

- `ListedSource`: few enough images to list (a few million), each read at will. Their rows are shuffled as a whole,
  so that every shard holds all classes.
- `StreamedSource`: files of thousands of images each (tars, Parquet), each read once from begin to end. One input
  file makes its own output shards, so nothing is ever as large as the collection.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from igpt_ds.errors import UserError

if TYPE_CHECKING:
    from igpt_ds.dataset.palette import Palette

Pool = Literal["train", "test"]


class Item(NamedTuple):
    """One image: its id (unique in the source, never changing) and its class, where there is one."""

    id: str
    label: int | None


class Encoded(NamedTuple):
    """One streamed image: what it is, and its file's bytes, or why they are not there.

    Attributes:
        sample: the id by which it is held out or not: one for all images that must lie in the same split; None where
            it is the image's own.
    """

    item: Item
    data: bytes | OSError
    sample: str | None = None


class UnusableError(OSError):
    """An image that is there and must not or cannot be used: the `reason` to count it by, and what is the matter."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class ListedSource(Protocol):
    """Images that are listed at once and read at will. Small and picklable: it travels to the workers.

    Attributes:
        name: the source's name, for the manifest.
        classes: the classes' names by label, or None for unlabelled images.
    """

    name: str
    classes: list[str] | None

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool, either all with labels or all without; empty where the source has no such pool."""

    def read(self, item_id: str) -> bytes:
        """An image's encoded bytes, the first MAX_BYTES + 1 at most. An OSError rejects the image."""


@runtime_checkable
class StreamedSource(Protocol):
    """Images in large files, each file read from begin to end. Small and picklable: it travels to the workers.

    Attributes:
        name: the source's name, for the manifest.
        classes: the classes' names by label, or None for unlabelled images.
    """

    name: str
    classes: list[str] | None

    def parts(self, pool: Pool) -> list[str]:
        """The pool's files, sorted, each a name that stays the same when the collection is moved or grows."""

    def stream(self, part: str) -> Iterator[Encoded]:
        """The images of one file, always in the same order. An OSError in place of bytes rejects that image only.

        Raises:
            UserError: the file cannot be read to its end; the shard is not built.
        """


@runtime_checkable
class PlacedSource(Protocol):
    """A streamed source whose files lie somewhere, so that it can be seen that one has changed."""

    def place(self, part: str) -> str:
        """A file's path or URL."""


@runtime_checkable
class FiledSource(Protocol):
    """A listed source whose images lie in local files, so that it can be seen that one has changed."""

    def files(self, item_id: str) -> Sequence[Path]:
        """Those that hold an image, or may hold it."""


@runtime_checkable
class TokenSource(Protocol):
    """A listed source of images that are tokens already, which another size or crop would destroy.

    Attributes:
        side: pixels of an image's side.
    """

    @property
    def side(self) -> int: ...


Source = ListedSource | StreamedSource


def names() -> list[str]:
    """The sources that there are: modules of this package, but for the helpers, whose names begin with _."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def open_source(
    name: str,
    paths: Sequence[str],
    options: Mapping[str, str] | None = None,
    palette: "Callable[[], Palette] | None" = None,
) -> Source:
    """Open the source called `name` on `paths`.

    Args:
        palette: reads that of the tokens that are to be built, which a `TokenSource` asks for.
    """
    if name not in names():
        raise UserError(f"{name}: no such source: choose from {', '.join(names())}")
    opener = _module(name).open_source
    parameters = inspect.signature(opener).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options or {}:
        if option not in known:
            choice = f"choose from {', '.join(known)}" if known else "it has none"
            raise UserError(f"--option {option}: {name} has no such option: {choice}")
    source: Source = opener(
        list(paths), *([palette and palette()] if "palette" in parameters else []), **(options or {})
    )
    return source


def recorded(name: str, options: Mapping[str, str]) -> dict[str, str]:
    """A source's options as a plan records them: wherever a file of classes lies, they and the labels are the same."""
    return {
        option: value for option, value in options.items() if option not in getattr(_module(name), "CLASS_FILES", ())
    }


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
