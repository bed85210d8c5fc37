"""Records of searches -> tables; those of an evaluation are its own. Loads no model."""

from igpt_ds.evals import Record
from igpt_ds.text import Table, number


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
    return Table("", ["rate", "status", "step", "validation loss", "accuracy", "n", ""], rows)
