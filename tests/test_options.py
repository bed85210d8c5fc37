"""One name for one thing among the options; what the README once said means the same still, and is not shown."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data_prep.cli import cli as igpt_data
from igpt_ds.cli import cli as igpt_ds

FORMER = [
    ("pretrain RUN --from W", "pretrain --run RUN --init-from W"),
    ("pretrain RUN", "pretrain --run RUN"),
    ("finetune RUN --from W --split test", "finetune --run RUN --from W --test"),
    ("doctor RUN", "doctor --run RUN"),
    ("probe RUN --split test", "probe RUN --test"),
    ("low-data RUN --split test", "low-data RUN --test"),
    ("sample RUN --images 3 --out a.png", "sample RUN --n 3 --out a.png"),
    ("plan xl --json -", "plan xl --json"),
    ("doctor --json -", "doctor --json"),
    ("checkpoints RUN --json -", "checkpoints RUN --json"),
]
FORMER_DATA = [
    ("inspect D --json -", "inspect D --json"),
    ("inspect D --images 7", "inspect D --sample 7"),
    ("palette D --share 0.5 --out p", "palette D --sample 0.5 --out p"),
    (
        "select s D --like s:D --embedder e --work w --out o --images 9",
        "select s D --like s:D --embedder e --work w --out o --number 9",
    ),
]


def parsed(group: click.Group, line: str) -> tuple[click.Command, dict[str, object]]:
    name, *words = line.split()
    command = group.get_command(click.Context(group), name)
    assert command is not None
    values = dict(command.make_context(name, words).params)
    values["run_path"] = values.pop("run_option", None) or values.get("run_path")
    return command, values


@pytest.mark.parametrize(
    ("group", "now", "once"),
    [*((igpt_ds, *pair) for pair in FORMER), *((igpt_data, *pair) for pair in FORMER_DATA)],
    ids=[once for _, once in FORMER + FORMER_DATA],
)
def test_a_former_spelling(group: click.Group, now: str, once: str) -> None:
    command, values = parsed(group, now)
    assert parsed(group, once)[1] == values
    shown = CliRunner().invoke(command, ["--help"]).output
    for gone in {word for word in once.split() if word.startswith("--")} - set(now.split()):
        assert f"{gone} " not in shown.replace("\n", " ")


def test_ranks_are_nodes_of_gpus(digits: Path) -> None:
    words = ["pretrain", "--preset", "tiny", "--data", str(digits), "--dry-run"]
    texts = [
        CliRunner().invoke(igpt_ds, [*words, *more], catch_exceptions=False).output
        for more in (["--nodes", "2"], ["--ranks", "16"], ["--nodes", "4", "--gpus-per-node", "4"])
    ]
    assert texts[0] == texts[1] != texts[2]
    assert "2 nodes" in texts[0]


def test_json_goes_to_a_file_beside_the_table(tmp_path: Path) -> None:
    plan = ["plan", "s", "--json"]
    printed = CliRunner().invoke(igpt_ds, [*plan, "-"], catch_exceptions=False).output
    table = CliRunner().invoke(igpt_ds, [*plan, str(tmp_path / "plan.json")], catch_exceptions=False).output
    assert json.loads(printed) == json.loads((tmp_path / "plan.json").read_text())
    assert table == CliRunner().invoke(igpt_ds, ["plan", "s"], catch_exceptions=False).output
