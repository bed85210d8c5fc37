"""A streamed source for tests: each folder is one input file, its images in the order of their names.

python -m tests.helpers.streams FOLDER PALETTE OUT WORKERS    builds OUT/train and OUT/val, 7 rows a shard
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards.job import begin
from data_prep.shards.plan import Settings
from data_prep.sources import Encoded, Item, Pool
from data_prep.workers.pool import pool
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from tests.helpers.places import build_here


@dataclass(frozen=True)
class Folders:
    """Folders below `root`: those called test* are the pool "test", all others the pool "train"."""

    root: Path
    classes: list[str] | None = None
    name: str = "folders"

    def parts(self, pool: Pool) -> list[str]:
        """The folders' names."""
        return sorted(p.name for p in self.root.iterdir() if p.name.startswith("test") == (pool == "test"))

    def stream(self, part: str) -> Iterator[Encoded]:
        """A folder's files; one called *.gone cannot be read, one called *.end ends the folder badly."""
        for path in sorted((self.root / part).iterdir()):
            item = Item(f"{part}/{path.name}", None if self.classes is None else self.classes.index(part))
            if path.suffix == ".end":
                raise UserError(f"{part}: ends badly: copy it again")
            yield Encoded(item, OSError("gone") if path.suffix == ".gone" else path.read_bytes())


SETTINGS = Settings(resolution=16, holdout=0.1, views=2, crop=True, seed=0, rows_per_shard=7)


if __name__ == "__main__":
    root, palette, out, workers = sys.argv[1:]
    job = begin(Folders(Path(root)), Path(out), Palette.load(Path(palette)), SETTINGS, max_reject_rate=0.5)
    with pool(int(workers)) as executor:
        build_here(job, executor)
