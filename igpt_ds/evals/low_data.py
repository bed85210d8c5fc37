"""Few labels a class (paper section 4.7, table 4): logistic regression on features of small random subsets.

Each subset has the same number of images of every class, drawn by a seed; the classifier sees nothing else, and is
scored on all images of a held-out split. The regularisation is fixed beforehand: to choose it on the validation split
would use many more labels than the subset has. Where no layer is named, the features are those that did best in a
probe of the same checkpoint, in all that they were taken by.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import numpy as np
from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.dataset.subset import balanced, require_labels
from igpt_ds.errors import UserError
from igpt_ds.evals import DIVIDED, MASKS, SHARE, STRENGTH, Record, Subject, baselines, header, val_or_test
from igpt_ds.reading import read_json
from igpt_ds.text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from igpt_ds.dataset.shards import Dataset
    from igpt_ds.features.cache import Features
    from igpt_ds.features.extract import Network, Recipe
    from igpt_ds.features.splits import Scored

NAME, TITLE = "low-data", "Few labels"
_SPREAD = {"mean": SHARE, "std": SHARE}
HOLDS = {
    "labels_per_class": {
        "*": {**_SPREAD, "accuracies": [SHARE], "n": int, "converged?": bool, "masks?": _SPREAD},
    },
    "layer?": int,
    "layers?": [int],
    "norm?": str,
    "precision?": str,
    "store?": str,
    "train_crop?": str,
    "chance?": SHARE,
    "regularisation?": float,
    "split?": str,
}
SUBSETS = 5  # and a regularisation of 1, scikit-learn's default
OPTIONS = (
    click.Option(["--labels"], metavar="N,N", default="4,25,400", show_default=True, help="Labels a class."),
    click.Option(
        ["--layer"], type=click.IntRange(min=0), help="Whose features.  [default: what did best in RUN/probe.json]"
    ),
    val_or_test("Whose images are scored."),
    MASKS,
    click.Option(["--regularisation"], type=STRENGTH, default=1.0, show_default=True, help="Strength."),
    DIVIDED,
)


def run(
    subject: Subject,
    *,
    labels: str = "4,25,400",
    layer: int | None = None,
    split: str = "val",
    masks: int | None = None,
    regularisation: float = 1.0,
    ds: str | None = None,
) -> Record | None:
    """Few labels a class: a linear classifier of 5 random subsets, mean and standard deviation of its accuracy.

    \b
    As the paper does, on the best features of a probe, one layer or several side by side, of the same norm and
    precision; writes RUN/low_data.json and prints the table:
        igpt-ds probe RUN --data cifar10
        igpt-ds low-data RUN --data cifar10 --labels 4,25,400 --split test
    """
    from igpt_ds.features.extract import Network, Recipe, usual_precision
    from igpt_ds.features.splits import masks_of

    counts = [text.strip() for text in labels.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", text) for text in counts):
        raise UserError(f"--labels {labels}: not of the form 4,25,400: write whole numbers, divided by commas")
    wanted = tuple(sorted({int(text) for text in counts}))
    weights, config, splits = subject.labelled(split == "test")
    require_labels(splits.train, wanted[-1], f"--labels {wanted[-1]}")
    scored_set = splits.test or splits.validation
    facts = header("low_data", weights, config, splits, scored_set)
    if layer is None:
        recipe = best_features(subject.folder / "probe.json", facts["checkpoint"])
    else:
        recipe = Recipe((layer,), precision=usual_precision())
    if (last := max(recipe.layers)) > config.model.layers:
        raise UserError(f"--layer {last}: the network has layers 0 to {config.model.layers}: choose among them")
    network = Network(config, weights, recipe, subject.ranks, ds, placement=subject.placed(ds))
    folder = subject.folder / "features"
    train, scored = collect(network, splits.train, scored_set, masks_of(config, masks), folder)
    if subject.ranks.rank:
        return None
    return {
        **facts,
        "split": scored_set.manifest.split,
        "layers": list(recipe.layers),
        "norm": recipe.norm,
        "precision": recipe.precision,
        "store": recipe.store,
        "regularisation": regularisation,
        "labels_per_class": judge(train, scored, recipe.layers, wanted, regularisation, config),
    }


def collect(
    network: "Network", train: "Dataset", scored: "Dataset", masks: int, folder: Path
) -> "tuple[Features, Scored]":
    """The features of both splits. A collective of ranks, of which only rank 0's work goes on."""
    from igpt_ds.features.splits import take, take_scored

    with network.ranks.meeting():
        found = take(network, train, folder, None), take_scored(network, scored, folder, None, masks)
        network.close()
    return found


