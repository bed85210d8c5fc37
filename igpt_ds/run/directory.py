"""The run directory: all that is needed to understand, resume and re-plot a run.

RUN/config.toml             the configuration, data facts resolved
    ds.json                 the resolved DeepSpeed configuration, and what of it was "auto"
    palette.npy             the colours of the tokens
    metrics.jsonl           see metrics.py
    events/                 for TensorBoard
    samples/                see train/sheets.py
    log.rank00000.txt       one log a rank
    heartbeats/             see watchdog.py
    checkpoints/            see checkpoint/read.py
    .lock                   whose it is while it trains: see lock.py
    STOP, SAVE              put there by a person: finish the step, save, and end or go on
    features/               see features/cache.py
    probe.json, low_data.json, eval.json, result.json, report.html and their pictures: evaluations
"""

import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from igpt_ds.atomic import no_link, writing
from igpt_ds.checkpoint import names
from igpt_ds.errors import UserError
from igpt_ds.text import visible

LOGGER = logging.getLogger("igpt_ds")


def _visible(record: logging.LogRecord) -> bool:
    """Make a message one line that a terminal only shows, whatever names it holds."""
    record.msg, record.args = visible(record.getMessage()), None
    return True


LOGGER.addFilter(_visible)


# What a training makes, beside checkpoints/, and what is told of it later: pictures and records of evaluations.
_PARTS = re.compile(
    r"config\.toml|ds\.json|palette\.npy|metrics\.(jsonl|cut)|log\.rank[0-9]+\.txt|STOP|SAVE|"
    r"events|samples|heartbeats|features|wandb|(result|report|samples|completions).*\.(json|html|png)"
)


@dataclass(frozen=True)
class Run:
    """The paths of a run directory, which need not exist yet.

    Raises:
        UserError: there can be no such directory.
    """

    path: Path

    def __post_init__(self) -> None:
        try:
            os.lstat(names.step_directory(self.checkpoints, 0) / "checkpoint.json")
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise UserError(f"{self.path}: cannot be a run directory ({error.strerror}): choose another") from error

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds.json"

    @property
    def palette(self) -> Path:
        return self.path / "palette.npy"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def require_writable(self) -> None:
        """Try to write where the run directory is or is to be."""
        with writing(self.path):
            nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            with tempfile.TemporaryFile(dir=nearest):
                pass

    def create(self) -> None:
        """Make the directory; where RUN is a link to nothing, behind it."""
        with writing(self.path):
            if self.path.is_symlink() and not self.path.exists():
                # Not its parents: they may lie on a disk that is not there.
                Path(os.path.realpath(self.path)).mkdir()
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def require_fresh(self, force: bool) -> None:
        """Refuse to start anew over something that is there.

        Raises:
            UserError: there is something in the directory and `force` is not given, or it is no run directory.
        """
        with writing(self.path):
            # Hidden files are those of locks and job scripts.
            there = [path.name for path in self.path.iterdir() if path.name[0] != "."] if self.path.exists() else []
        if not there:
            return
        if not force:
            raise UserError(f"{self.path}: --fresh would overwrite it: add --force, or choose another RUN")
        if not {"config.toml", "log.rank00000.txt"} & set(there):
            raise UserError(
                f"{self.path}: is no run directory (no config.toml), so it is not deleted: choose another RUN"
            )

    def clear(self, records: Sequence[str] = ()) -> list[str]:
        """Delete the run, not its directory: that may be a link, a mount, or where a shell stands.

        Checkpoints go also where checkpoints/ is a link, since the run would go on from them; otherwise what lies
        behind a link stays.

        Args:
            records: what the names of evaluations' records and pictures begin with.

        Returns:
            Names of what is no part of a run, and stays.
        """
        kept: list[str] = []
        if not self.path.exists():
            return kept
        with writing(self.path):
            names.clear(self.checkpoints)
            # What makes it a run directory goes last, so that a clearing that was killed can be done again.
            for path in sorted(self.path.iterdir(), key=lambda path: path == self.config):
                record = path.name.startswith(tuple(records)) and path.suffix in (".json", ".png")
                if record or _PARTS.fullmatch(path.name):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=path.is_mount())
                    else:
                        path.unlink()
                elif path != self.checkpoints and path.name[0] != ".":
                    kept.append(path.name)
        return sorted(kept)


def log_to(run: Run | None, rank: int) -> TextIO:
    """Send the log to RUN/log.rankNNNNN.txt and, from rank 0, to stdout; return the open file, or stderr."""
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk say, is no reason to stop
    LOGGER.setLevel(logging.INFO)
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        LOGGER.addHandler(console)
    if run is not None:
        with writing(run.path):
            stream = open(run.path / f"log.rank{rank:05d}.txt", "a", opener=no_link)  # noqa: SIM115 (closed by none)
        file = logging.StreamHandler(stream)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [file]
        logging.getLogger("py.warnings").propagate = False
        warnings.simplefilter("default")
        return stream
    return sys.stderr
