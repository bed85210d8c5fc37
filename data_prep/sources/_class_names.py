"""Class names that the user gives in a text file, for sources whose files hold numbers only."""

import io

from data_prep.files.remote import read_text
from igpt_ds.errors import UserError


def read_classes(path: str) -> list[str]:
    """One name a line, UTF-8; line i names class i."""
    # Not by str.splitlines, which ends a line at characters that a name may have.
    names = [line.strip() for line in io.StringIO(read_text(path, "class names, one a line"), newline=None)]
    if not names:
        raise UserError(f"{path}: empty: write one class name a line")
    for i, name in enumerate(names):
        if not name or names.index(name) < i:
            fault = f"the name {name!r} is there twice" if name else "an empty name"
            raise UserError(f"{path}: line {i + 1}: {fault}: write one class name a line")
    return names
