"""Few labels a class (paper section 4.7, table 4): logistic regression on features of small random subsets.

Each subset has the same number of images of every class, drawn by a seed; the classifier sees nothing else, and is
scored on all images of a held-out split. The regularisation is fixed beforehand: to choose it on the validation split
would use many more labels than the subset has.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.evals import classifier
from igpt_ds.evals.classifier import Rows
from igpt_ds.evals.feature_cache import Features
from igpt_ds.evals.features import Network
from igpt_ds.evals.splits import Scored, ensemble, rows, take, take_scored
from igpt_ds.hashing import random_keys, stable_hash
from igpt_ds.text import Table

SUBSETS = 5
STRENGTH = 1.0  # of regularisation: scikit-learn's default
_SUBSET = zlib.crc32(b"subset with few labels")


def subset(labels_I: np.ndarray, count: int, seed: int, repeat: int) -> np.ndarray:
    """Rows of a random subset with `count` images of every class, ascending: int64 [classes * count].

    A pure function of its arguments; subsets of other counts and repeats are drawn independently.

    Raises:
        UserError: a class has fewer images.
    """
    # Each image has a random key; the smallest keys of each class are drawn.
    keys_I = random_keys(stable_hash(_SUBSET, seed, count, repeat), len(labels_I))
    chosen = []
    for label in np.unique(labels_I):
        members = np.flatnonzero(labels_I == label)
        if len(members) < count:
            raise UserError(
                f"--labels {count}: class {label} has {len(members)} training images only: ask for at most so many"
            )
        chosen.append(members[np.argsort(keys_I[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def check(train: Dataset, counts: tuple[int, ...]) -> None:
    """Raises:
    UserError: a class has fewer training images than the largest subset, or none.
    """
    classes = train.manifest.classes or []
    found = np.bincount(train.labels(), minlength=len(classes))
    least = int(found.argmin())
    if found[least] < max(counts):
        raise UserError(
            f"{train.path}: --labels {max(counts)}: class {classes[least]} has {found[least]} images: "
            f"ask for at most {found[least]} a class"
        )


def collect(network: Network, train: Dataset, scored: Dataset, masks: int, folder: Path) -> tuple[Features, Scored]:
    """The features of both splits; of use on rank 0 only, whose work goes on. A collective.

    Raises:
        UserError: the data is damaged, the disk is full, or a cache is not what its name says.
    """
    with network.ranks.meeting():
        found = take(network, train, folder, None), take_scored(network, scored, folder, None, masks)
        network.close()
    return found


def judge(
    train: Features, scored: Scored, layer: int, counts: tuple[int, ...], strength: float, config: Config
) -> dict[str, Any]:
    """Accuracies by number of labels a class: "mean" and "std" (sample standard deviation) over the subsets.

    Raises:
        UserError: a class has fewer training images than a subset needs.
    """
    found: dict[str, Any] = {}
    features_ID = train.of(layer)
    total = len(counts) * SUBSETS
    with tqdm(total=total, desc="few labels", unit=" subsets", leave=False, disable=None) as progress:
        for count in counts:
            accuracies, masks, converged = [], [], True
            for repeat in range(SUBSETS):
                chosen = subset(train.labels, count, config.seed, repeat)
                few = Rows([(features_ID[chosen],)], train.labels[chosen])
                model = next(classifier.fit(few, (strength,)))
                accuracies.append(model.accuracy(rows(scored.features, (layer,))))
                masks.append(ensemble(model, scored, (layer,), config))
                converged = converged and model.converged
                progress.update()
            result = {**_spread(accuracies), "n": len(scored.features.labels), "converged": converged}
            modal = [each["accuracy"] for each in masks if each]
            found[str(count)] = {**result, "masks": {"count": len(scored.masked), **_spread(modal)} if modal else None}
    return found


def _spread(accuracies: list[float]) -> dict[str, Any]:
    return {
        "accuracies": accuracies,
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)),
    }


def best_layer(path: Path, checkpoint: str) -> int:
    """The best layer of a probe of the same checkpoint (its `fingerprint`).

    Raises:
        UserError: there is no such record, or it is of another checkpoint.
    """
    try:
        record = json.loads(path.read_text())
        probed, layer = record["checkpoint"], record["best_layer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no record of a probe: run igpt-ds probe first, or give --layer") from None
    if probed != checkpoint or not isinstance(layer, int):
        raise UserError(
            f"{path}: a probe of another checkpoint (step {record.get('step')}): probe it again, or give --layer"
        )
    return layer


def table(record: dict[str, Any]) -> str:
    """What `igpt-ds low-data` recorded, for people."""
    lines = []
    for count, found in record["labels_per_class"].items():
        masks = found["masks"]
        lines.append([count, *_cells(found), *(_cells(masks) if masks else ["", ""]), str(SUBSETS), f"{found['n']:,}"])
    headings = ["labels a class", "accuracy", "± std", "modal of masks", "± std", "subsets", "n"]
    used = [c for c in range(len(headings)) if c not in (3, 4) or any(line[c] for line in lines)]
    note = (
        f"layer {record['layer']}, regularisation {record['regularisation']:g}; mean and sample standard deviation "
        f"(n - 1) over subsets; n images of {record['split']}"
    )
    if not all(found["converged"] for found in record["labels_per_class"].values()):
        note += f"; some not converged in {classifier.MAX_ITERATIONS} iterations"
    return Table("", [headings[c] for c in used], [[line[c] for c in used] for line in lines], note).text()


def _cells(found: dict[str, Any]) -> list[str]:
    return [f"{found['mean']:.4f}", f"{found['std']:.4f}"]
