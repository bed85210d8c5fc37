"""What options of several commands share: `--json`, and former names that work and are not shown."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from igpt_ds.atomic import publish_text

JSON = click.option(
    "--json",
    "json_path",
    is_flag=False,
    flag_value="-",  # once it was a flag that printed
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write the figures to FILE as JSON; - prints them in place of the table.",
)


# Of what runs a network that may be larger than the device; see igpt_ds/weights/placed.py.
PLACEMENT = (
    click.Option(
        ["--device-map"],
        type=click.Choice(["auto"]),
        help="Lay a network that is larger than the GPU over its memory, the processor's and the disk.",
    ),
    click.Option(
        ["--max-memory"],
        metavar="gpu=SIZE,cpu=SIZE",
        help="With --device-map: what it may take, e.g. gpu=20GiB,cpu=8GiB.  [default: four fifths of what is free]",
    ),
)


def show(text: str, figures: object, json_path: Path | None) -> None:
    """Print a table, and write its figures where `JSON` says."""
    as_json = json.dumps(figures, indent=2)
    click.echo(as_json if json_path == Path("-") else text)
    if json_path not in (None, Path("-")):
        publish_text(json_path, as_json + "\n")


class Number(click.FloatRange):
    """A number within bounds, which NaN is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number", param, ctx)
        return found


class Renamed(click.Option):
    """An option with former names: `click.option("--images", cls=Renamed, former=["--n"])`.

    Args:
        former: names that take the same value.
        flags: flags that stood for one value each: {"--test": "test"}.
    """

    def __init__(
        self,
        declarations: Sequence[str],
        former: Sequence[str] = (),
        flags: Mapping[str, str] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(declarations, **rest)
        self._former, self._flags = list(former), dict(flags or {})

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self._former]
        super().add_to_parser(parser, ctx)
        self.opts = shown
        for flag, value in self._flags.items():
            parser.add_option(self, [flag], self.name, action="store_const", const=value)
