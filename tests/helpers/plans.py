"""Jobs of which nothing is left to the machine, so that a test is of what it computes, not of a decision."""

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config


def specified(preset: str, *changes: str) -> Config:
    """A preset in bfloat16, its blocks recomputed and not compiled, but for the changes ("section.key=value")."""
    facts = ("training.precision=bfloat16", "training.activation_checkpointing=full", "training.compile=false")
    return load_config(preset, [*facts, *changes])
