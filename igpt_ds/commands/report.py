"""`igpt-ds report`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.text import visible


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html]")
def report(run_path: Path, out: Path | None) -> None:
    """One HTML page of all that a run has recorded, whole in one file: it opens offline, also on a phone.

    \b
    Curves, events, samples, probe by depth, low data, likelihood, configuration and versions:
        igpt-ds report RUN
    Sample sheets are shown that lie in the run: igpt-ds sample RUN --out RUN/samples.png
    """
    from igpt_ds.atomic import publish_text
    from igpt_ds.results.records import read_run
    from igpt_ds.results.report import page

    out = out or run_path / "report.html"
    publish_text(out, page(read_run(run_path)))
    click.echo(visible(f"written: {out}"))
