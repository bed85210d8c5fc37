"""Where images come from: one module a source, found by its name.

A source module has a docstring that says which layout it reads, and `open_source(path) -> Source`. To add one
is to add a file here; nothing else changes.
"""

import importlib
import pkgutil
from typing import NamedTuple, Protocol

from igpt_ds.errors import UserError

MAX_BYTES = 64 << 20  # no photograph's file is larger; a source reads no more of one than a byte beyond this


class Item(NamedTuple):
    """One image: its id (a POSIX path below the source's root, unique) and its class, where there is one."""

    id: str
    label: int | None


class Source(Protocol):
    """A set of images. Small and picklable: it travels to the workers that read the images.

    Attributes:
        name: the source's name, for the manifest.
        classes: the classes' names by label, or None for unlabelled images.
    """

    name: str
    classes: list[str] | None

    def items(self) -> list[Item]:
        """All images, either all with labels or all without.

        Raises:
            UserError: the path does not hold what the source expects.
        """

    def read(self, item_id: str) -> bytes:
        """An image's encoded bytes, the first MAX_BYTES + 1 at most. An OSError rejects the image."""


def names() -> list[str]:
    """The sources that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_source(name: str, path: str) -> Source:
    """Open the source called `name` on `path`.

    Raises:
        UserError: there is no such source, or it refuses the path.
    """
    if name not in names():
        raise UserError(f"{name}: no such source: choose from {', '.join(names())}")
    source: Source = importlib.import_module(f"{__name__}.{name}").open_source(path)
    return source
