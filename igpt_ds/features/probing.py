"""The linear probe: features of all layers, classifiers chosen on validation images, the test split once (section 3.4).

First all features are taken, by all ranks of a launch (`Probe.collect`). On the validation split are then chosen each
layer's regularisation, by rank 0 alone, or its rate, by SGD on all ranks; and the best layer (`choose`). Only with that
fixed does rank 0 fold the validation split back into training and look at the test split, once (`judge`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.features import classifier
from igpt_ds.features.cache import Features
from igpt_ds.features.choice import Choice, Sgd, choose
from igpt_ds.features.classifier import Rows
from igpt_ds.features.classifier_sgd import BATCH
from igpt_ds.features.extract import Network, pixels
from igpt_ds.features.splits import Scored, Splits, ensemble, rows, take, take_scored

Layers = tuple[int, ...]
STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01)  # of regularisation; see classifier.py for the objective


@dataclass(frozen=True)
class Settings:
    """What is probed and how.

    Attributes:
        strengths: of regularisation, tried with L-BFGS in descending order.
        iterations: batches of a classifier by SGD; the paper's are a million.
        concatenate: also so many layers side by side, centred on the best (paper section 4.4 has 5).
        masks: of a BERT model, 0 of an auto-regressive one.
        images: so many of each split, from its beginning; None for all.
        batch: of SGD.
    """

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    strengths: tuple[float, ...] = STRENGTHS
    iterations: int = 1_000_000
    concatenate: tuple[int, ...] = ()
    masks: int = 0
    images: int | None = None
    batch: int = BATCH


@dataclass(frozen=True)
class Collected:
    """All features of a probe."""

    train: Features
    validation: Scored
    test: Scored | None = None
    untrained: tuple[Features, Features] | None = None  # of train/ and val/


@dataclass(frozen=True)
class Chosen:
    """What the validation split prefers: of each layer, of each of the untrained network's, of groups side by side."""

    layers: dict[int, Choice]
    untrained: dict[int, Choice]
    pixels: Choice | None
    several: list[tuple[Layers, Choice]]

    @property
    def best(self) -> int:
        """The layer whose accuracy is the highest, the first of equals."""
        return max(self.layers, key=lambda layer: self.layers[layer].accuracy)


