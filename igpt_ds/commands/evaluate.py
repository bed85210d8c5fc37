"""`igpt-ds eval`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT


@click.command("eval", context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN|PATH", type=click.Path(path_type=Path))
@click.option("--data", metavar="DIR", help="Folder with the split; without it the run's first source.")
@click.option("--split", type=click.Choice(["val", "test", "train"]), default="val", show_default=True)
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]")
@click.option("--masks", type=click.IntRange(min=1), help="BERT: independent masks an image.  [default: 5]")
@click.option("--mask-seed", type=click.IntRange(0, 2**64 - 1), help="BERT: seed of the masks.  [default: the run's]")
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Result.  [default: RUN/eval.json; RUN/eval-SPLIT.json of another split than val]",
)
def evaluate(
    run_path: Path,
    data: str | None,
    split: str,
    step: int | None,
    masks: int | None,
    mask_seed: int | None,
    json_path: Path | None,
) -> None:
    """Likelihood of held-out images in nats and bits a token, by class and by position.

    \b
    Writes a JSON file and, beside it, a heat map of the same name; prints the table:
        igpt-ds eval RUN --data DATA --split val --json eval.json
    Shared among 8 GPUs, each with the whole network in float32:
        torchrun --nproc-per-node 8 -m igpt_ds -- eval RUN --data DATA
    """
    import json

    from igpt_ds.atomic import publish_text
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.errors import UserError
    from igpt_ds.evals import likelihood
    from igpt_ds.evals.features import load_model
    from igpt_ds.loading.splits import open_split
    from igpt_ds.results import figures
    from igpt_ds.results.tables import likelihood_table
    from igpt_ds.run.directory import LOGGER
    from igpt_ds.weights.base import at_resolution, config_of
    from igpt_ds.weights.formats import open_weights, results_folder

    ranks, checkpoint = launched(), open_weights(run_path, step)
    folder = results_folder(run_path, json_path)
    config = config_of(checkpoint)
    if config.causal and (masks is not None or mask_seed is not None):
        raise UserError(f"--masks, --mask-seed: {run_path} is no BERT model, nothing is hidden from it: leave them out")
    if not data and not config.data.sources:
        raise UserError(f"{run_path}: its checkpoint names no data: give --data")
    dataset = open_split(data or config.data.sources[0], split)
    checkpoint = at_resolution(checkpoint, dataset.manifest.resolution, LOGGER.warning)
    config = config_of(checkpoint)
    likelihood.check(checkpoint, config, dataset)
    if not config.causal:
        masks, mask_seed = masks or likelihood.MASKS, config.seed if mask_seed is None else mask_seed
    with ranks.meeting():
        found = likelihood.likelihood(
            load_model(config, checkpoint), config, dataset, ranks, masks or 1, mask_seed or 0
        )
    if ranks.rank == 0:
        result = likelihood.record(found, checkpoint, config, dataset, masks, mask_seed)
        json_path = json_path or folder / ("eval.json" if split == "val" else f"eval-{split}.json")
        publish_text(json_path, json.dumps(result, indent=2) + "\n")
        plot_path = json_path.with_suffix(".png")
        figures.save(figures.likelihood_map(result), plot_path)
        click.echo(likelihood_table(result).text())
        click.echo(f"written: {json_path}, {plot_path}")
