"""`igpt-ds probe`."""

from pathlib import Path

import click

from igpt_ds.commands import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data", metavar="DIR", help="Folder with labelled train/ and val/; without it the run's first source.")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help="Result [RUN/probe.json].")
@click.option("--images", type=click.IntRange(min=2), help="Only so many of each split: its rows are in random order.")
@click.option("--untrained", is_flag=True, help="Also probe the same network before training.")
def probe(run_path: Path, data: str | None, json_path: Path | None, images: int | None, untrained: bool) -> None:
    """Linear probe of every layer: how well a linear classifier reads the classes from each depth.

    \b
    Writes a JSON file and, beside it, a plot of the same name; prints the table:
        igpt-ds probe RUN --data DATA --json probe.json

    All features are held in memory (layers x width x images x 4 bytes), and the classifier sees all of them at once:
    meant for data sets of the size of CIFAR. Of a larger one, take a part with --images.
    """
    import json

    from igpt_ds import figures
    from igpt_ds.atomic import publish_text
    from igpt_ds.evals.probe import probe as run_probe
    from igpt_ds.evals.probe import table
    from igpt_ds.run import Run, checkpoint_config
    from igpt_ds.sources import open_split, resolve_data

    run = Run(run_path)
    checkpoint = run.newest_checkpoint()
    config = checkpoint_config(checkpoint)
    folder = data or config.data.sources[0]
    splits = [open_split(folder, "train"), open_split(folder, "val")]
    resolve_data(config, splits)
    result = run_probe(checkpoint, config, *splits, images=images, untrained=untrained)
    record = result.to_json()
    json_path = json_path or run.path / "probe.json"
    publish_text(json_path, json.dumps(record, indent=2) + "\n")
    plot_path = json_path.with_suffix(".png")
    figures.probe_by_depth(record, plot_path)
    click.echo(table(result))
    click.echo(f"written: {json_path}, {plot_path}")
