"""The report: well-formed, whole in itself, safe whatever a run holds; looked at by a browser where there is one."""

import base64
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from igpt_ds import cli
from igpt_ds.results.records import read_run
from igpt_ds.results.report import page
from tests.helpers import records

HOSTILE = "</pre><script>alert('x')</script><img src=https://example.org/x onerror=alert(1)>"
VOID = {"meta", "link", "img", "source", "br", "hr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that opens must close in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def addresses(self) -> list[str]:
        """All that the page would load or link to."""
        names = ("src", "srcset", "href", "action", "data", "poster", "background")
        return [value for _, attributes in self.tags for name in names if (value := attributes.get(name)) is not None]


def png() -> bytes:
    """A picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of record, and with hostile strings wherever one fits."""
    folder = records.make_run(tmp_path_factory.mktemp("report") / "run", f"name={HOSTILE}")
    validation = {"step": 600, "val_loss": 1.25, "val_images": 60}
    event = {"step": 300, "event": "spike", "reason": HOSTILE}
    records.write_metrics(folder, records.training_line(100, 2.0), event, records.training_line(600, 1.2), validation)
    records.write(folder / "probe.json", records.probe(600, 0.5, 0.875, 0.75, masks=records.masks(0.9)))
    records.write(folder / "low_data.json", records.LOW_DATA)
    records.write(folder / "eval.json", records.likelihood())
    records.write(folder / "result.json", {"kind": HOSTILE, "accuracy": 0.9375, "n": 64, "split": "test"})
    rates = [{"rate": 0.01, "status": HOSTILE}, {"rate": 0.003, "status": "done", "val_loss": 1.5, "n": 60}]
    records.write(folder.parent / "sweep.json", {"rates": rates, "winner": 0.003})
    (folder / "ds.json").write_text(f'{{"zero": "{HOSTILE}"}}')
    (folder / "samples.png").write_bytes(png())
    (folder / "samples-2.png").write_bytes(b"<script>no picture</script>")
    (folder / "probe.png").write_bytes(png())
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return page(read_run(run))


def test_nothing_comes_from_outside_and_every_picture_decodes(html: str) -> None:
    parsed = Page(html)
    for address in parsed.addresses():
        assert address.startswith(("#", "data:")), address
    pictures = [a for a in parsed.addresses() if a.startswith("data:image/png;base64,")]
    decoded = [base64.b64decode(address.partition(",")[2], validate=True) for address in pictures]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in decoded)
    # Five curves, probe, few labels and heat map, each light and dark; and one sheet.
    assert len(decoded) == 2 * 8 + 1
    # The hostile text stands in the page, but only as text.
    assert all("//" not in a for a in parsed.addresses() if not a.startswith("data:image/png;base64,"))
    assert not re.search(r"@import|url\(", html)


def test_hostile_strings_stay_text(html: str) -> None:
    parsed = Page(html)
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.text.count("<script>alert('x')</script>") >= 5  # heading, event, configuration, result, search
    assert "<b>dog" in parsed.text
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_records_are_told(html: str) -> None:
    text = Page(html).text
    for figure in ("1.2500 nats at step 600 (n = 60)", "0.8750 at layer 1 (n = 60)", "0.9375", "0.5500", "0.0412"):
        assert figure in text, figure
    for words in (
        "mask seed 3",
        "no RGB likelihood",
        "Palette distortion: unknown",
        "spike",
        "5 masks: 0.9000",
        "1.5000",
    ):
        assert words in text, words
    assert "Not recorded" not in text and "samples.png" in text and "samples-2.png" not in text


def test_a_run_without_records_says_how_to_make_them(tmp_path: Path) -> None:
    text = Page(page(read_run(records.make_run(tmp_path / "run")))).text
    for command in ("igpt-ds probe RUN", "igpt-ds eval RUN", "igpt-ds sample RUN --out"):
        assert command in text
    assert "No line of metrics.jsonl yet." in text


def test_what_is_no_sheet_is_passed_over_and_no_number_is_a_gap(tmp_path: Path) -> None:
    folder = records.make_run(tmp_path / "run\x1b\u202e\udcff")
    (folder / "samples").mkdir()
    os.mkfifo(folder / "samples" / "x.png")
    os.mkfifo(folder / "ds.json")
    (folder / "samples" / "directory.png").mkdir()
    (folder / "samples-bomb.png").write_bytes(png()[:16] + b"\0\1\0\0" * 2 + png()[24:])
    with (folder / "samples-large.png").open("wb") as file:
        file.write(png())
        file.truncate(300 << 20)  # sparse
    (folder / "samples-good.png").write_bytes(png())
    huge = {"loss": 1e308, "lr": 1e-308, "grad_norm": -1e308, "tokens_per_s": 2**63, "data_wait": None}
    lines = [{"step": step, **huge} for step in (0, 2**62)]
    event = {"step": 5, "event": 3, "reason": ["x"], "loss": {}}
    validation = {"step": 2**62, "val_loss": None, "val_images": 60}
    records.write_metrics(folder, *lines, records.training_line(100, 2.0) | {"loss": None}, event, validation)
    signal.alarm(60)  # a pipe without a writer
    try:
        text = page(read_run(folder))
    finally:
        signal.alarm(0)
    assert len(text) < 1 << 20
    shown = Page(text).text
    assert "4 files not shown" in shown and "samples-good.png" in shown and "cannot be read: no regular file" in shown
    assert "nan nats at step 4,611,686,018,427,387,904 (n = 60)" in shown and r"run\x1b\u202e\udcff" in shown


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = records.make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["igpt-ds", "report", str(folder)])
    cli.main()
    assert capsys.readouterr().out == f"written: {folder / 'report.html'}\n"
    Page((folder / "report.html").read_text())
    monkeypatch.setattr(sys, "argv", ["igpt-ds", "report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(BROWSER is None, reason="no chromium here to open the page with")
def test_a_browser_shows_it_without_a_complaint(html: str, tmp_path: Path) -> None:
    path, picture, log = tmp_path / "report.html", tmp_path / "page.png", tmp_path / "log.txt"
    path.write_text(html)
    assert BROWSER is not None
    # On a phone's width; offline by a resolver that knows no name.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--window-size=500,900", f"--screenshot={picture}"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [BROWSER, *options, path.as_uri()], stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            assert process.wait(60) == 0, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert picture.read_bytes().startswith(b"\x89PNG")
    console = [line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line]
    assert console == []
