"""Images that cannot be used: counted by reason, and the job stopped where there are more than allowed.

What is allowed is a share of the whole job's images. A source that lists its images says how many they are, so
that a job stops as soon as more are rejected than the whole may have. A streamed source does not: it is judged at
the end, for all its rejects may be in its first file. Where none may be rejected, the first reject stops the job.
Images whose owners opted out are left out and counted with the rest, but they are no fault of the data, and never
stop a job.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from igpt_ds.errors import UserError

OPTED_OUT = "opted out"


class Rejected(NamedTuple):
    """One rejected image: what it is called, the reason to count it by, and what was wrong with this one."""

    id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.id}: {self.reason} ({self.detail})" if self.detail else f"{self.id}: {self.reason}"


@dataclass
class Tally:
    """Images seen, those among them that were rejected, by reason, and the last that was at fault. Tallies add up."""

    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    last: Rejected | None = None

    @property
    def rejected(self) -> int:
        """Images rejected."""
        return sum(self.reasons.values())

    @property
    def faults(self) -> int:
        """Images rejected for what is wrong with them."""
        return self.rejected - self.reasons[OPTED_OUT]

    def reject(self, rejected: Rejected) -> None:
        """Count a reject, which the caller has counted as seen."""
        self.reasons[rejected.reason] += 1
        if rejected.reason != OPTED_OUT:
            self.last = rejected

    def add(self, other: "Tally") -> None:
        """Add what another part of the job has counted."""
        self.seen += other.seen
        self.reasons.update(other.reasons)
        self.last = other.last or self.last

    def judge(self, allowed: float, total: int | None = None) -> None:
        """Is the job still good?

        Args:
            allowed: the share of images that may be rejected.
            total: the job's images; None where it is not known yet: no share of them can be judged.
        """
        if self.last is None or (allowed > 0 and (total is None or self.faults <= allowed * total)):
            return
        if allowed == 0:
            raise UserError(f"{self.last}: mend or remove it, or allow some with --max-reject-rate")
        raise UserError(
            f"{self.faults} of {max(total or 0, self.seen)} images rejected ({self.table()}), the last one "
            f"{self.last}: mend or remove them, or raise --max-reject-rate above {allowed:g}"
        )

    def table(self) -> str:
        """The counts by reason, most frequent first."""
        ordered = sorted(self.reasons.items(), key=lambda each: (-each[1], each[0]))
        return ", ".join(f"{reason} {count}" for reason, count in ordered)
