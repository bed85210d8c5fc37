"""The paper's figures and tables with one's own runs, as files."""

from collections.abc import Sequence
from pathlib import Path

from igpt_ds.atomic import publish_text
from igpt_ds.plots import save
from igpt_ds.results.paper_figures import figure_2, figure_3, figure_4
from igpt_ds.results.paper_tables import all_tables
from igpt_ds.results.records import read_runs


def write_all(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write figure2.png to figure4.png, table1.csv to table5.csv and tables.md of these runs; what was written."""
    runs = read_runs(paths)
    written = []
    for number, draw in ((2, figure_2), (3, figure_3), (4, figure_4)):
        written.append(folder / f"figure{number}.png")
        save(draw(runs), written[-1])
    tables = all_tables(runs)
    for number, table in enumerate(tables, 1):
        written.append(folder / f"table{number}.csv")
        publish_text(written[-1], table.csv())
    written.append(folder / "tables.md")
    publish_text(written[-1], "\n".join(table.markdown() for table in tables))
    return written
