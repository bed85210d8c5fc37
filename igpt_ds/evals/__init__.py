"""What the paper does with a trained model: one module an evaluation, found by its name.

An evaluation module states

    NAME        of its verb; its record is RUN/NAME.json, with _ for -
    TITLE       of its section in the report
    HOLDS       what its record holds at least, key -> kind; see below
    OPTIONS     of its verb, beside RUN, --data, --step and --json

and has

    run(subject, **options) -> Record | None     what was found, as JSON holds it, on rank 0; every rank calls it
    table(record) -> Table
    figure(record) -> Figure                     where a picture tells more
    fault(record) -> str                         where HOLDS does not tell all that can be wrong; "": nothing is
    suffix(options) -> str                       where the record's file depends on options: what stands behind NAME

A kind is a type (an int is a count, from 0; a float any number), a pair of numbers between which a number lies, [kind]
of a list, [kind, None] of a list with gaps, {key: kind} of an object, {"*": kind} of one whose keys are free. A key
that ends with ? may be missing, or null. Only a record that fits is drawn.

The docstring of `run` is the verb's --help. To import such a module loads neither torch nor matplotlib, so that --help
answers at once and records are shown on any machine: what is heavy is imported in its functions.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import click

from igpt_ds.atomic import publish_text
from igpt_ds.distributed.ranks import Ranks, launched
from igpt_ds.errors import RunError, UserError
from igpt_ds.options import Number, Renamed
from igpt_ds.text import Table

if TYPE_CHECKING:
    from igpt_ds.config.schema import Config
    from igpt_ds.dataset.shards import Dataset
    from igpt_ds.features.splits import Splits
    from igpt_ds.weights.base import Weights
    from igpt_ds.weights.placed import Placement

Record = dict[str, Any]
SHARE = (0, 1)  # a kind: of accuracies

MASKS = click.Option(["--masks"], type=click.IntRange(1, 1000), help="BERT: independent masks an image.  [default: 5]")
STRENGTH = Number(1e-12, 1e12)  # of regularisation
DIVIDED = click.Option(["--ds"], metavar="NAME", help="Divide the network over the ranks: zero3, as pretrain.")


def val_or_test(text: str) -> click.Option:
    """--split, once --test."""
    choice = click.Choice(["val", "test"])
    return Renamed(["--split"], flags={"--test": "test"}, type=choice, default="val", show_default=True, help=text)


class Evaluation(Protocol):
    """What an evaluation module offers; see the description of this package."""

    NAME: str
    TITLE: str
    HOLDS: dict[str, Any]
    OPTIONS: Sequence[click.Parameter]

    def run(self, subject: "Subject", **options: Any) -> Record | None: ...

    def table(self, record: Record) -> Table: ...


@dataclass(frozen=True)
class Subject:
    """What is evaluated, as it was named.

    Attributes:
        path: of a run, a checkpoint, or weights of any format.
        folder: takes the record, and what is kept for other evaluations.
        data: folder of the splits; None: the run's first source.
        step: of a run's checkpoint; None: the newest.
        placement: of a network that is larger than the device, see `igpt_ds.weights.placed`.
    """

    path: Path
    folder: Path
    ranks: Ranks
    data: str | None = None
    step: int | None = None
    placement: "Placement | None" = None

    def placed(self, ds: str | None) -> "Placement | None":
        """The placement, where the network is not divided over the ranks."""
        if ds and self.placement:
            raise UserError(f"--ds {ds}: divides the network over the ranks: leave it out, or --device-map")
        return self.placement

    def labelled(self, test: bool, images: int | None = None) -> "tuple[Weights, Config, Splits]":
        """The weights and labelled splits; see `igpt_ds.features.splits.open_run`."""
        from igpt_ds.features.splits import open_run

        return open_run(self.path, self.step, self.data, test, images)


def header(kind: str, weights: "Weights", config: "Config", splits: "Splits", scored: "Dataset") -> Record:
    """What a record of classifiers says first: of what network, trained how far, on what data."""
    from igpt_ds.features.cache import fingerprint
    from igpt_ds.features.splits import chance

    return {
        "kind": kind,
        "model": config.name,
        "objective": config.objective.name,
        "step": weights.step,
        "checkpoint": fingerprint(config, weights),
        "data": str(splits.train.path.parent),
        "train_crop": splits.train_crop,
        "chance": chance(splits.train, scored),
    }


def baselines(record: Record) -> list[str]:
    """What a table of classifiers says below of what `header` has recorded beside them."""
    found = [] if record.get("chance") is None else [f"the commonest class alone: {record['chance']:.4f}"]
    cropped = record.get("train_crop") == "random"
    return found + ["training images: one random crop of each, not the paper's centre crop"] * cropped


def names() -> list[str]:
    """The modules that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def load(name: str) -> Evaluation:
    """The evaluation in the module of this name."""
    return cast(Evaluation, importlib.import_module(f"{__name__}.{name}"))


def of_verb(verb: str) -> Evaluation | None:
    """The evaluation of a verb; None: there is none."""
    return next((each for each in map(load, names()) if verb == each.NAME), None)


def stem(evaluation: Evaluation) -> str:
    """What the names of its records begin with."""
    return evaluation.NAME.replace("-", "_")


def evaluate(
    evaluation: Evaluation,
    path: Path,
    json_path: Path | None = None,
    data: str | None = None,
    step: int | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
    **options: Any,
) -> tuple[Record, list[Path]] | None:
    """Run an evaluation and publish its record, and its figure beside it; every rank of a launch calls this.

    Returns:
        The record and the files that were written; None on other ranks than 0.
    """
    from igpt_ds.weights.formats import results_folder
    from igpt_ds.weights.placed import parse_placement

    placement = parse_placement(device_map, max_memory)
    subject = Subject(path, results_folder(path, json_path), launched(), data, step, placement)
    record = evaluation.run(subject, **options)
    if record is None:
        return None
    suffix = getattr(evaluation, "suffix", lambda options: "")(options)
    of_step = "" if step is None else f"-{step}"
    out = json_path or subject.folder / f"{stem(evaluation)}{suffix}{of_step}.json"
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except ValueError:
        raise RunError(f"{path}: a figure of the {evaluation.NAME} is not finite: nothing was written") from None
    publish_text(out, text + "\n")
    written = [out]
    if hasattr(evaluation, "figure"):
        from igpt_ds.plots import save

        written.append(out.with_suffix(".png"))
        save(evaluation.figure(record), written[-1])
    return record, written
