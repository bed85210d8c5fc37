"""Records of searches -> tables; those of an evaluation are its own. Loads no model."""

from igpt_ds.evals import Record
from igpt_ds.text import Table, number

# What a best rate at an end of the grid leaves open.
EDGES = {
    "largest": "the largest rate is the best: larger ones may be better still (--rates)",
    "smallest": "the smallest rate is the best: smaller ones may be better still (--rates)",
    "only": "one rate alone was tried: others may be better (--rates)",
}


def sweep_table(record: Record) -> Table:
    """The rates that a search tried."""
    rows = [
        [
            f"{trial['rate']:g}",
            str(trial.get("status", "")),
            str(trial.get("step", "")),
            number(trial.get("val_loss")),
            number(trial.get("val_accuracy")),
            str(trial.get("n") or ""),
            "best" if trial["rate"] == record.get("winner") else "",
        ]
        for trial in record["rates"]
    ]
    headings = ["rate", "status", "step", "validation loss", "accuracy", "n", ""]
    return Table("", headings, rows, EDGES.get(record.get("edge") or "", ""))
