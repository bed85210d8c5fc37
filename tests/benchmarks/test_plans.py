"""The plans that the documentation shows are those that the planner makes."""

from benchmarks.plans import table
from tests.helpers.ranks import ROOT


def test_the_documentation_has_the_tables_that_the_command_prints() -> None:
    assert table() in (ROOT / "docs" / "plan.md").read_text()
