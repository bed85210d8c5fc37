"""The verbs of igpt-ds. Imports are lazy, so that --help is quick; only this file ends the process."""

import logging
import os
import signal
import sys
import time

import click

from igpt_ds import __version__
from igpt_ds.commands import CONTEXT, Verbs
from igpt_ds.cores import wait_asleep
from igpt_ds.distributed.launcher import follow
from igpt_ds.errors import RunError, UserError
from igpt_ds.memory import keep_freed_memory
from igpt_ds.text import one_line
from igpt_ds.train.signals import arrived, hear, tell_job_script


@click.group(cls=Verbs, context_settings=CONTEXT)
@click.version_option(__version__)
@click.option("--local_rank", hidden=True, type=int, help="Given by the deepspeed launcher; LOCAL_RANK says the same.")
def cli(local_rank: int | None) -> None:
    """Image GPT: pre-train, fine-tune, evaluate and sample.

    \b
    A first run on a laptop:
        igpt-data palette IMAGES --k 512 --out palette.npy
        igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 --holdout 0.04 --out DATA
        igpt-ds pretrain RUN --preset tiny --data DATA
        igpt-ds probe RUN --data DATA
        igpt-ds sample RUN --images 16 --out samples.png
    """


def main() -> None:
    """Run a verb. Exit status: 0 done, 2 bad input (one line says what to do), 1 a fault of the run."""
    hear()
    follow(arrived)
    keep_freed_memory()
    wait_asleep()
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("igpt_ds").setLevel(logging.ERROR)  # rank 0 warns for all; a training's files hear every rank
    try:
        cli(prog_name="igpt-ds", standalone_mode=False)
    except UserError as error:
        if not _ranks_have_met():
            tell_job_script("refused")
        _tell(str(error))
        sys.exit(2)
    except RunError as error:
        if _ranks_have_met():
            tell_job_script("refused")  # a loss that is lost for good: the next life would decide the same
        _tell(str(error))
        sys.exit(1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        tell_job_script("refused")
        where, verb = "igpt-ds", "usage: "
        if error.ctx:
            where, verb = error.ctx.command_path, f"{error.ctx.info_name}: " if error.ctx.parent else ""
        message = error.format_message().rstrip(".")
        if isinstance(error, click.MissingParameter):  # click lists what there is to choose from on lines
            message = " ".join(message.split())
        _tell(f"{verb}{message}: see {where} --help")
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except Exception:
        _let_others_speak()
        raise


def _ranks_have_met() -> bool:
    """Whether training had begun: what is wrong then may be cured by starting again, a wrong option is not."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _tell(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and rank != "0":
        _let_others_speak()
        message = f"[rank {rank}] {message}"
    print(f"igpt-ds: {one_line(message)}", file=sys.stderr, flush=True)


def _let_others_speak() -> None:
    """Where there are other ranks, give the launcher the time to end this one.

    One fault mostly strikes all ranks, and rank 0 tells it; or it struck another rank, which has told it, and what is
    seen here is a lost connection.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # on a busy machine a launcher takes its time
