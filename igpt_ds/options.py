"""Options of the command lines that were called otherwise once: the old spellings work and are not shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import click


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
