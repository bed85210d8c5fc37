"""`igpt-data`: images to a palette, to token shards, and the shards checked."""

import importlib
import pkgutil
import sys

import click

from data_prep import commands
from igpt_ds import __version__
from igpt_ds.errors import RunError, UserError
from igpt_ds.text import one_line


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="igpt-data")
def cli() -> None:
    """Turn images into token shards for Image GPT.

    \b
    Images in class folders, to be trained on at 32 x 32:
      igpt-data palette IMAGES --k 512 --out palette.npy
      igpt-data shards image_folder IMAGES --palette palette.npy --resolution 32 \\
          --holdout 0.04 --out DATA
      igpt-data verify DATA/train
      igpt-data inspect DATA/train --out pictures
    """


for module in pkgutil.iter_modules(commands.__path__):  # a verb is a module NAME.py with a click command NAME
    cli.add_command(getattr(importlib.import_module(f"{commands.__name__}.{module.name}"), module.name))


def main() -> None:
    """The console script. Exit status: 2 bad input (one line says what to do), 1 a fault that one line explains."""
    try:
        sys.exit(cli(prog_name="igpt-data", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (UserError, RunError, click.ClickException) as error:
        message = str(error)
        if isinstance(error, click.UsageError) and error.ctx:
            message = error.format_message()
            if isinstance(error, click.MissingParameter):  # click lists what there is to choose from on lines
                message = " ".join(message.split())
            message = f"{message.rstrip('.')}: see {error.ctx.command_path} --help"
        click.echo(f"igpt-data: {one_line(message)}", err=True)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except click.Abort:
        click.echo("igpt-data: interrupted; the same command again continues", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
