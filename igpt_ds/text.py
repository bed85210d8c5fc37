"""Tables as people read them: aligned text, Markdown and CSV from the same cells."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "missing"  # no record of it; never a guess


@dataclass(frozen=True)
class Table:
    """Headings and rows of strings. `title` may be empty; `note` stands below."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def _padded(self) -> list[list[str]]:
        # A line break within a cell would break the table.
        lines = [[" ".join(cell.split()) for cell in line] for line in (self.headings, *self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        numeric = [self.numeric(column) for column in range(len(widths))]
        return [
            [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ]
            for line in lines
        ]

    def numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", MISSING)]
        return column > 0 and all(cell[:1].isdigit() or cell[:1] in "-+" for cell in cells)

    def text(self) -> str:
        """Aligned columns: words to the left, figures to the right."""
        lines = ["  ".join(line).rstrip() for line in self._padded()]
        return "\n".join([*([self.title] if self.title else []), *lines, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """A Markdown table that is aligned as plain text, too. Cells cannot break out of it."""
        safe = Table(
            "", [_markdown(cell) for cell in self.headings], [[_markdown(cell) for cell in row] for row in self.rows]
        )
        head, *body = safe._padded()
        rule = [
            "-" * (len(cell) - 1) + ":" if safe.numeric(i) and len(cell) > 1 else "-" * max(len(cell), 1)
            for i, cell in enumerate(head)
        ]
        lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]
        title = [f"## {_markdown(self.title)}", ""] if self.title else []
        return "\n".join([*title, *lines, *(["", self.note] if self.note else []), ""])

    def csv(self) -> str:
        """Headings and rows as CSV (RFC 4180, lines end with a newline)."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.headings, *self.rows])
        return stream.getvalue()


def _markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def figure(value: float | None, digits: int = 4) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent without the sign, as the paper prints accuracies."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"