def judge(
    train: "Features",
    scored: "Scored",
    layers: tuple[int, ...],
    counts: tuple[int, ...],
    strength: float,
    config: Config,
) -> dict[str, Any]:
    """Accuracies by number of labels a class: "mean" and "std" (sample standard deviation) over the subsets.

    Args:
        layers: whose features stand side by side.
    """
    from igpt_ds.features import classifier
    from igpt_ds.features.splits import ensemble, rows

    found: dict[str, Any] = {}
    total = len(counts) * SUBSETS
    with tqdm(total=total, desc="few labels", unit=" subsets", leave=False, disable=None) as progress:
        for count in counts:
            accuracies, masks, converged = [], [], True
            for repeat in range(SUBSETS):
                chosen = balanced(train.labels, count, config.seed, repeat)
                few = classifier.Rows([tuple(train.of(layer)[chosen] for layer in layers)], train.labels[chosen])
                model = next(classifier.fit(few, (strength,)))
                accuracies.append(model.accuracy(rows(scored.features, layers)))
                masks.append(ensemble(model, scored, layers, config))
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


def best_features(path: Path, checkpoint: str) -> "Recipe":
    """What did best on the validation split in a probe of the same checkpoint (its `fingerprint`)."""
    from igpt_ds.features.extract import Norm, Precision, Recipe, Store

    try:
        record = read_json(path)
        probed, step = record["checkpoint"], record.get("step")
        results = [{**each, "layers": [each["layer"]]} for each in record["layers"]]
        results += record.get("concatenation") or []
        layers = max(results, key=lambda each: each["accuracy"])["layers"]
        # Older versions have not recorded all of it: it was so.
        how = record.get("norm", "first"), record.get("precision", "float32"), record.get("store", "float32")
        if layers != sorted({layer for layer in layers if type(layer) is int and layer >= 0}) or not layers:
            raise ValueError("layers")
        if not all(each in get_args(kind) for each, kind in zip(how, (Norm, Precision, Store), strict=True)):
            raise ValueError("how they were taken")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no record of a probe: run igpt-ds probe first, or give --layer") from None
    if probed != checkpoint:
        raise UserError(f"{path}: a probe of another checkpoint (step {step}): probe it again, or give --layer")
    return Recipe(tuple(layers), *how)


def table(record: Record) -> Table:
    """Mean accuracy and its spread by labels a class."""
    lines = []
    for count, found in sorted(record["labels_per_class"].items(), key=lambda item: int(item[0])):
        masks, subsets = found.get("masks"), len(found["accuracies"])
        lines.append([count, *_cells(found), *(_cells(masks) if masks else ["", ""]), str(subsets), f"{found['n']:,}"])
    headings = ["labels a class", "accuracy", "± std", "modal of masks", "± std", "subsets", "n"]
    layers = record.get("layers") or [record.get("layer")]
    of = [f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}", f"norm {record.get('norm') or 'first'}"]
    types = (("precision", "network"), ("store", "features"))
    of += [f"{record[key]} {what}" for key, what in types if record.get(key)]
    note = (
        f"{', '.join(of)}, regularisation {record.get('regularisation') or 1:g}\n"
        f"mean and sample standard deviation (n - 1) over subsets; n images of {record.get('split', 'val')}"
    )
    if not all(found.get("converged", True) for found in record["labels_per_class"].values()):
        note += "; some classifiers did not converge"
    return Table("", headings, lines, "\n".join([note, *baselines(record)])).without_empty_columns()


def _cells(found: Record) -> list[str]:
    return [f"{found['mean']:.4f}", f"{found['std']:.4f}"]


def figure(record: Record) -> "Figure":
    """Accuracy by labels a class, mean and standard deviation over random subsets."""
    from igpt_ds.plots import new

    found = sorted((int(count), result) for count, result in record["labels_per_class"].items())
    drawn = new()
    axes = drawn.subplots()
    means, deviations = ([100 * result[key] for _, result in found] for key in ("mean", "std"))
    axes.errorbar([count for count, _ in found], means, deviations, fmt="o-", capsize=4)
    for count, result in found:
        axes.plot([count] * len(result["accuracies"]), [100 * a for a in result["accuracies"]], ".", color="C7")
    axes.set_xscale("log")
    axes.set_xticks([count for count, _ in found], [str(count) for count, _ in found])
    axes.minorticks_off()
    axes.set_xlabel("labels a class")
    axes.set_ylabel("accuracy, %")
    axes.set_title("Few labels: mean ± standard deviation over subsets")
    axes.grid(alpha=0.3)
    return drawn


def fault(record: Record) -> str:
    """A number of labels that is none."""
    odd = [key for key in record["labels_per_class"] if not re.fullmatch("[1-9][0-9]{0,8}", key)]
    return f"{odd[0]!r:.20} labels a class" if odd else ""
