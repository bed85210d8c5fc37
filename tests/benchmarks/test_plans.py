"""The plans that the documentation shows are those that the planner makes."""

from benchmarks.plans import table
from igpt_ds.config.file import load_config
from igpt_ds.planner.choose import Here, decide
from tests.helpers.ranks import ROOT


def test_the_documentation_has_the_tables_that_the_command_prints() -> None:
    assert table() in (ROOT / "docs" / "plan.md").read_text()


def test_the_documentation_has_a_decision_as_it_is_made() -> None:
    here = Here("NVIDIA H100 80GB HBM3", int(78.4 * 2**30), True, True, 1, 1)
    assert decide(load_config("s"), None, here).line in (ROOT / "docs" / "machine.md").read_text()
