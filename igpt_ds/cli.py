"""The verbs of igpt-ds. Imports are lazy, so that --help is quick; only this file ends the process."""

import os
import signal
import sys
import time
from pathlib import Path

import click

from igpt_ds import __version__
from igpt_ds.commands.checkpoints import checkpoints
from igpt_ds.commands.doctor import doctor
from igpt_ds.errors import RunError, UserError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__)
@click.option("--local_rank", hidden=True, type=int, help="Given by the deepspeed launcher; LOCAL_RANK says the same.")
def cli(local_rank: int | None) -> None:
    """Image GPT: pre-train, probe and sample.

    \b
    A first run on a laptop:
        igpt-data palette IMAGES --k 512 --out palette.npy
        igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 --holdout 0.04 --out DATA
        igpt-ds pretrain --preset tiny --data DATA --run RUN
        igpt-ds probe RUN --data DATA
        igpt-ds sample RUN --n 16 --out samples.png
    """


@cli.command(context_settings=CONTEXT)
@click.option("--preset", metavar="NAME", help="tiny, demo, s, m, l, l48, xl, s-bert, ... or a file.toml.")
@click.option("--data", metavar="DIR", multiple=True, help="Folder with train/ and val/; give several to mix them.")
@click.option("--run", "run_path", metavar="RUN", type=click.Path(path_type=Path), help="Run directory.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset.")
@click.option(
    "--ds",
    "ds_source",
    default="zero3",
    show_default=True,
    metavar="NAME",
    help="ds_configs/NAME.json or a file.json.",
)
@click.option("--fresh", is_flag=True, help="Start anew instead of going on from the newest checkpoint.")
@click.option("--force", is_flag=True, help="With --fresh: delete the run that is there.")
@click.option("--wandb", "wandb_project", metavar="PROJECT", help="Also log to Weights & Biases.")
@click.option("--print-config", is_flag=True, help="Print the configuration as TOML and end.")
@click.option("--dry-run", is_flag=True, help="Check everything, print sizes and memory, and end.")
@click.option("--ranks", type=click.IntRange(min=1), help="With --dry-run: the number of GPUs to plan for.")
def pretrain(
    preset: str | None,
    data: tuple[str, ...],
    run_path: Path | None,
    overrides: tuple[str, ...],
    ds_source: str,
    fresh: bool,
    force: bool,
    wandb_project: str | None,
    print_config: bool,
    dry_run: bool,
    ranks: int | None,
) -> None:
    """Pre-train a model; a run that holds a checkpoint goes on by itself.

    \b
    On one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds pretrain --preset l --data DATA --run RUN
    On a CPU, in one process, 20 steps:
        igpt-ds pretrain --preset tiny --data DATA --run RUN --set training.steps=20 --set seed=1
    What a GPU would have to hold, without one:
        igpt-ds pretrain --preset l --data DATA --dry-run --ranks 8
    Go on with a run, its --preset, --data and --set taken from RUN/config.toml:
        igpt-ds pretrain --run RUN
    """
    from igpt_ds import job as jobs
    from igpt_ds.config import to_toml
    from igpt_ds.place import place
    from igpt_ds.run import Run

    run = Run(run_path) if run_path else None
    config = jobs.choose_config(preset, run, data, overrides)
    if print_config:
        click.echo(to_toml(config), nl=False)
        return
    if run is None and not dry_run:
        raise UserError("pretrain: no --run: name the directory that the run is to write")
    where = place()
    job = jobs.prepare(config, ds_source, ranks if dry_run and ranks else where.world)
    if run is None or dry_run:
        click.echo(jobs.summary(job))
        return
    from igpt_ds.train import pretrain as run_pretrain

    run_pretrain(job, run, where, fresh, force, wandb_project)


@cli.command(context_settings=CONTEXT)
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


@cli.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--n", "count", default=16, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--temperature", default=1.0, show_default=True, help="Divides the logits; 0 takes the likeliest token.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0, max=2**31 - 1))
@click.option("--complete", metavar="DIR", help="Complete the upper half of the first images of this data's val/.")
def sample(run_path: Path, count: int, out: Path, temperature: float, seed: int, complete: str | None) -> None:
    """Draw images, or complete given ones.

    \b
    A grid of 16:
        igpt-ds sample RUN --n 16 --out samples.png
    Four completions each of 8 validation images, beside what was given and the original:
        igpt-ds sample RUN --n 8 --complete DATA --out completions.png
    """
    from igpt_ds.evals import samples
    from igpt_ds.evals.features import load_model
    from igpt_ds.palette import Palette
    from igpt_ds.run import Run, checkpoint_config
    from igpt_ds.sources import open_split

    run = Run(run_path)
    checkpoint = run.newest_checkpoint()
    dataset = open_split(complete, "val") if complete else None
    palette = Palette.load(run.palette)
    if palette.sha256 != checkpoint.identity["palette_sha256"]:
        raise UserError(f"{run.palette}: not the palette of {checkpoint.path}: restore it from the training data")
    model = load_model(checkpoint_config(checkpoint), checkpoint)
    if dataset is None:
        sheet = samples.free_samples(model, palette, count, seed, temperature)
    else:
        sheet = samples.completions(model, dataset, palette, count, seed, temperature)
    samples.save_png(sheet, out)
    click.echo(f"written: {out} (step {checkpoint.step})")


def main() -> None:
    """Run a verb. Exit status: 0 done, 2 bad input (one line says what to do), 1 a fault of the run."""
    try:
        cli(prog_name="igpt-ds", standalone_mode=False)
    except UserError as error:
        _tell(str(error))
        sys.exit(2)
    except RunError as error:
        _tell(str(error))
        sys.exit(1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "igpt-ds"
        message = " ".join(error.format_message().split()).rstrip(".")
        _tell(f"{error.ctx.info_name if error.ctx else 'usage'}: {message}: see {where} --help")
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except Exception:
        _let_others_speak()
        raise


def _tell(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        _let_others_speak()
        message = f"[rank {rank}] {message}"
    print(f"igpt-ds: {message}", file=sys.stderr, flush=True)


def _let_others_speak() -> None:
    """Where there are other ranks, give the launcher the time to end this one.

    One fault mostly strikes all ranks, and rank 0 tells it; or it struck another rank, which has told it, and what is
    seen here is a lost connection.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)


cli.add_command(checkpoints)
cli.add_command(doctor)
