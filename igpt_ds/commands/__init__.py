"""The verbs of igpt-ds. Heavy imports stay inside them, so that --help answers at once.

A verb is a module NAME.py here that holds a click command of that name, or an evaluation (see `igpt_ds.evals`), whose
verb is made of what it states.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from igpt_ds import evals
from igpt_ds.options import PLACEMENT
from igpt_ds.text import visible

if TYPE_CHECKING:
    from igpt_ds.run.directory import Run

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def shown(status: str) -> str:
    """A status in the colour that a terminal's user expects; click leaves the colour out elsewhere."""
    return click.style(status, fg={"OK": "green", "WARN": "yellow", "FAIL": "red"}.get(status))


# What --nodes and --gpus-per-node were once.
MACHINES = click.IntRange(1, 1_000_000)  # and GPUs: what may be planned for
RANKS = click.option("--ranks", "planned_ranks", hidden=True, type=MACHINES)

# Of every training, whatever it trains: pretrain and finetune.
_TRAINING_OPTIONS = (
    click.argument("run_path", metavar="RUN", required=False, type=click.Path(path_type=Path)),
    click.option("--run", "run_option", hidden=True, type=click.Path(path_type=Path)),
    click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one fact of the preset."),
    click.option(
        "--ds", metavar="NAME", help="ds_configs/NAME.json, a file.json or auto.  [default: the run's, else auto]"
    ),
    click.option("--fresh", is_flag=True, help="Start anew instead of going on from the newest checkpoint."),
    click.option("--force", is_flag=True, help="With --fresh: delete the run that is there."),
    click.option(
        "--allow-change", metavar="FACT", multiple=True, help="Go on though it differs: batch, data_order, ..."
    ),
    click.option("--wandb", "wandb_project", metavar="PROJECT", help="Also log to Weights & Biases."),
    click.option("--print-config", is_flag=True, help="Print the configuration as TOML and end."),
    click.option("--dry-run", is_flag=True, help="Check everything, print sizes and memory, and end."),
    click.option("--nodes", type=MACHINES, help="With --dry-run: machines to plan for  [those started]."),
    click.option("--gpus-per-node", type=MACHINES, help="With --dry-run: GPUs of each  [8, or all]."),
    RANKS,
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


class Verbs(click.Group):
    """All of them; a module is imported when its verb is called, or its line of --help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*_modules(), *(evals.load(name).NAME for name in evals.names())])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _modules():
            command: click.Command = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
            return command
        found = evals.of_verb(cmd_name)
        return None if found is None else _evaluation(found)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            self.commands = dict.fromkeys(self.list_commands(ctx), click.Command(None))  # click suggests among these
        return super().resolve_command(ctx, args)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _evaluation(evaluation: evals.Evaluation) -> click.Command:
    """The verb of an evaluation."""

    def command(run_path: Path, json_path: Path | None, **options: Any) -> None:
        done = evals.evaluate(evaluation, run_path, json_path, **options)
        if done is not None:
            record, written = done
            click.echo(evaluation.table(record).text())
            click.echo(visible(f"written: {', '.join(map(str, written))}"))

    path = click.Path(path_type=Path)
    name = evals.stem(evaluation)
    params = [
        click.Argument(["run_path"], metavar="RUN|PATH", type=path),
        click.Option(["--data"], metavar="DIR", help="Folder of the splits; without it the run's first source."),
        click.Option(
            ["--step"], type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the newest]"
        ),
        *evaluation.OPTIONS,
        *PLACEMENT,
        click.Option(
            ["--json", "json_path"],
            metavar="FILE",
            type=path,
            help=f"Result.  [default: RUN/{name}.json; RUN/{name}-STEP.json with --step]",
        ),
    ]
    help_text = inspect.getdoc(evaluation.run)
    return click.Command(evaluation.NAME, CONTEXT, command, params, help_text)
