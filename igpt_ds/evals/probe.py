"""Linear probe of every layer (paper section 2.4, figure 2): how well a linear classifier reads the classes.

First all features are taken, by all ranks of a launch (`collect`); then rank 0 alone classifies them (`judge`). On the
validation split are chosen: each layer's regularisation (or rate, with SGD), and the best layer. Only with that fixed
is the validation split folded back into training and the test split looked at, once (section 3.4).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.errors import RunError
from igpt_ds.evals import classifier, classifier_sgd
from igpt_ds.evals.classifier import Classifier, Rows
from igpt_ds.evals.feature_cache import Features
from igpt_ds.evals.features import Network, pixels
from igpt_ds.evals.splits import Scored, Splits, ensemble, rows, take, take_scored
from igpt_ds.text import Table, figure

STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01)  # of regularisation; see classifier.py for the objective
Layers = tuple[int, ...]
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is probed and how.

    Attributes:
        strengths: of regularisation, tried with L-BFGS in descending order.
        iterations: batches of a classifier by SGD; the paper's are a million.
        concatenate: also so many layers side by side, centred on the best (paper section 4.4 has 5).
        masks: of a BERT model, 0 of an auto-regressive one.
        images: so many of each split, from its beginning; None for all.
    """

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    strengths: tuple[float, ...] = STRENGTHS
    iterations: int = 1_000_000
    concatenate: tuple[int, ...] = ()
    masks: int = 0
    images: int | None = None


@dataclass(frozen=True)
class Collected:
    """All features of a probe."""

    train: Features
    validation: Scored
    test: Scored | None = None
    untrained: tuple[Features, Features] | None = None  # of train/ and val/


@dataclass(frozen=True)
class Choice:
    """A classifier, what was chosen for it (a strength, or a rate), and its accuracy on the validation split."""

    accuracy: float
    setting: float
    classifier: Classifier


def collect(
    trained: Network, untrained: Network | None, splits: Splits, settings: Settings, folder: Path
) -> Collected | None:
    """All features that `judge` needs, on rank 0; None on the others, whose work is done then.

    Args:
        folder: of the cached features.

    Raises:
        UserError: the data is damaged, the disk is full, or a cache is not what its name says.
        RunError: a feature is not finite.
    """
    images, before, test = settings.images, None, None
    with trained.ranks.meeting():
        train = take(trained, splits.train, folder, images)
        validation = take_scored(trained, splits.validation, folder, images, settings.masks)
        if splits.test:
            test = take_scored(trained, splits.test, folder, images, settings.masks)
        trained.close()
        if untrained:
            before = (take(untrained, splits.train, folder, images), take(untrained, splits.validation, folder, images))
            untrained.close()
    return Collected(train, validation, test, before) if trained.ranks.rank == 0 else None


def choose(train: Rows, validation: Rows, classes: int, settings: Settings, seed: int, title: str) -> Choice:
    """The classifier that does best on the validation split.

    With L-BFGS every strength is tried. With SGD the rates are tried in order, until the accuracy falls (section 3.4).

    Raises:
        RunError: SGD diverged at every rate.
    """
    best: Choice | None = None
    for setting, found in _candidates(train, classes, settings, seed, title):
        if found is None:
            continue
        accuracy = found.accuracy(validation)
        if best is None or accuracy > best.accuracy:
            best = Choice(accuracy, setting, found)
        elif settings.solver == "sgd" and accuracy < best.accuracy:
            break
    if best is None:
        raise RunError(f"{title}: SGD diverged at every rate: look at the features, or take --solver lbfgs")
    return best


def _candidates(
    train: Rows, classes: int, settings: Settings, seed: int, title: str
) -> Iterator[tuple[float, Classifier | None]]:
    if settings.solver == "lbfgs":
        yield from zip(settings.strengths, classifier.fit(train, settings.strengths), strict=True)
        return
    for rate in classifier_sgd.RATES:
        yield rate, classifier_sgd.fit(train, classes, rate, settings.iterations, seed, f"{title}, rate {rate:g}")


def judge(collected: Collected, splits: Splits, config: Config, settings: Settings) -> Record:
    """Classify all that was collected; the result as JSON.

    Accuracies are on the validation split, but under the keys "test".

    Raises:
        RunError: SGD diverged at every rate.
    """
    judged = _Judge(collected, len(splits.train.manifest.classes or ()), config, settings)
    train, shown = collected.train, collected.validation.features
    trained = judged.each_layer(train, shown, "trained")
    before = judged.each_layer(*collected.untrained, "untrained") if collected.untrained else {}
    best = max(trained, key=lambda layer: trained[layer].accuracy)
    colours = None
    if settings.solver == "lbfgs":  # of ImageNet they would not fit in memory
        given = Rows([(pixels(splits.train, len(train.labels)),)], train.labels)
        colours = judged.choose(given, Rows([(pixels(splits.validation, len(shown.labels)),)], shown.labels), "pixels")
    return {
        "layers": [{"layer": layer, **judged.result(choice)} for layer, choice in trained.items()],
        "best_layer": best,
        "best_accuracy": trained[best].accuracy,
        "untrained": [{"layer": layer, **judged.result(choice)} for layer, choice in before.items()],
        "pixels": colours and colours.accuracy,
        "pixels_regularisation": colours and colours.setting,
        "concatenation": [judged.side_by_side(centred(train.numbers, best, k)) for k in settings.concatenate],
        "masks": ensemble(trained[best].classifier, collected.validation, (best,), config),
        "test": judged.tested((best,), trained[best]),
        "train_images": len(train.labels),
        "validation_images": len(shown.labels),
        "classes": judged.classes,
    }


