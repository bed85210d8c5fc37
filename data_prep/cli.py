"""`igpt-data`: images to a palette, to token shards, and the shards checked."""

import importlib
import pkgutil
import sys

import click

from data_prep import commands
from igpt_ds import __version__
from igpt_ds.errors import UserError


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
    """The console script: a user's mistake is one line on stderr and exit status 2."""
    try:
        sys.exit(cli(prog_name="igpt-data", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (UserError, click.ClickException) as error:
        message = str(error)
        if isinstance(error, click.UsageError) and error.ctx:
            message = f"{error.format_message().rstrip('.')}: see {error.ctx.command_path} --help"
        click.echo(f"igpt-data: {' '.join(message.splitlines())}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("igpt-data: interrupted; the same command again continues", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
