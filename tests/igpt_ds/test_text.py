"""Text for people: what a terminal, a spreadsheet or a Markdown reader would obey stands as text."""

import csv
import io
import logging

import pytest

from igpt_ds.run.directory import LOGGER
from igpt_ds.text import Table, aligned, visible

# Escape sequences, C1, overwriting, bidirectional and zero-width characters, line ends of every kind, bytes that are
# no UTF-8.
OBEYED = "\x1b[2J\x9b1m\r\b\u202e\u200b\n\x0b\x85\u2028\udcff\x7f"


def test_what_a_terminal_obeys_stands_as_an_escape() -> None:
    shown = visible(OBEYED)
    assert shown == r"\x1b[2J\x9b1m\r\x08\u202e\u200b\n\x0b\x85\u2028\udcff\x7f"
    assert visible("Füße, 猫 😀 ± \\n") == "Füße, 猫 😀 ± \\n"
    table = Table(OBEYED, [OBEYED, "n"], [[OBEYED, "1"]], "one line\nanother " + OBEYED.replace("\n", ""))
    for text in (table.text(), table.markdown(), aligned([(OBEYED, OBEYED)])):
        assert text.replace("\n", "").isprintable()
    assert table.text().count("\n") == 4
    assert aligned([("a\n", "1"), ("long name\x1b", "2")]).splitlines() == [r"a\n            1", r"long name\x1b  2"]


def test_a_log_line_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="igpt_ds"):
        LOGGER.info(f"resumed from {OBEYED}igpt-ds: all is well")
    assert caplog.messages == [f"resumed from {visible(OBEYED)}igpt-ds: all is well"]


def test_a_cell_is_no_formula() -> None:
    formulas = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(1)", "\t=1", "\r=1", " =1", "\uff1d1", "-"]
    harmless = ["", "-1", "+2.5e-3", "-1,234", "± 1", "a=b", "missing"]
    table = Table("", ["x", "y"], [[cell, "a\n=1"] for cell in (*formulas, *harmless)])
    lines = list(csv.reader(io.StringIO(table.csv(), newline="")))[1:]
    assert lines == [[cell, "a\n=1"] for cell in (*(f"'{visible(cell)}" for cell in formulas), *harmless)]


def test_a_cell_is_no_markdown() -> None:
    text = Table("![t](x)", ["a"], [["![x](http://a/b) [y](z) *b* _i_ `c` <b> | \\"]]).markdown()
    assert text.splitlines()[0] == r"## \!\[t\](x)"
    assert r"| \!\[x\](http://a/b) \[y\](z) \*b\* \_i\_ \`c\` &lt;b> \| \\ |" in text