@dataclass(frozen=True)
class Probe:
    """A probe of labelled splits.

    Attributes:
        ranks: that share the work, and have met for it.
    """

    splits: Splits
    config: Config
    settings: Settings
    ranks: Ranks = field(default_factory=Ranks)

    def collect(self, trained: Network, untrained: Network | None, folder: Path) -> Collected:
        """All features that are needed; a collective.

        Args:
            folder: of the cached features.

        Raises:
            RunError: a feature is not finite.
        """
        splits, images, before, test = self.splits, self.settings.images, None, None
        train = take(trained, splits.train, folder, images)
        validation = take_scored(trained, splits.validation, folder, images, self.settings.masks)
        if splits.test:
            test = take_scored(trained, splits.test, folder, images, self.settings.masks)
        trained.close()
        if untrained:
            before = take(untrained, splits.train, folder, images), take(untrained, splits.validation, folder, images)
            untrained.close()
        return Collected(train, validation, test, before)

    def choose(self, found: Collected) -> Chosen:
        """What the validation split prefers; by SGD a collective, by L-BFGS the work of one rank.

        Raises:
            RunError: SGD diverged at every rate.
        """
        train, shown = found.train, found.validation.features
        trained = self._each_layer(train, shown, "probes of trained")
        before = self._each_layer(*found.untrained, "probes of untrained") if found.untrained else {}
        colours = None
        if self.settings.solver == "lbfgs":  # of ImageNet they would not fit in memory
            given, held_out = (
                Rows([(pixels(split, len(features.labels)),)], features.labels)
                for split, features in ((self.splits.train, train), (self.splits.validation, shown))
            )
            colours = choose(given, held_out, self.settings.strengths)
        chosen = Chosen(trained, before, colours, [])
        for count in self.settings.concatenate:
            group = centred(train.numbers, chosen.best, count)
            chosen.several.append((group, self._each(train, shown, [group], f"layers {list(group)}")[0]))
        return chosen

    def judge(self, found: Collected, chosen: Chosen) -> dict[str, Any]:
        """What was chosen, and the test split once, by rank 0; the result as JSON.

        Accuracies are on the validation split, but under the keys "test".

        Raises:
            RunError: SGD diverged with the validation images folded in.
        """
        best, shown, width = chosen.best, found.validation.features, found.train.layers.shape[2]
        voting = chosen.layers[best].classifier
        assert voting is not None, "the best one is always there"

        def result(choice: Choice) -> dict[str, Any]:
            sgd = self.settings.solver == "sgd"
            return {
                "accuracy": choice.accuracy,
                "n": len(shown.labels),
                "regularisation": None if sgd else choice.setting,
                "learning_rate": choice.setting if sgd else None,
                "converged": choice.converged,
            }

        return {
            "layers": [{"layer": layer, **result(choice)} for layer, choice in chosen.layers.items()],
            "best_layer": best,
            "best_accuracy": chosen.layers[best].accuracy,
            "untrained": [{"layer": layer, **result(choice)} for layer, choice in chosen.untrained.items()],
            "pixels": chosen.pixels and chosen.pixels.accuracy,
            "pixels_regularisation": chosen.pixels and chosen.pixels.setting,
            "concatenation": [
                {
                    "layers": list(group),
                    "features": len(group) * width,
                    **result(choice),
                    "test": self._tested(found, group, choice),
                }
                for group, choice in chosen.several
            ],
            "masks": ensemble(voting, found.validation, (best,), self.config),
            "test": self._tested(found, (best,), chosen.layers[best]),
            "train_images": len(found.train.labels),
            "validation_images": len(shown.labels),
            "classes": self._sgd.classes,
        }

    def _each_layer(self, train: Features, validation: Features, title: str) -> dict[int, Choice]:
        chosen = self._each(train, validation, [(layer,) for layer in train.numbers], title)
        return dict(zip(train.numbers, chosen, strict=True))

    def _each(self, train: Features, validation: Features, groups: Sequence[Layers], title: str) -> list[Choice]:
        """What is chosen for each group of layers side by side."""
        trains, validations = ([rows(features, group) for group in groups] for features in (train, validation))
        if self.settings.solver == "sgd":
            return self._sgd.choose(trains, validations, title)
        pairs = zip(trains, validations, strict=True)
        bar = tqdm(pairs, desc=title, total=len(trains), unit=" layers", leave=False, disable=None)
        return [choose(*pair, self.settings.strengths) for pair in bar]

    def _tested(self, found: Collected, layers: Layers, choice: Choice) -> dict[str, Any] | None:
        """The test split once, by a classifier of train and validation images with what was chosen."""
        test = found.test
        if test is None:
            return None
        folded = rows(found.train, layers) + rows(found.validation.features, layers)
        if self.settings.solver == "sgd":
            final = self._sgd.fit(folded, choice.setting, "with validation images")
        else:
            final = next(classifier.fit(folded, (choice.setting,)))
        if final is None:
            raise RunError("SGD: it diverged with the validation images folded in: take --solver lbfgs")
        return {
            "accuracy": final.accuracy(rows(test.features, layers)),
            "n": len(test.features.labels),
            "layers": list(layers),
            "train_images": len(folded),
            "converged": final.converged,
            "masks": ensemble(final, test, layers, self.config),
        }

    @property
    def _sgd(self) -> Sgd:
        classes = len(self.splits.train.manifest.classes or ())
        return Sgd(classes, self.settings.iterations, self.settings.batch, self.config.seed, self.ranks)


def centred(layers: Layers, best: int, count: int) -> Layers:
    """So many neighbours in `layers` with the best in their middle, or as near to it as the ends allow."""
    first = layers.index(best) - (count - 1) // 2
    first = min(max(first, 0), len(layers) - count)
    return layers[first : first + count]
