"""The learning rate as a pure function of the step (paper section 3.4)."""

import math

from igpt_ds.config.schema import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of the update that takes a run from `step` to `step + 1`, 0 ≤ step < steps.

    Linear up to the peak over `warmup_steps` (update number `warmup_steps` is the first at the peak), then half a
    cosine that would reach 0 at `steps`, or the peak to the end where `schedule` is constant.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
