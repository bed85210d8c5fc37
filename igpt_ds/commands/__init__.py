"""Commands of igpt-ds that have a file of their own. Heavy imports stay inside them, so that --help answers at once."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from igpt_ds.run.directory import Run

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def shown(status: str) -> str:
    """A status in the colour that a terminal's user expects; click leaves the colour out elsewhere."""
    return click.style(status, fg={"OK": "green", "WARN": "yellow", "FAIL": "red"}.get(status))


# Of every training, whatever it trains: pretrain and finetune.
_TRAINING_OPTIONS = (
    click.argument("run_path", metavar="RUN", required=False, type=click.Path(path_type=Path)),
    click.option("--run", "run_option", hidden=True, type=click.Path(path_type=Path)),
    click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset."),
    click.option(
        "--ds", metavar="NAME", help="ds_configs/NAME.json or a file.json.  [default: the run's; of a new one zero3]"
    ),
    click.option("--fresh", is_flag=True, help="Start anew instead of going on from the newest checkpoint."),
    click.option("--force", is_flag=True, help="With --fresh: delete the run that is there."),
    click.option(
        "--allow-change", metavar="FACT", multiple=True, help="Go on though it differs: batch, data_order, ..."
    ),
    click.option("--wandb", "wandb_project", metavar="PROJECT", help="Also log to Weights & Biases."),
    click.option("--print-config", is_flag=True, help="Print the configuration as TOML and end."),
    click.option("--dry-run", is_flag=True, help="Check everything, print sizes and memory, and end."),
    click.option(
        "--ranks", "planned_ranks", type=click.IntRange(min=1), help="With --dry-run: the number of GPUs to plan for."
    ),
    click.option("--gpus-per-node", type=click.IntRange(min=1), help="With --dry-run: GPUs of a machine [8, or all]."),
    click.option(
        "--device", default="h200", metavar="NAME", help="With --dry-run: their kind, see igpt-ds plan [h200]."
    ),
)


def training_options(command: F) -> F:
    """Give a command the options that every training has, in the order in which --help lists them."""
    for option in reversed(_TRAINING_OPTIONS):
        command = option(command)
    return command


def run_of(path: Path | None, option: Path | None) -> "Run | None":
    """The run directory that is named: as an argument, or, as it once was, by --run."""
    from igpt_ds.run.directory import Run

    if path and option:
        raise click.UsageError(f"--run {option}: {path} is named already: leave one out")
    named = path or option
    return Run(named) if named else None
