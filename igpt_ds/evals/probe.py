"""Linear probe of every layer (paper section 2.4, figure 2): how well a linear classifier reads the classes.

First all features are taken, by all ranks of a launch (`collect`); then rank 0 alone classifies them (`judge`). On the
validation split are chosen: each layer's regularisation (or rate, with SGD), and the best layer. Only with that fixed
is the validation split folded back into training and the test split looked at, once (section 3.4).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from tqdm import tqdm

from igpt_ds.config.schema import Config
from igpt_ds.errors import RunError, UserError
from igpt_ds.evals import DIVIDED, MASKS, SHARE, STRENGTH, Record, Subject, header, val_or_test
from igpt_ds.text import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from igpt_ds.features.cache import Features
    from igpt_ds.features.choice import Choice
    from igpt_ds.features.classifier import Rows
    from igpt_ds.features.extract import Network
    from igpt_ds.features.splits import Scored, Splits

NAME, TITLE = "probe", "Probe by depth"
_MASKS = {"count": int, "accuracy": SHARE, "n": int, "single_mean": SHARE, "single_std?": SHARE, "unmasked": SHARE}
_FOUND = {"accuracy": SHARE, "n?": int, "regularisation?": float, "learning_rate?": float, "converged?": bool}
_TESTED = {"accuracy": SHARE, "n": int, "layers?": [int], "train_images?": int, "masks?": _MASKS}
HOLDS = {
    "step": int,
    "layers": [{"layer": int, **_FOUND}],
    "validation_images": int,
    "best_layer?": int,
    "untrained?": [{"layer": int, "accuracy": SHARE}],
    "pixels?": SHARE,
    "pixels_regularisation?": float,
    "concatenation?": [{"layers": [int], **_FOUND, "test?": _TESTED}],
    "masks?": _MASKS,
    "test?": _TESTED,
    "train_images?": int,
    "solver?": str,
    "norm?": str,
    "data?": str,
}
STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01)  # of regularisation; see features/classifier.py for the objective
OPTIONS = (
    click.Option(["--layers"], metavar="LAYERS", help="Only these, e.g. 0,4-7; the last, L, is the final norm's."),
    click.Option(
        ["--concatenate"], type=click.IntRange(min=2), multiple=True, help="Also so many layers around the best."
    ),
    val_or_test("What is reported; test: besides DIR/test once, by a classifier of train/ and val/ together."),
    MASKS,
    click.Option(["--untrained"], is_flag=True, help="Also probe the same network before training."),
    click.Option(
        ["--images"], type=click.IntRange(min=2), help="Only so many of each split: its rows are in random order."
    ),
    click.Option(["--solver"], type=click.Choice(["lbfgs", "sgd"]), default="lbfgs", show_default=True),
    click.Option(
        ["--regularisation", "strengths"],
        type=STRENGTH,
        multiple=True,
        help="lbfgs: strength to try; may be given again.  [default: 1000, 100, ... 0.01]",
    ),
    click.Option(["--iterations"], type=click.IntRange(1, 10**9), help="sgd: batches.  [default: 1000000]"),
    click.Option(
        ["--norm"],
        type=click.Choice(["first", "none"]),
        default="first",
        show_default=True,
        help="Features after the block's first norm, as the paper's, or its raw input as others take it.",
    ),
    click.Option(["--precision"], type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
    click.Option(
        ["--batch"], type=click.IntRange(1, 1 << 16), help="Images in a forward pass.  [default: of 65536 tokens]"
    ),
    DIVIDED,
)
Layers = tuple[int, ...]


def run(
    subject: Subject,
    *,
    layers: str | None = None,
    concatenate: tuple[int, ...] = (),
    split: str = "val",
    masks: int | None = None,
    untrained: bool = False,
    images: int | None = None,
    solver: Literal["lbfgs", "sgd"] = "lbfgs",
    strengths: tuple[float, ...] = (),
    iterations: int | None = None,
    norm: Literal["first", "none"] = "first",
    precision: Literal["float32", "bfloat16"] = "float32",
    batch: int | None = None,
    ds: str | None = None,
) -> Record | None:
    """Linear probe of every layer: how well a linear classifier reads the classes from each depth.

    \b
    Writes a JSON file and, beside it, a plot of the same name; prints the table:
        igpt-ds probe RUN --data DATA --json probe.json
    The final figures of CIFAR-10, 5 layers around the best ones side by side as well:
        igpt-ds probe RUN --data cifar10 --concatenate 5 --split test
    ImageNet, features by 8 GPUs, then classifiers by SGD on the first:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data imagenet32 --solver sgd --layers 10-14
    A network too big for one GPU, divided over 8:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data DATA --ds zero3

    Features are kept in RUN/features (layers x width x images x 4 bytes), so that another probe of the same checkpoint
    and data does not compute them again; delete the folder at will.
    """
    from igpt_ds.features.extract import Network, Recipe, parse_layers
    from igpt_ds.features.splits import masks_of

    if (iterations and solver != "sgd") or (strengths and solver != "lbfgs"):
        raise UserError("--iterations belongs to --solver sgd, --regularisation to lbfgs: leave the other one out")
    weights, config, splits = subject.labelled(split == "test", images)
    recipe = Recipe(parse_layers(layers, config), norm, precision)
    for count in concatenate:
        if count > len(recipe.layers):
            raise UserError(f"--concatenate {count}: only {len(recipe.layers)} layers are probed: ask for fewer")
    settings = Settings(
        solver,
        tuple(sorted(strengths, reverse=True)) or STRENGTHS,
        iterations or Settings.iterations,
        concatenate,
        masks_of(config, masks),
        images,
    )
    trained = Network(config, weights, recipe, subject.ranks, ds, batch)
    before = Network(config, None, recipe, subject.ranks, ds, batch) if untrained else None
    collected = collect(trained, before, splits, settings, subject.folder / "features")
    if collected is None:
        return None
    return {
        **header("probe", weights, config, splits),
        "norm": norm,
        "precision": precision,
        "solver": solver,
        **judge(collected, splits, config, settings),
    }


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

    train: "Features"
    validation: "Scored"
    test: "Scored | None" = None
    untrained: "tuple[Features, Features] | None" = None  # of train/ and val/


def collect(
    trained: "Network", untrained: "Network | None", splits: "Splits", settings: Settings, folder: Path
) -> Collected | None:
    """All features that `judge` needs, on rank 0; None on the others, whose work is done then.

    Args:
        folder: of the cached features.

    Raises:
        RunError: a feature is not finite.
    """
    from igpt_ds.features.splits import take, take_scored

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


def judge(collected: Collected, splits: "Splits", config: Config, settings: Settings) -> Record:
    """Classify all that was collected; the result as JSON.

    Accuracies are on the validation split, but under the keys "test".

    Raises:
        RunError: SGD diverged at every rate.
    """
    from igpt_ds.features.classifier import Rows
    from igpt_ds.features.extract import pixels
    from igpt_ds.features.splits import ensemble

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

    def choose(self, train: "Rows", validation: "Rows", title: str) -> "Choice":
        from igpt_ds.features.choice import choose

        settings = self.settings
        strengths = settings.strengths if settings.solver == "lbfgs" else ()
        return choose(train, validation, self.classes, strengths, settings.iterations, self.config.seed, title)

    def each_layer(self, train: "Features", validation: "Features", name: str) -> "dict[int, Choice]":
        from igpt_ds.features.splits import rows

        bar = tqdm(train.numbers, desc=f"probes of {name}", unit=" layers", leave=False, disable=None)
        return {k: self.choose(rows(train, (k,)), rows(validation, (k,)), f"{name}, layer {k}") for k in bar}

    def side_by_side(self, layers: Layers) -> Record:
        from igpt_ds.features.splits import rows

        train = rows(self.collected.train, layers)
        choice = self.choose(train, rows(self.collected.validation.features, layers), f"layers {list(layers)}")
        test = self.tested(layers, choice)
        return {"layers": list(layers), "features": train.width, **self.result(choice), "test": test}

    def result(self, choice: "Choice") -> Record:
        sgd = self.settings.solver == "sgd"
        return {
            "accuracy": choice.accuracy,
            "n": len(self.collected.validation.features.labels),
            "regularisation": None if sgd else choice.setting,
            "learning_rate": choice.setting if sgd else None,
            "converged": choice.classifier.converged,
        }

    def tested(self, layers: Layers, choice: "Choice") -> Record | None:
        """The test split once, by a classifier of train and validation images with what was chosen."""
        from igpt_ds.features import classifier, classifier_sgd
        from igpt_ds.features.splits import ensemble, rows

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


def table(record: Record) -> Table:
    """Every layer, the pixels and the layers side by side; what they rest on below."""
    before = {result["layer"]: result["accuracy"] for result in record.get("untrained") or ()}
    n, several = record["validation_images"], record.get("concatenation") or []
    lines = [
        _line(str(k := result["layer"]), result, n, before.get(k), "best" if k == record.get("best_layer") else "")
        for result in record["layers"]
    ]
    if (pixels := record.get("pixels")) is not None:
        lines.append(_line("pixels", {"accuracy": pixels, "regularisation": record.get("pixels_regularisation")}, n))
    for result in several:
        lines.append(_line(_span(result["layers"]), result, n, None, "side by side"))
    setting = "rate" if record.get("solver") == "sgd" else "regularisation"
    headings = ["layer", "accuracy", "untrained", "n", setting, ""]
    notes = [f"trained on {_count(record, 'train_images')} images; accuracy on n of the validation split"]
    notes += _mask_notes("validation", record.get("masks"))
    for result in filter(None, [record.get("test"), *(each.get("test") for each in several)]):
        name = "layer" if len(layers := result.get("layers") or []) == 1 else "layers"
        notes.append(
            f"test, {name} {_span(layers)}, trained on {_count(result, 'train_images')} images (validation folded in): "
            f"{result['accuracy']:.4f} (n = {result['n']:,})"
        )
        notes += _mask_notes("test", result.get("masks"))
    return Table("", headings, lines, "\n".join(notes)).without_empty_columns()


def _line(name: str, result: Record, n: int, before: float | None = None, note: str = "") -> list[str]:
    setting = result.get("regularisation")
    setting = result.get("learning_rate") if setting is None else setting
    notes = ", ".join(filter(None, [note, "" if result.get("converged", True) else "not converged in 1000 iterations"]))
    shown = "" if setting is None else f"{setting:g}"
    return [name, f"{result['accuracy']:.4f}", number(before), f"{result.get('n') or n:,}", shown, notes]


def _span(layers: list[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((layers[0], layers[-1])))) if layers else "unknown"


def _count(record: Record, key: str) -> str:
    return "an unknown number of" if record.get(key) is None else f"{record[key]:,}"


def _mask_notes(split: str, masks: Record | None) -> list[str]:
    if masks is None:
        return []
    spread = "" if masks.get("single_std") is None else f" ± {masks['single_std']:.4f} (standard deviation)"
    return [
        f"{split}, modal prediction over {masks['count']} masks: {masks['accuracy']:.4f}; one mask: "
        f"{masks['single_mean']:.4f}{spread}; nothing hidden: {masks['unmasked']:.4f} (n = {masks['n']:,})"
    ]


def figure(record: Record) -> "Figure":
    """Accuracy of the linear probe by layer (figure 2 of the paper) of one network."""
    from igpt_ds.plots import by_layer, new

    drawn = new()
    axes = drawn.subplots()
    by_layer(axes, record["layers"], "o-", "C0", f"after {record['step']:,} steps")
    if record.get("untrained"):
        by_layer(axes, record["untrained"], "s--", "C7", "the same network, untrained")
    if record.get("pixels") is not None:
        axes.axhline(100 * record["pixels"], color="C1", linestyle=":", label="raw pixels")
    axes.set_ylabel(f"accuracy on {record['validation_images']:,} held-out images, %")
    axes.set_title("Linear probe by depth")
    axes.legend()
    return drawn


def fault(record: Record) -> str:
    """No layer at all."""
    return "" if record["layers"] else "no layer was probed"
