"""Linear probe of every layer (paper section 2.4, figure 2): how well a linear classifier reads the classes.

`igpt_ds.features.probing` does it; here are its options, its record and what is shown of it.
"""

from typing import TYPE_CHECKING, Literal

import click

from igpt_ds.errors import UserError
from igpt_ds.evals import DIVIDED, MASKS, SHARE, STRENGTH, Record, Subject, baselines, header, val_or_test
from igpt_ds.text import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    "precision?": str,
    "store?": str,
    "train_crop?": str,
    "chance?": SHARE,
    "data?": str,
}
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
    click.Option(["--sgd-batch"], type=click.IntRange(1, 1 << 20), help="sgd: images of a batch.  [default: 128]"),
    click.Option(
        ["--norm"],
        type=click.Choice(["first", "none"]),
        default="first",
        show_default=True,
        help="Features after the block's first norm, as the paper's, or its raw input as others take it.",
    ),
    click.Option(
        ["--precision"],
        type=click.Choice(["float32", "bfloat16"]),
        help="Of the network.  [default: bfloat16 on a GPU, else float32]",
    ),
    click.Option(
        ["--store"],
        type=click.Choice(["float32", "float16"]),
        default="float32",
        show_default=True,
        help="How features are kept; float16 takes half of the space.",
    ),
    click.Option(
        ["--batch"], type=click.IntRange(1, 1 << 16), help="Images in a forward pass.  [default: of 65536 tokens]"
    ),
    DIVIDED,
)


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
    sgd_batch: int | None = None,
    norm: Literal["first", "none"] = "first",
    precision: Literal["float32", "bfloat16"] | None = None,
    store: Literal["float32", "float16"] = "float32",
    batch: int | None = None,
    ds: str | None = None,
) -> Record | None:
    """Linear probe of every layer: how well a linear classifier reads the classes from each depth.

    \b
    Writes a JSON file and, beside it, a plot of the same name; prints the table:
        igpt-ds probe RUN --data DATA --json probe.json
    The final figures of CIFAR-10, 5 layers around the best ones side by side as well:
        igpt-ds probe RUN --data cifar10 --concatenate 5 --split test
    ImageNet: features and then classifiers by SGD, of all layers and rates at once, on 8 GPUs:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data imagenet32 --solver sgd --store float16
    A network too big for one GPU, divided over 8:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data DATA --ds zero3

    Features are kept in RUN/features (layers x width x images x 4 bytes, or 2: all layers of iGPT-L on ImageNet are
    370 or 185 GB), so that another probe of the same checkpoint and data does not compute them again; delete the folder
    at will.
    """
    from igpt_ds.features.extract import Network, Recipe, parse_layers, usual_precision
    from igpt_ds.features.probing import Probe, Settings
    from igpt_ds.features.splits import masks_of

    if ((iterations or sgd_batch) and solver != "sgd") or (strengths and solver != "lbfgs"):
        raise UserError(
            "--iterations and --sgd-batch belong to --solver sgd, --regularisation to lbfgs: leave the other ones out"
        )
    weights, config, splits = subject.labelled(split == "test", images)
    recipe = Recipe(parse_layers(layers, config), norm, precision or usual_precision(), store)
    for count in concatenate:
        if count > len(recipe.layers):
            raise UserError(f"--concatenate {count}: only {len(recipe.layers)} layers are probed: ask for fewer")
    settings = Settings(
        solver,
        tuple(sorted(strengths, reverse=True)) or Settings.strengths,
        iterations or Settings.iterations,
        concatenate,
        masks_of(config, masks),
        images,
        sgd_batch or Settings.batch,
    )
    ranks = subject.ranks
    probe = Probe(splits, config, settings, ranks)
    trained = Network(config, weights, recipe, ranks, ds, batch, subject.placed(ds))
    before = Network(config, None, recipe, ranks, ds, batch) if untrained else None
    chosen = None
    with ranks.meeting():
        found = probe.collect(trained, before, subject.folder / "features")
        if solver == "sgd":
            ranks.wait_patiently()  # some have more heads to train than others, which takes hours
            chosen = probe.choose(found)
    if ranks.rank:
        return None
    chosen = chosen or probe.choose(found)
    return {
        **header("probe", weights, config, splits, splits.validation),
        "norm": norm,
        "precision": recipe.precision,
        "store": store,
        "solver": solver,
        "batch": settings.batch if solver == "sgd" else None,
        "iterations": settings.iterations if solver == "sgd" else None,
        **probe.judge(found, chosen),
    }


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
    notes += baselines(record) + _mask_notes("validation", record.get("masks"))
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
