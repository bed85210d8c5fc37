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
    STOP, SAVE              put there by a person: finish the step, save, and end or go on
    features/               see features/cache.py
    probe.json, low_data.json, eval.json, result.json, report.html and their pictures: evaluations
"""

import logging
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from igpt_ds.atomic import writing
from igpt_ds.errors import UserError

LOGGER = logging.getLogger("igpt_ds")


@dataclass(frozen=True)
class Run:
    """The paths of a run directory, which need not exist yet."""

    path: Path

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
        """Make the directory."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def require_fresh(self, force: bool) -> None:
        """Refuse to start anew over something that is there.

        Raises:
            UserError: there is something in the directory and `force` is not given, or it is no run directory.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not force:
            raise UserError(f"{self.path}: --fresh would overwrite it: add --force, or choose another RUN")
        if not self.config.exists():
            raise UserError(
                f"{self.path}: is no run directory (no config.toml), so it is not deleted: choose another RUN"
            )

    def clear(self) -> None:
        """Delete the run."""
        if self.path.exists():
            # Out of sight first: what is half deleted must not look like a run that can go on.
            doomed = self.path.resolve().with_name(f".{self.path.name}.old")
            with writing(self.path):
                shutil.rmtree(doomed, ignore_errors=True)
                self.path.resolve().rename(doomed)
                shutil.rmtree(doomed)


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
            stream = (run.path / f"log.rank{rank:05d}.txt").open("a")
        file = logging.StreamHandler(stream)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [file]
        logging.getLogger("py.warnings").propagate = False
        warnings.simplefilter("default")
        return stream
    return sys.stderr
