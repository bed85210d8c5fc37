"""`igpt-ds probe`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--data", metavar="DIR", help="Folder with labelled train/ and val/; without it the run's first source.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]")
@click.option("--layers", metavar="LAYERS", help="Only these, e.g. 0,4-7; the last, L, is the final norm's.")
@click.option("--concatenate", type=click.IntRange(min=2), multiple=True, help="Also so many layers around the best.")
@click.option("--test", is_flag=True, help="Report DIR/test once, by a classifier of train/ and val/ together.")
@click.option("--masks", type=click.IntRange(min=1), help="BERT: independent masks an image.  [default: 5]")
@click.option("--untrained", is_flag=True, help="Also probe the same network before training.")
@click.option("--images", type=click.IntRange(min=2), help="Only so many of each split: its rows are in random order.")
@click.option("--solver", type=click.Choice(["lbfgs", "sgd"]), default="lbfgs", show_default=True)
@click.option(
    "--regularisation",
    "strengths",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="lbfgs: strength to try; may be given again.  [default: 1000, 100, ... 0.01]",
)
@click.option("--iterations", type=click.IntRange(min=1), help="sgd: batches.  [default: 1000000]")
@click.option(
    "--norm",
    type=click.Choice(["first", "none"]),
    default="first",
    show_default=True,
    help="Features after the block's first norm, as the paper's, or its raw input as others take it.",
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), help="Images in a forward pass.  [default: of 65536 tokens]")
@click.option("--ds", "ds_source", metavar="NAME", help="Divide the network over the ranks: zero3, as pretrain.")
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Result.  [default: RUN/probe.json; RUN/probe-STEP.json with --step]",
)
def probe(
    run_path: Path,
    data: str | None,
    step: int | None,
    layers: str | None,
    concatenate: tuple[int, ...],
    test: bool,
    masks: int | None,
    untrained: bool,
    images: int | None,
    solver: str,
    strengths: tuple[float, ...],
    iterations: int | None,
    norm: str,
    precision: str,
    batch: int | None,
    ds_source: str | None,
    json_path: Path | None,
) -> None:
    """Linear probe of every layer: how well a linear classifier reads the classes from each depth.

    \b
    Writes a JSON file and, beside it, a plot of the same name; prints the table:
        igpt-ds probe RUN --data DATA --json probe.json
    The final figures of CIFAR-10, 5 layers around the best ones side by side as well:
        igpt-ds probe RUN --data cifar10 --concatenate 5 --test
    ImageNet, features by 8 GPUs, then classifiers by SGD on the first:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data imagenet32 --solver sgd --layers 10-14
    A network too big for one GPU, divided over 8:
        torchrun --nproc-per-node 8 -m igpt_ds -- probe RUN --data DATA --ds zero3

    Features are kept in RUN/features (layers x width x images x 4 bytes), so that another probe of the same checkpoint
    and data does not compute them again; delete the folder at will.
    """
    import json

    from igpt_ds.atomic import publish_text
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.evals import probe as probes
    from igpt_ds.evals.feature_cache import fingerprint
    from igpt_ds.evals.features import Network, Recipe, parse_layers
    from igpt_ds.evals.splits import masks_of, open_run
    from igpt_ds.results import figures
    from igpt_ds.weights.formats import results_folder

    if (iterations and solver != "sgd") or (strengths and solver != "lbfgs"):
        raise UserError("--iterations belongs to --solver sgd, --regularisation to lbfgs: leave the other one out")
    folder, ranks = results_folder(run_path, json_path), launched()
    checkpoint, config, splits = open_run(run_path, step, data, test, images)
    recipe = Recipe(parse_layers(layers, config), norm, precision)  # type: ignore[arg-type]
    for count in concatenate:
        if count > len(recipe.layers):
            raise UserError(f"--concatenate {count}: only {len(recipe.layers)} layers are probed: ask for fewer")
    settings = probes.Settings(
        solver,  # type: ignore[arg-type]
        tuple(sorted(strengths, reverse=True)) or probes.STRENGTHS,
        iterations or probes.Settings.iterations,
        concatenate,
        masks_of(config, masks),
        images,
    )
    trained = Network(config, checkpoint, recipe, ranks, ds_source, batch)
    before = Network(config, None, recipe, ranks, ds_source, batch) if untrained else None
    collected = probes.collect(trained, before, splits, settings, folder / "features")
    if collected is None:
        return
    record = {
        "kind": "probe",
        "model": config.name,
        "objective": config.objective.name,
        "step": checkpoint.step,
        "checkpoint": fingerprint(config, checkpoint),
        "data": str(splits.train.path.parent),
        "norm": norm,
        "precision": precision,
        "solver": solver,
        **probes.judge(collected, splits, config, settings),
    }
    json_path = json_path or folder / ("probe.json" if step is None else f"probe-{step}.json")
    publish_text(json_path, json.dumps(record, indent=2) + "\n")
    plot_path = json_path.with_suffix(".png")
    figures.probe_by_depth(record, plot_path)
    click.echo(probes.table(record))
    click.echo(f"written: {json_path}, {plot_path}")
