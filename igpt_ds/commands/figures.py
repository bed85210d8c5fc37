"""`igpt-ds figures`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.text import visible


@click.command(context_settings=CONTEXT)
@click.argument("run_paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write into.")
def figures(run_paths: tuple[Path, ...], out: Path) -> None:
    """Redraw the paper's figures 2, 3, 4 and tables 1 to 5 from recorded results, beside its published numbers.

    \b
    Pre-trainings and their fine-tunings together:
        igpt-ds figures runs/s runs/s-bert runs/s-finetune --out paper
    writes figure2.png, figure3.png, figure4.png, tables.md and table1.csv to table5.csv.

    Nothing is computed anew: what probe, eval, finetune and sweep wrote into the runs is shown, and what they did not
    write is shown as missing. Figure 3 takes a probe record of each checkpoint, RUN/probe*.json.
    """
    from igpt_ds.results.paper import write_all

    click.echo(visible("written: " + ", ".join(map(str, write_all(run_paths, out)))))
