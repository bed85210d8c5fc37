"""Text for people: tables (aligned, Markdown and CSV from the same cells), sizes, durations, counts."""

import contextlib
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "missing"  # no record of it; never a guess


def visible(text: str) -> str:
    """One line: what a terminal would obey or hide stands as an escape such as \\x1b or \\n.

    Names come from anywhere, so whatever is printed goes through here; tables and `aligned` do so by themselves.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str, most: int = 2000) -> str:
    """A message as `visible`, and not without end: names may be long, and what to do stands last."""
    line = visible(message)
    return line if len(line) <= most else f"{line[: most - 300]} ... {line[-300:]}"


@dataclass(frozen=True)
class Table:
    """Headings and rows of strings. `title` may be empty; `note` stands below."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def _padded(self) -> list[list[str]]:
        lines = [[visible(cell) for cell in line] for line in (self.headings, *self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        numeric = [self.numeric(column) for column in range(len(widths))]
        return [
            [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ]
            for line in lines
        ]

    def _notes(self) -> list[str]:
        return [visible(line) for line in self.note.split("\n")] if self.note else []

    def numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", MISSING)]
        return column > 0 and all(cell[:1].isdigit() or cell[:1] in "-+" for cell in cells)

    def without_empty_columns(self) -> "Table":
        """The same without columns that hold nothing in any row."""
        used = [c for c in range(len(self.headings)) if any(row[c] for row in self.rows)]
        rows = [[row[c] for c in used] for row in self.rows]
        return Table(self.title, [self.headings[c] for c in used], rows, self.note)

    def text(self) -> str:
        """Aligned columns: words to the left, figures to the right."""
        lines = ["  ".join(line).rstrip() for line in self._padded()]
        return "\n".join([*([visible(self.title)] if self.title else []), *lines, *self._notes()])

    def markdown(self) -> str:
        """A Markdown table that is aligned as plain text, too. Cells cannot break out of it."""
        safe = Table("", [_markdown(cell) for cell in self.headings], [list(map(_markdown, row)) for row in self.rows])
        head, *body = safe._padded()
        rule = [
            "-" * (len(cell) - 1) + ":" if safe.numeric(i) and len(cell) > 1 else "-" * max(len(cell), 1)
            for i, cell in enumerate(head)
        ]
        lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]
        title = [f"## {_markdown(self.title)}", ""] if self.title else []
        return "\n".join([*title, *lines, *(["", *self._notes()] if self.note else []), ""])

    def csv(self) -> str:
        """Headings and rows as CSV (RFC 4180, lines end with a newline); no cell is a formula to a spreadsheet."""
        stream = io.StringIO()
        lines = [[_csv(cell) for cell in line] for line in (self.headings, *self.rows)]
        csv.writer(stream, lineterminator="\n").writerows(lines)
        return stream.getvalue()


def _markdown(cell: str) -> str:
    return re.sub(r"([\\`|\[\]!*_])", r"\\\1", visible(cell)).replace("<", "&lt;")


def _csv(cell: str) -> str:
    """With an apostrophe before what a spreadsheet would compute: = + - @, also as wide signs, and not of a number."""
    text = "\n".join(map(visible, cell.split("\n")))
    with contextlib.suppress(ValueError):
        float(cell.replace(",", ""))
        return text
    # Some drop white space first.
    computed = cell.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") or cell[:1] in tuple("\t\r\n")
    return f"'{text}" if computed else text


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what there is to say of each, aligned."""
    width = max([10, *(len(visible(name)) for name, _ in rows)])
    return "\n".join(f"{visible(name):<{width}}  {visible(value)}" for name, value in rows)


def number(value: float | None, digits: int = 4) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent without the sign, as the paper prints accuracies."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def counted(count: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(numbers: Sequence[int], most: int = 5) -> str:
    """The first of several numbers: "3, 7, 9 and 12 more"."""
    more = f" and {len(numbers) - most:,} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def size_text(count: float) -> str:
    """Bytes for people, with three significant digits: "76.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} PiB"


def time_text(seconds: float) -> str:
    """A duration for people: "0.2 s", "14 min", "3.1 h"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """A duration to the second: "3d 04:05:06"."""
    days, rest = divmod(round(seconds), 86400)
    hours = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {hours}" if days else hours
