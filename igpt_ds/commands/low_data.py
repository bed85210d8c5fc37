"""`igpt-ds low-data`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError


@click.command("low-data", context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--data", metavar="DIR", help="Folder with labelled train/ and val/; without it the run's first source.")
@click.option("--labels", metavar="N,N", default="4,25,400", show_default=True, help="Labels a class.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]")
@click.option("--layer", type=click.IntRange(min=0), help="Whose features.  [default: the best of RUN/probe.json]")
@click.option("--test", is_flag=True, help="Score on DIR/test instead of DIR/val.")
@click.option("--masks", type=click.IntRange(min=1), help="BERT: independent masks an image.  [default: 5]")
@click.option(
    "--regularisation", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Strength."
)
@click.option("--ds", "ds_source", metavar="NAME", help="Divide the network over the ranks: zero3, as pretrain.")
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Result.  [default: RUN/low_data.json]",
)
def low_data(
    run_path: Path,
    data: str | None,
    labels: str,
    step: int | None,
    layer: int | None,
    test: bool,
    masks: int | None,
    regularisation: float,
    ds_source: str | None,
    json_path: Path | None,
) -> None:
    """Few labels a class: a linear classifier of 5 random subsets, mean and standard deviation of its accuracy.

    \b
    As the paper does, on the best layer of a probe; writes RUN/low_data.json and prints the table:
        igpt-ds probe RUN --data cifar10
        igpt-ds low-data RUN --data cifar10 --labels 4,25,400 --test
    """
    import json

    from igpt_ds.atomic import publish_text
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.evals import low_data as evaluation
    from igpt_ds.evals.feature_cache import fingerprint
    from igpt_ds.evals.features import Network, Recipe
    from igpt_ds.evals.splits import masks_of, open_run
    from igpt_ds.weights.formats import results_folder

    counts = [text.strip() for text in labels.split(",")]
    if not all(text.isdecimal() and int(text) for text in counts):
        raise UserError(f"--labels {labels}: not of the form 4,25,400: write whole numbers, divided by commas")
    wanted = tuple(sorted({int(text) for text in counts}))
    folder, ranks = results_folder(run_path, json_path), launched()
    checkpoint, config, splits = open_run(run_path, step, data, test)
    evaluation.check(splits.train, wanted)
    identity = fingerprint(config, checkpoint)
    chosen = evaluation.best_layer(folder / "probe.json", identity) if layer is None else layer
    if chosen > config.model.layers:
        raise UserError(f"--layer {chosen}: the network has layers 0 to {config.model.layers}: choose among them")
    network = Network(config, checkpoint, Recipe((chosen,)), ranks, ds_source)
    scored_set = splits.test or splits.validation
    count = masks_of(config, masks)
    train, scored = evaluation.collect(network, splits.train, scored_set, count, folder / "features")
    if ranks.rank:
        return
    record = {
        "kind": "low_data",
        "model": config.name,
        "objective": config.objective.name,
        "step": checkpoint.step,
        "checkpoint": identity,
        "data": str(splits.train.path.parent),
        "split": scored_set.manifest.split,
        "layer": chosen,
        "regularisation": regularisation,
        "labels_per_class": evaluation.judge(train, scored, chosen, wanted, regularisation, config),
    }
    json_path = json_path or folder / "low_data.json"
    publish_text(json_path, json.dumps(record, indent=2) + "\n")
    click.echo(evaluation.table(record))
    click.echo(f"written: {json_path}")
