"""Commands of igpt-ds that have a file of their own. Heavy imports stay inside them, so that --help answers at once."""

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def shown(status: str) -> str:
    """A status in the colour that a terminal's user expects; click leaves the colour out elsewhere."""
    return click.style(status, fg={"OK": "green", "WARN": "yellow", "FAIL": "red"}.get(status))
