"""One HTML page of a run's records: whole in one file, without scripts and without a single outside address.

Pictures are PNG data URIs, each drawn twice, for light and for dark screens; every string that comes from the run is
escaped, and a content security policy forbids all that the page does not need. Loads no model.
"""

import base64
import functools
import html
import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import matplotlib
from matplotlib.figure import Figure

import igpt_ds
from igpt_ds import evals
from igpt_ds.checkpoint.names import list_checkpoints, read_content
from igpt_ds.config.size import parameter_count
from igpt_ds.errors import UserError
from igpt_ds.plots import png
from igpt_ds.reading import read_regular
from igpt_ds.results import figures
from igpt_ds.results.records import RunRecords, best_layer
from igpt_ds.results.tables import sweep_table
from igpt_ds.text import Table, counted, visible

_PNG = b"\x89PNG\r\n\x1a\n"
_EVENTS_SHOWN = 200
_SHEET, _SHEETS = 16 << 20, 64 << 20  # bytes of one sheet of samples, and of all
_PIXELS = 1 << 27  # of a sheet, which a browser unpacks
_LIGHT = {"savefig.facecolor": "auto", "font.size": 12}  # legible on a phone, where plots shrink
_DARK = {
    **_LIGHT,
    "figure.facecolor": "#17191e",
    "axes.facecolor": "#17191e",
    "legend.facecolor": "#17191e",
    "text.color": "#d8dade",
    "axes.labelcolor": "#d8dade",
    "axes.edgecolor": "#8a8f98",
    "xtick.color": "#d8dade",
    "ytick.color": "#d8dade",
    "grid.color": "#8a8f98",
}
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --faint: #5d636b; --line: #d5d8dc; --box: #f4f5f6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #17191e; --text: #d8dade; --faint: #9aa0a8; --line: #3a3f47; --box: #202329; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } p { margin: .4rem 0; } .faint { color: var(--faint); font-size: .9rem; }
nav a { margin-right: .8rem; color: inherit; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
img { display: block; max-width: 100%; height: auto; } .sheet { image-rendering: pixelated; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
code { background: var(--box); padding: 0 .25rem; } summary { cursor: pointer; }
"""


def page(run: RunRecords) -> str:
    """The page as text."""
    sections: dict[str, Callable[[RunRecords], str]] = {
        "Training": _training,
        "Events": _events,
        "Samples": _samples,
        **{evals.load(name).TITLE: _evaluation(name) for name in evals.names()},
        "Results": _results,
        "Configuration": _configuration,
        "Environment": _environment,
    }
    name = escape(f"{run.config.name}: {run.label}")
    links = " ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    body = "\n".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>\n{write(run)}\n</section>'
        for title, write in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{name}</h1>{_summary(run)}<nav>{links}</nav></header>
{body}
</body>
</html>
"""


def _summary(run: RunRecords) -> str:
    config = run.config
    facts = {
        "network": f"{parameter_count(config):,} parameters, {config.model.layers} layers of {config.model.width}",
        "objective": run.objective + (", fine-tuning" if config.finetune else ""),
        "input": f"{config.data.resolution}² pixels, {config.data.palette_size} colours",
    }
    train = [line for line in run.metrics if "loss" in line]
    if train:
        facts["trained"] = f"{train[-1]['step']:,} of {config.training.steps:,} steps"
    if run.validation:
        nats, images = run.validation[max(run.validation)]
        facts["validation loss"] = f"{nats:.4f} nats at step {max(run.validation):,} (n = {images:,})"
    if run.probe:
        best = best_layer(run.probe)
        n = run.probe["validation_images"]
        facts["linear probe"] = f"{best['accuracy']:.4f} at layer {best['layer']} (n = {n:,})"
    if run.result:
        facts["fine-tuned"] = (
            f"{run.result['accuracy']:.4f} (n = {run.result['n']:,} {run.result.get('split') or 'val'})"
        )
    return _facts(facts)


def _training(run: RunRecords) -> str:
    metrics = run.metrics
    if not any("loss" in line or "val_loss" in line for line in metrics):
        return _missing("No line of metrics.jsonl yet.")
    plots = [_picture(lambda: figures.losses(metrics), "Training and validation loss by step")]
    if any("val_accuracy" in line for line in metrics):
        plots.append(_picture(lambda: figures.accuracies(metrics), "Training and validation accuracy by step"))
    for key, title, unit, log in (
        ("lr", "Learning rate", "rate", False),
        ("grad_norm", "Gradient norm before clipping", "norm", True),
        ("tokens_per_s", "Throughput of all ranks", "tokens a second", False),
        ("data_wait", "Share of the time that data were waited for", "share", False),
    ):
        if any(key in line for line in metrics):
            draw = _course(metrics, key, title, unit, log)
            plots.append(_picture(draw, f"{title} by step"))
    return f'<div class="plots">{"".join(plots)}</div>'


def _course(metrics: list[evals.Record], key: str, title: str, unit: str, log: bool) -> Callable[[], Figure]:
    return lambda: figures.course(metrics, key, title, unit, log)


def _events(run: RunRecords) -> str:
    events = [line for line in run.metrics if "event" in line]
    if not events:
        return "<p>None: no step was skipped, spiked or rolled back.</p>"
    shown = events[-_EVENTS_SHOWN:]
    rows = [[f"{line['step']:,}", str(line["event"]), str(line.get("reason", ""))] for line in shown]
    earlier = f"The last {len(shown)} of {len(events):,}." if len(events) > len(shown) else ""
    return _table(Table("", ["step", "event", "reason"], rows, earlier))


def _samples(run: RunRecords) -> str:
    found: list[str] = []
    room, others = _SHEETS, 0
    # Newest first, while there is room. The plots of other evaluations are drawn anew in their own sections.
    for path in sorted({*run.path.glob("*.png"), *run.path.glob("samples/*.png")}, reverse=True):
        if path.parent.name != "samples" and not path.name.startswith(("samples", "completions")):
            continue
        try:
            content = read_regular(path, min(_SHEET, room))
        except (OSError, ValueError):
            content = b""
        pixels = int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big")
        if not content.startswith(_PNG) or pixels > _PIXELS:
            others += 1
            continue
        room -= len(content)
        name = escape(path.name)
        picture = f'<img class="sheet" src="{_uri(content)}" alt="{name}">'
        found.insert(0, f'<figure>{picture}<figcaption class="faint">{name}</figcaption></figure>')
    if others:
        found.append(_missing(f"{counted(others, 'file')} not shown: no PNG, or too large for this page."))
    return "".join(found) or _missing("No sheet in the run.", "igpt-ds sample RUN --out RUN/samples.png")


def _evaluation(name: str) -> Callable[[RunRecords], str]:
    """The section of an evaluation: each record's figure and table."""
    evaluation = evals.load(name)

    def write(run: RunRecords) -> str:
        parts = []
        for record in run.evaluations[name].values():
            draw = getattr(evaluation, "figure", None)
            picture = _picture(functools.partial(draw, record), evaluation.TITLE) if draw else ""
            parts.append(f'<div class="plots">{picture}<div>{_table(evaluation.table(record))}</div></div>')
        return "".join(parts) or _missing("Not recorded.", f"igpt-ds {evaluation.NAME} RUN")

    return write


def _results(run: RunRecords) -> str:
    parts = []
    if run.result is not None:
        facts = {key: json.dumps(value, ensure_ascii=False).strip('"') for key, value in run.result.items()}
        parts.append(f"<h3>Fine-tuning</h3>{_facts(facts)}")
    if run.sweep is not None:
        parts.append(f"<h3>Learning-rate search</h3>{_table(sweep_table(run.sweep))}")
    return "".join(parts) or _missing("No fine-tuning, and no part of a search for the learning rate.")


def _configuration(run: RunRecords) -> str:
    parts = []
    for name in ("config.toml", "ds.json"):
        path = run.path / name
        if os.path.lexists(path):
            opened = " open" if name == "config.toml" else ""
            try:
                lines = read_regular(path, _SHEET).decode(errors="replace").splitlines()
            except (OSError, ValueError):
                lines = ["cannot be read: no regular file, or too large"]
            text = "\n".join(map(escape, lines))
            parts.append(f"<details{opened}><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _environment(run: RunRecords) -> str:
    facts = {}
    newest = list_checkpoints(run.path / "checkpoints")
    if newest:
        try:
            content = read_content(newest[-1])
            facts["trained with"] = f"igpt-ds {content.get('code_version', 'of unknown version')}"
            facts["ranks"] = f"{content.get('world', 'unknown')}"
        except UserError:
            facts["trained with"] = "unknown: the newest checkpoint cannot be read"
    packages = {name: _version(name) for name in ("torch", "deepspeed", "numpy", "matplotlib")}
    facts["page made with"] = f"igpt-ds {igpt_ds.__version__}, Python {platform.python_version()}"
    facts["packages there"] = ", ".join(f"{name} {number}" for name, number in packages.items())
    facts["page made"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _facts(facts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- pieces of HTML --------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """A string of the run as HTML: neither a tag, nor what reorders or hides the text around it."""
    return html.escape(visible(text))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _table(table: Table) -> str:
    right = [' class="n"' if table.numeric(column) else "" for column in range(len(table.headings))]
    title = f"<p>{escape(table.title)}</p>" if table.title else ""
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(table.headings, right, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, right, strict=True)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="faint">{escape(line)}</p>' for line in table.note.splitlines())
    return f'{title}<div class="wide"><table><tr>{head}</tr>{body}</table></div>{notes}'


def _missing(text: str, command: str = "") -> str:
    made = f" <code>{escape(command)}</code> writes it." if command else ""
    return f'<p class="faint">{escape(text)}{made}</p>'


def _picture(draw: Callable[[], Figure], alt: str) -> str:
    with matplotlib.rc_context(_LIGHT):
        light = _uri(png(draw()))
    with matplotlib.rc_context(_DARK):
        dark = _uri(png(draw()))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
