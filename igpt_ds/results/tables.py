"""Records of one run -> tables and the sentences that are needed to read them. Loads no model."""

import math
from typing import Any

from igpt_ds.run.records import Record, best_layer
from igpt_ds.text import Table, figure

_CLASSES_SHOWN = 24  # of more, the easiest and the hardest


def likelihood_table(record: Record) -> Table:
    """What `igpt-ds eval` found, whole and by class, with what the figures are of and what they are not."""
    rows = [["all", *_cells(record)]]
    classes = record["classes"] or []
    if len(classes) > _CLASSES_SHOWN:
        known = sorted((c for c in classes if c["images"]), key=lambda c: c["nats_per_token"])
        half = _CLASSES_SHOWN // 2
        rows += [[f"easiest: {c['name']}", *_cells(c)] for c in known[:half]]
        rows += [[f"hardest: {c['name']}", *_cells(c)] for c in known[-half:]]
    else:
        rows += [[f"class {c['name']}", *_cells(c)] for c in classes]
    uniform = math.log(record["colours"])
    rows.append([f"uniform over {record['colours']} colours", figure(uniform), figure(uniform / math.log(2)), "", ""])
    title = f"{record['name']}, step {record['step']:,}, {record['split']}: {record['tokens']:,} tokens scored"
    headings = ["", "nats/token", "bits/token", "± standard error", "images"]
    return Table(title, headings, rows, "\n".join(_likelihood_notes(record)))


def _cells(part: dict[str, Any]) -> list[str]:
    values = [figure(part[key]) for key in ("nats_per_token", "bits_per_token", "standard_error")]
    return [*values, f"{part['images']:,}"]


def _likelihood_notes(record: Record) -> list[str]:
    lines = ["The standard error is that of the nats, over images."]
    if record["masks"] is not None:
        lines.append(
            f"BERT: mean over {record['masks']} masks an image, rate {record['mask_rate']}, "
            f"mask seed {record['mask_seed']}; {record['images_without_mask']} images were never masked and left out."
        )
    if (distortion := record["palette_distortion"]) is None:
        lines.append(
            "Palette distortion: unknown, the data's manifest does not record it; "
            "igpt-data palette prints it when it fits a palette to the images."
        )
    else:
        lines.append(f"Palette distortion: {distortion:.4e} squared distance a pixel, in [-1, 1] units.")
    lines.append(
        f"A token is one of {record['colours']} palette colours: this is no RGB likelihood (bits/dim), "
        "and compares with models on the same palette and resolution only."
    )
    return lines


def probe_table(record: Record) -> Table:
    """Accuracy of every layer, beside the untrained network where it was probed."""
    untrained = {r["layer"]: r["accuracy"] for r in record.get("untrained") or []}
    best = best_layer(record)
    rows = [
        [
            str(r["layer"]),
            figure(r["accuracy"]),
            figure(untrained.get(r["layer"])),
            "best" if r is best else "",
            "" if r.get("converged", True) else "not converged",
        ]
        for r in record["layers"]
    ]
    note = f"n = {record['validation_images']:,} validation images."
    if test := record.get("test"):
        note += f" On the test split: {test['accuracy']:.4f} (n = {test['n']:,})."
    headings = ["layer", "accuracy", "untrained", "", ""]
    used = [c for c in range(5) if c < 2 or any(row[c] for row in rows)]
    return Table("", [headings[c] for c in used], [[row[c] for c in used] for row in rows], note)


def sweep_table(record: Record) -> Table:
    """The rates that a search tried."""
    rows = [
        [
            f"{trial['rate']:g}",
            str(trial.get("status", "")),
            str(trial.get("step", "")),
            figure(trial.get("val_loss")),
            figure(trial.get("val_accuracy")),
            str(trial.get("n") or ""),
            "best" if trial["rate"] == record.get("winner") else "",
        ]
        for trial in record["rates"]
    ]
    return Table("", ["rate", "status", "step", "validation loss", "accuracy", "n", ""], rows)


def few_labels_table(record: Record) -> Table:
    """Accuracies with few labels a class: mean, standard deviation and number of subsets."""
    rows = [
        [
            count,
            figure(found["mean"]),
            figure(found["std"]),
            str(len(found["accuracies"])),
            f"{found['n']:,}",
        ]
        for count, found in sorted(record["labels_per_class"].items(), key=lambda item: int(item[0]))
    ]
    return Table("", ["labels a class", "mean accuracy", "standard deviation", "subsets", "images"], rows)
