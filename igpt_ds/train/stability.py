"""Non-finite steps and loss spikes: which are passed over, when a run rolls back, and which batches it leaves out then.

- A step whose gradient is not finite is skipped on all ranks alike: weights and moments stay as they are.
- A loss above mean + sigma * deviation of the last losses is a spike. Spikes are not taken into the window.
- After `patience` bad steps in a row, spikes or skipped ones, the run goes back to its newest checkpoint from before
  the first of them, leaves out the batches of the bad steps and of as many steps before, whose updates may have been
  the cause, and goes on.

All of it is arithmetic on numbers that every rank has, so the ranks decide alike, and the state is a part of each
checkpoint, so a run that was killed decides as an unbroken one.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from igpt_ds.config.schema import HealthConfig

Verdict = Literal["good", "skipped", "spike"]

_FIRST = 20  # losses before the first judgement: a deviation of fewer says little
_SMALLEST = 0.01  # share of the mean: the least deviation, since early losses hardly differ


class Stability:
    """Judges steps; see the module's description.

    Args:
        recipe: what counts as a spike.
        state: what `state` gave, from a checkpoint; empty at the beginning.

    Attributes:
        bad: bad steps in a row.
        skipped: steps that were skipped, in all.
    """

    def __init__(self, recipe: HealthConfig, state: Mapping[str, Any]):
        self._recipe = recipe
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=recipe.window)
        self.bad: int = state.get("bad", 0)
        self.skipped: int = state.get("skipped", 0)

    def state(self) -> dict[str, Any]:
        """All that later judgements depend on, for the checkpoint."""
        return {"losses": list(self._losses), "bad": self.bad, "skipped": self.skipped}

    def judge(self, loss: float, gradient_norm: float) -> Verdict:
        """Take note of a step: its loss (nats a token, over the whole batch) and its gradient's norm."""
        verdict: Verdict = "good"
        if not 0 <= gradient_norm < math.inf:
            verdict = "skipped"
            self.skipped += 1
        elif not math.isfinite(loss) or loss > self._limit():
            verdict = "spike"
        else:
            self._losses.append(loss)
        self.bad = 0 if verdict == "good" else self.bad + 1
        return verdict

    @property
    def lost(self) -> bool:
        """Whether the run should roll back."""
        return self.bad >= self._recipe.patience

    def _limit(self) -> float:
        if not self._recipe.spike_sigma or len(self._losses) < min(_FIRST, self._recipe.window):
            return math.inf
        mean = statistics.fmean(self._losses)
        deviation = max(statistics.pstdev(self._losses, mean), _SMALLEST * abs(mean))
        return mean + self._recipe.spike_sigma * deviation