@dataclass(frozen=True)
class _Judge:
    collected: Collected
    classes: int
    config: Config
    settings: Settings

    def choose(self, train: Rows, validation: Rows, title: str) -> Choice:
        return choose(train, validation, self.classes, self.settings, self.config.seed, title)

    def each_layer(self, train: Features, validation: Features, name: str) -> dict[int, Choice]:
        bar = tqdm(train.numbers, desc=f"probes of {name}", unit=" layers", leave=False, disable=None)
        return {k: self.choose(rows(train, (k,)), rows(validation, (k,)), f"{name}, layer {k}") for k in bar}

    def side_by_side(self, layers: Layers) -> Record:
        train = rows(self.collected.train, layers)
        choice = self.choose(train, rows(self.collected.validation.features, layers), f"layers {list(layers)}")
        test = self.tested(layers, choice)
        return {"layers": list(layers), "features": train.width, **self.result(choice), "test": test}

    def result(self, choice: Choice) -> Record:
        sgd = self.settings.solver == "sgd"
        return {
            "accuracy": choice.accuracy,
            "n": len(self.collected.validation.features.labels),
            "regularisation": None if sgd else choice.setting,
            "learning_rate": choice.setting if sgd else None,
            "converged": choice.classifier.converged,
        }

    def tested(self, layers: Layers, choice: Choice) -> Record | None:
        """The test split once, by a classifier of train and validation images with what was chosen."""
        test = self.collected.test
        if test is None:
            return None
        folded = rows(self.collected.train, layers) + rows(self.collected.validation.features, layers)
        if self.settings.solver == "sgd":
            steps, seed = self.settings.iterations, self.config.seed
            found = classifier_sgd.fit(folded, self.classes, choice.setting, steps, seed, "with validation images")
        else:
            found = next(classifier.fit(folded, (choice.setting,)))
        if found is None:
            raise RunError("SGD: it diverged with the validation images folded in: take --solver lbfgs")
        return {
            "accuracy": found.accuracy(rows(test.features, layers)),
            "n": len(test.features.labels),
            "layers": list(layers),
            "train_images": len(folded),
            "converged": found.converged,
            "masks": ensemble(found, test, layers, self.config),
        }


def centred(layers: Layers, best: int, count: int) -> Layers:
    """So many neighbours in `layers` with the best in their middle, or as near to it as the ends allow."""
    first = layers.index(best) - (count - 1) // 2
    first = min(max(first, 0), len(layers) - count)
    return layers[first : first + count]


def table(record: Record) -> str:
    """What `igpt-ds probe` recorded, for people."""
    before = {result["layer"]: result["accuracy"] for result in record["untrained"]}
    lines = [
        _line(
            str(result["layer"]),
            result,
            before.get(result["layer"]),
            result["layer"] == record["best_layer"] and "best",
        )
        for result in record["layers"]
    ]
    if record["pixels"] is not None:
        n, strength = record["validation_images"], record["pixels_regularisation"]
        lines.append(["pixels", f"{record['pixels']:.4f}", "", f"{n:,}", f"{strength:g}", ""])
    for result in record["concatenation"]:
        lines.append(_line(f"{result['layers'][0]} to {result['layers'][-1]}", result, None, "side by side"))
    setting = "rate" if record["solver"] == "sgd" else "regularisation"
    headings = ["layer", "accuracy", "untrained", "n", setting, ""]
    used = [column for column in range(len(headings)) if column != 2 or before]
    notes = [f"trained on {record['train_images']:,} images; accuracy on n of the validation split"]
    notes += _mask_notes("validation", record["masks"])
    for result in filter(None, [record["test"], *(several["test"] for several in record["concatenation"])]):
        name = "layer" if len(result["layers"]) == 1 else "layers"
        which = " to ".join(str(layer) for layer in dict.fromkeys((result["layers"][0], result["layers"][-1])))
        notes.append(
            f"test, {name} {which}, trained on {result['train_images']:,} images (validation folded in): "
            f"{result['accuracy']:.4f} (n = {result['n']:,})"
        )
        notes += _mask_notes("test", result["masks"])
    return Table("", [headings[c] for c in used], [[line[c] for c in used] for line in lines], "\n".join(notes)).text()


def _line(name: str, result: Record, before: float | None, note: str | bool) -> list[str]:
    setting = result["learning_rate"] if result["regularisation"] is None else result["regularisation"]
    notes = [note] if isinstance(note, str) else []
    notes += [] if result["converged"] else [f"not converged in {classifier.MAX_ITERATIONS} iterations"]
    return [name, f"{result['accuracy']:.4f}", figure(before), f"{result['n']:,}", f"{setting:g}", ", ".join(notes)]


def _mask_notes(split: str, masks: Record | None) -> list[str]:
    if masks is None:
        return []
    spread = "" if masks["single_std"] is None else f" ± {masks['single_std']:.4f} (standard deviation)"
    return [
        f"{split}, modal prediction over {masks['count']} masks: {masks['accuracy']:.4f}; one mask: "
        f"{masks['single_mean']:.4f}{spread}; nothing hidden: {masks['unmasked']:.4f} (n = {masks['n']:,})"
    ]
