"""Text for people: what a terminal, a spreadsheet or a Markdown reader would obey stands as text."""

import csv
import dataclasses
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.cli
import igpt_ds.cli
from igpt_ds.config.file import load_config, to_toml
from igpt_ds.run.directory import LOGGER
from igpt_ds.text import Table, aligned, one_line, visible

# Escape sequences, C1, overwriting, bidirectional and zero-width characters, line ends of every kind, bytes that are
# no UTF-8.
OBEYED = "\x1b[2J\x9b1m\r\b\u202e\u200b\n\x0b\x85\u2028\udcff\x7f"


def test_what_a_terminal_obeys_stands_as_an_escape() -> None:
    shown = visible(OBEYED)
    assert shown == r"\x1b[2J\x9b1m\r\x08\u202e\u200b\n\x0b\x85\u2028\udcff\x7f"
    assert visible("Füße, 猫 😀 ± \\n") == "Füße, 猫 😀 ± \\n"
    long = one_line("x: " + 5000 * "\x1b" + ": mend it")
    assert len(long) < 2010 and long.startswith(r"x: \x1b") and long.endswith(": mend it")
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


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (igpt_ds.cli.main, ["report", f"run{OBEYED}"]),
        (igpt_ds.cli.main, [f"verb{OBEYED}"]),
        (igpt_ds.cli.main, ["report", "run", f"extra{OBEYED}"]),
        (igpt_ds.cli.main, ["pretrain", "--preset", "tiny", "--set", f"name{OBEYED}=1", "--print-config"]),
        (data_prep.cli.main, ["verify", f"data{OBEYED}"]),
        (data_prep.cli.main, ["shards", f"source{OBEYED}", "images", "--palette", "p", "--out", "out"]),
        (data_prep.cli.main, ["shards", "image_folder", f"images{OBEYED}", "--palette", "p", "--out", "out"]),
        (data_prep.cli.main, ["verify", f"--option{OBEYED}"]),
    ],
)
def test_a_fault_is_told_in_one_line(
    main: Callable[[], None],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.endswith("\n") and error[:-1].isprintable(), error
    assert r"\x1b[2J" in error


def test_a_printed_configuration_is_read_back(tmp_path: Path) -> None:
    name = "a\x1b\x9b\u202e\u2028\x7f\\x1b \n\t\U000e0001 猫"
    text = to_toml(dataclasses.replace(load_config("tiny"), name=name))
    assert text.replace("\n", "").isprintable()
    (tmp_path / "config.toml").write_text(text)
    assert load_config(tmp_path / "config.toml").name == name
