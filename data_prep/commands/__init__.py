"""The commands of igpt-data, one file each, and what they share.

Heavy imports stay inside the commands, so that --help answers at once.
"""

import time
from pathlib import Path

import click

PATH = click.Path(path_type=Path)
MAX_REJECT_RATE = click.option(
    "--max-reject-rate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of images that may be skipped because they cannot be read.",
)


class Progress:
    """A progress bar on a terminal, nothing elsewhere; counts and times either way."""

    def __init__(self, what: str, unit: str = " images") -> None:
        self.what, self.unit = what, unit
        self.done, self.rate = 0, 0.0

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self.began = time.perf_counter()
        # disable=None: a bar on a terminal only.
        self.bar = tqdm(desc=self.what, unit=self.unit, unit_scale=self.unit == "B", disable=None, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.rate = self.done / max(time.perf_counter() - self.began, 1e-9)

    def start(self, total: int) -> None:
        self.began = time.perf_counter()
        self.bar.reset(total)

    def tick(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)


def table(*rows: tuple[str, str]) -> None:
    """Print names and values, aligned."""
    for name, value in rows:
        click.echo(f"{name:<12}{value}")
