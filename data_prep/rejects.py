"""Images that cannot be used: counted by reason, and the job stopped where there are more than allowed."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_prep.sources import Source
from data_prep.transforms import RejectError, Transform, decode
from igpt_ds.errors import UserError


class Rejected(NamedTuple):
    """One rejected image: what it is called, the reason to count it by, and what was wrong with this one."""

    id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.id}: {self.reason} ({self.detail})" if self.detail else f"{self.id}: {self.reason}"


class Rejects:
    """The rejects of one job over `total` images, of which a share of `rate` is allowed."""

    def __init__(self, total: int, rate: float) -> None:
        self.total, self.rate = total, rate
        self.found: list[Rejected] = []

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Take note of rejects.

        Raises:
            UserError: there are more than allowed.
        """
        self.found.extend(rejected)
        if len(self.found) <= self.rate * self.total:
            return
        if self.rate == 0:
            raise UserError(f"{self.found[0]}: mend or remove it, or allow some with --max-reject-rate")
        raise UserError(
            f"{len(self.found)} of {self.total} images rejected ({self.reasons()}), the last one "
            f"{self.found[-1]}: mend or remove them, or raise --max-reject-rate above {self.rate:g}"
        )

    def reasons(self) -> str:
        """The counts by reason, most frequent first."""
        counts = Counter(rejected.reason for rejected in self.found)
        return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def pixels(source: Source, item_id: str, transform: Transform, view: int = 0) -> np.ndarray | Rejected:
    """Read, decode and transform one image: uint8 [height, width, 3], or why not."""
    try:
        data = source.read(item_id)
    except OSError as error:
        return Rejected(item_id, "unreadable", error.strerror or str(error))
    try:
        return transform(decode(data), item_id, view)
    except RejectError as reject:
        return Rejected(item_id, reject.reason, reject.detail)
