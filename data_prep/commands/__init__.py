"""The commands of igpt-data, one file each, and what they share.

Heavy imports stay inside the commands, so that --help answers at once.
"""

import glob
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from data_prep.files.folders import is_left_out
from igpt_ds.atomic import refuse_special, writing
from igpt_ds.errors import UserError
from igpt_ds.options import Number

if TYPE_CHECKING:
    from data_prep.workers.run import Here, OnCluster

Command = TypeVar("Command", bound=Callable[..., Any])


class _Path(click.Path):
    """A path of this machine; `~` is the user's folder, where the shell has left it standing (--out '~/data')."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 (click checks the text)


PATH = _Path(path_type=Path)
MAX_REJECT_RATE = click.option(
    "--max-reject-rate",
    type=Number(0, 1),
    default=0.0,
    show_default=True,
    help="Share of images that may be skipped because they cannot be read.",
)


def _pairs(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary."""
    pairs = [value.partition("=") for value in values]
    for name, equals, _value in pairs:
        if not name or not equals:
            raise click.BadParameter(f"{name or '='!r} is not NAME=VALUE")
    return {name: value for name, _equals, value in pairs}


SOURCE_OPTION = click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_pairs,
    help="An option of the source; may be repeated.",
)

WORKERS = click.option(
    "--workers", type=click.IntRange(1, 4096), default=1, show_default=True, help="Processes that share the work."
)

_WHERE_OPTIONS = (
    WORKERS,
    click.option(
        "--executor",
        type=click.Choice(["local", "slurm"]),
        default="local",
        show_default=True,
        help="Where the work is done: on this machine, or in an array of Slurm jobs of --workers processes each.",
    ),
    click.option("--slurm-partition", metavar="NAME", help="Partition of the jobs."),
    click.option("--slurm-account", metavar="NAME", help="Account of the jobs."),
    click.option("--slurm-time", metavar="TIME", default="12:00:00", show_default=True, help="Time limit of a job."),
    click.option(
        "--slurm-option",
        "slurm_options",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_pairs,
        help="Any other option of sbatch, such as mem=8G or constraint=cpu; may be repeated.",
    ),
    click.option(
        "--array-parallelism",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Jobs of the array that may run at a time.",
    ),
    click.option("--wait", is_flag=True, help="Wait for the Slurm jobs to end."),
)


def where_options(command: Command) -> Command:
    """The options that say where the work is done; `place_of` reads them."""
    for option in reversed(_WHERE_OPTIONS):
        command = option(command)
    return command


def local_workers(number: int) -> int:
    """So many processes, unless this machine is too small for them: each is a Python of its own."""
    most = max(64, 8 * (os.cpu_count() or 1))
    if number > most:
        raise UserError(f"--workers {number}: too many for {os.cpu_count()} processors: choose at most {most}")
    return number


@contextmanager
def place_of(folder: Path, where: dict[str, Any]) -> "Iterator[Here | OnCluster]":
    """Where the work is to be done: processes of this machine, or jobs whose scripts and logs lie in `folder`."""
    from data_prep.workers.pool import pool
    from data_prep.workers.run import Here, OnCluster
    from data_prep.workers.slurm import Cluster, minutes

    if where["executor"] == "local":
        for name in ("slurm_partition", "slurm_account", "slurm_options", "wait"):
            if where[name]:
                shown = name.replace("_options", "_option").replace("_", "-")
                raise UserError(f"--{shown}: is for --executor slurm: give that, too, or leave it out")
        with pool(local_workers(where["workers"])) as executor:
            yield Here(executor)
        return
    named = {"partition": where["slurm_partition"], "account": where["slurm_account"]}
    options = {**{name: value for name, value in named.items() if value}, **where["slurm_options"]}
    cluster = Cluster(folder, where["workers"], minutes(where["slurm_time"]), options, where["array_parallelism"])
    yield OnCluster(cluster, where["wait"])


_BY_NAME = ("cifar10", "cifar100", "stl10")  # they find their files by name; others take whatever a folder holds


def refuse_inside(source: str, paths: Sequence[str], *outputs: Path) -> None:
    """Refuse to write into a folder that is read: what lies there would be taken for images, or for a class."""
    if source == "imagenet":
        from data_prep.sources.imagenet import folders_of_classes

        paths = folders_of_classes(paths)
    for path in () if source in _BY_NAME else paths:
        for folder in _folders(path):
            for out in outputs:
                if folder in (out.resolve(), *out.resolve().parents):
                    raise UserError(f"{out}: lies in {path}, whose images are read: choose a place outside of it")


def _folders(path: str) -> Iterator[Path]:
    """The folders that a path of a source stands for, and those that links in them lead to, resolved.

    As in `data_prep.files.folders`, links to folders around them and what is left out are not followed.
    """
    found = [path] if os.path.lexists(path) else glob.glob(re.sub(r"\{[^{}]*\}", "*", path))  # noqa: PTH207
    for top in [Path(each).resolve() for each in found if os.path.isdir(each)]:  # noqa: PTH112
        left, seen = [top], set(top.parents)
        while left:
            if (folder := left.pop()) not in seen:
                seen.add(folder)
                yield folder
                for inside, names, _ in os.walk(folder):
                    names[:] = [name for name in names if not is_left_out(name)]
                    left += [link.resolve() for name in names if (link := Path(inside, name)).is_symlink()]


def require_writable(path: Path) -> None:
    """Refuse at once what could not be written in the end.

    Raises:
        UserError: the path is no regular file, or no file can be made where it is to lie.
    """
    with writing(path):
        refuse_special(path)
        folder = next(each for each in path.absolute().parents if os.path.lexists(each))
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass


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

    def show(self, read: int, rejected: int, total: int | None) -> None:
        """As `data_prep.workers.run.Meter`."""
        self.bar.total = total
        if rejected:
            self.bar.set_postfix(rejected=rejected, refresh=False)
        self.tick(read - self.done)
