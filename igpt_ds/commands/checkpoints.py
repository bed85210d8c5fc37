"""`igpt-ds checkpoints`: what a run could go on from, and what is wrong with the rest."""

from dataclasses import asdict
from pathlib import Path

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import UserError
from igpt_ds.options import JSON, show


@click.command(context_settings=CONTEXT)
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@JSON
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read every byte, or look at sizes only.")
def checkpoints(run_path: Path, json_path: Path | None, verify: bool) -> None:
    """A table of a run's checkpoints: step, time, size, ranks, valid or what is wrong.

    \b
    Every byte is read and its sha256 compared:
        igpt-ds checkpoints RUN
    Sizes only, at once:
        igpt-ds checkpoints RUN --no-verify

    Also listed are those that were set aside (damaged-..., abandoned-...) and those that a killed run left unfinished.
    Exit status: 0 nothing to go on from is damaged, 1 a published checkpoint is damaged or only damaged ones are left,
    2 RUN is no run directory.
    """
    from igpt_ds.checkpoint.survey import require_sound, survey, table
    from igpt_ds.run.directory import Run

    run = Run(run_path)
    if not run.config.exists() and not run.checkpoints.is_dir():
        raise UserError(f"{run.path}: no run directory (no config.toml): name that of a pre-training")
    rows = survey(run.checkpoints, verify)
    show(table(rows).text() if rows else "no checkpoint yet", [asdict(row) for row in rows], json_path)
    require_sound(run.checkpoints, rows)
