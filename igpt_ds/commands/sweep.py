"""`igpt-ds sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from igpt_ds.commands import CONTEXT
from igpt_ds.errors import RunError, UserError
from igpt_ds.options import Number
from igpt_ds.text import visible

if TYPE_CHECKING:
    from igpt_ds.config.schema import Config

# Options of a training that the search decides, or with which there would be none.
_OWN = {
    "run_path": "RUN",
    "run_option": "--run",
    "fresh": "--fresh",
    "dry_run": "--dry-run",
    "print_config": "--print-config",
}


@click.command(context_settings=CONTEXT)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--rates", metavar="A,B,...", help="Largest first [0.01,0.003,0.001,... to 0.000003].")
@click.option("--share", default=1.0, type=Number(0, 1, min_open=True), help="Part of the steps to run [1].")
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

    from igpt_ds.results.tables import EDGES, sweep_table
    from igpt_ds.train import sweep as sweeps

    if collect:
        trials = sweeps.collect(out)
        sweeps.record(out, trials, {"command": None, "share": None})
    else:
        chosen = _rates(rates) if rates else list(sweeps.RATES)
        config = _config(command)
        start = shlex.split(launcher) if launcher else [sys.executable, "-m", "igpt_ds"]
        trials = []
        for trials in sweeps.search(out, chosen, command, start, config, share):
            click.echo(sweep_table({**sweeps.summary(trials), "edge": None}).text())  # it is not over yet
    best = sweeps.winner(trials)
    if collect:
        click.echo(sweep_table({**sweeps.summary(trials), "edge": None}).text())
    if best is None:
        raise RunError(f"{out}: no rate gave a result: see the runs' logs, or try smaller --rates")
    click.echo(visible(f"best rate   {best.rate:g} (table written: {out / 'sweep.json'})"))
    if end := sweeps.edge(trials):
        click.echo(EDGES[end])


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or rates != sorted(set(rates), reverse=True) or not 0 < rates[-1] <= rates[0] < 1e3:
        raise UserError(f"--rates {text}: not numbers above 0 from large to small: write e.g. 0.01,0.003,0.001")
    return rates


def _config(command: tuple[str, ...]) -> "Config":
    """The configuration that the command would run with."""
    import contextlib
    import io
    import tempfile

    from igpt_ds.commands.finetune import finetune
    from igpt_ds.commands.pretrain import pretrain
    from igpt_ds.config.file import load_config

    verb = {"pretrain": pretrain, "finetune": finetune}.get(command[0] if command else "")
    if verb is None:
        raise UserError("sweep: what to run is not told: write e.g. -- pretrain --preset s --data DATA")
    name, words = f"igpt-ds {command[0]}", list(command[1:])
    told = verb.make_context(name, words.copy()).params
    for own in [shown for key, shown in _OWN.items() if told[key]] + ["--split test"] * (told.get("split") == "test"):
        raise UserError(f"sweep: {own}: cannot be a part of a search: leave it out")
    for fact in told["overrides"]:
        if fact.partition("=")[0] in ("training.learning_rate", "training.stop_at"):
            raise UserError(f"sweep: --set {fact}: the search sets it: leave it out (see --rates, --share)")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        verb.main([*words, "--print-config"], prog_name=name, standalone_mode=False)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(printed.getvalue())
        file.flush()
        return load_config(file.name)
