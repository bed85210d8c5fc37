"""`igpt-ds sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import RunError, UserError

if TYPE_CHECKING:
    from igpt_ds.config.schema import Config

_OWN = ("--run", "--test", "--fresh", "--dry-run", "--print-config")  # the search decides, or they make none


@click.command(context_settings=CONTEXT)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--rates", metavar="A,B,...", help="Largest first [0.01,0.003,0.001,... to 0.000003].")
@click.option("--share", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Part of the steps to run [1].")
@click.option("--launcher", metavar="WORDS", help="What starts igpt-ds on many GPUs; without it, one process.")
@click.option("--collect", is_flag=True, help="Run nothing: read the runs DIR/lr-* of Slurm jobs.")
def sweep(
    command: tuple[str, ...], out: Path, rates: str | None, share: float, launcher: str | None, collect: bool
) -> None:
    """Search for the learning rate: from large to small, until the validation result gets worse.

    \b
    Each rate runs to its end, in DIR/lr-RATE; the table and the winner are written to DIR/sweep.json:
        igpt-ds sweep --out sweeps/s -- pretrain --preset s --data DATA
        igpt-ds sweep --out sweeps/ft -- finetune --from runs/s --data cifar10
    The first tenth of each schedule, on 8 GPUs:
        igpt-ds sweep --out sweeps/l --share 0.1 --launcher "deepspeed --num_accelerators 8 --module igpt_ds" \\
            -- pretrain --preset l --data DATA
    All rates at once as Slurm jobs, and their table:
        DATA=DATA RUN=sweeps/s PRESET=s sbatch slurm/sweep_lr.sh
        igpt-ds sweep --out sweeps/s --collect

    The same command goes on where it was stopped; finished rates are not run again.
    """
    import shlex
    import sys

    from igpt_ds.results.tables import sweep_table
    from igpt_ds.train import sweep as sweeps

    if collect:
        trials = sweeps.collect(out)
        sweeps.record(out, trials, {"command": None, "share": None})
    else:
        _check(command)
        chosen = _rates(rates) if rates else list(sweeps.RATES)
        training = _config(command).training
        if not training.validate_every:
            raise UserError("training.validate_every=0: without validation no rate is better: set an interval")
        end = max(1, round(share * training.steps))
        start = shlex.split(launcher) if launcher else [sys.executable, "-m", "igpt_ds"]
        trials = []
        for trials in sweeps.search(out, chosen, command, start, end, share):
            click.echo(sweep_table(sweeps.summary(trials)).text())
    best = sweeps.winner(trials)
    if collect:
        click.echo(sweep_table(sweeps.summary(trials)).text())
    if best is None:
        raise RunError(f"{out}: no rate gave a result: see the runs' logs, or try smaller --rates")
    click.echo(f"best rate   {best.rate:g} (table written: {out / 'sweep.json'})")
    if not sweeps.rose(trials) and best == trials[-1]:
        click.echo("the smallest rate is the best: smaller ones may be better still (--rates)")


def _check(command: tuple[str, ...]) -> None:
    if not command or command[0] not in ("pretrain", "finetune"):
        raise UserError("sweep: what to run is not told: write e.g. -- pretrain --preset s --data DATA")
    for word in command:
        if word.partition("=")[0] in _OWN:
            raise UserError(f"sweep: {word}: cannot be a part of a search: leave it out")
        if word.startswith(("training.learning_rate=", "training.stop_at=")):
            raise UserError(f"sweep: --set {word}: the search sets it: leave it out (see --rates, --share)")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or rates != sorted(set(rates), reverse=True) or not 0 < rates[-1] <= rates[0] < 1e3:
        raise UserError(f"--rates {text}: not numbers above 0 from large to small: write e.g. 0.01,0.003,0.001")
    return rates


def _config(command: tuple[str, ...]) -> "Config":
    """The configuration that the command would run with.

    Raises:
        UserError: the command is refused.
    """
    import contextlib
    import io
    import tempfile

    from igpt_ds.commands.finetune import finetune
    from igpt_ds.commands.pretrain import pretrain
    from igpt_ds.config.file import load_config

    verb = {"pretrain": pretrain, "finetune": finetune}[command[0]]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        verb.main([*command[1:], "--print-config"], prog_name=f"igpt-ds {command[0]}", standalone_mode=False)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(printed.getvalue())
        file.flush()
        return load_config(file.name)
