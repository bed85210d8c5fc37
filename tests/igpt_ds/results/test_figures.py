"""Tables and figures show what was recorded and what the paper printed, and call missing what is not there."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from igpt_ds import cli
from igpt_ds.errors import UserError
from igpt_ds.evals import likelihood
from igpt_ds.plots import png
from igpt_ds.results import paper_figures, paper_numbers, paper_tables
from igpt_ds.results.records import RunRecords, read_run, read_runs
from igpt_ds.text import MISSING, Table
from tests.helpers import records


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecords]:
    """Auto-regressive and BERT pre-trainings, a fine-tuning of each, one from scratch, one with nothing recorded."""
    ar = records.make_run(tmp_path / "ar")
    records.write(ar / "probe.json", records.probe(600, 0.5, 0.875, 0.75, test={"accuracy": 0.8125, "n": 320}))
    records.write(ar / "probe.600.json", records.probe(600, 0.1, 0.1, 0.1))  # probe.json goes before
    records.write(ar / "probe.200.json", records.probe(200, 0.5, 0.625, 0.5))
    records.write(ar / "probe.300.json", records.probe(300, 0.5, 0.7, 0.5))  # no validation at 300
    records.write(ar / "low_data.json", records.LOW_DATA)
    validations = [{"step": step, "val_loss": loss, "val_images": 60} for step, loss in ((200, 1.5), (600, 1.25))]
    records.write_metrics(ar, records.training_line(100, 2.0), *validations)
    bert = records.make_run(tmp_path / "bert", "objective.name=masked_pixel")
    records.write(bert / "probe.json", records.probe(600, 0.5, 0.75, 0.5, masks=records.masks(0.78)))
    records.write(bert / "eval.json", records.likelihood(1.75))
    for name, start, accuracy in (("ar-ft", f"{ar}/checkpoints/step-00000600", 0.9), ("scratch", "", 0.7)):
        tuned = records.make_run(tmp_path / name, start=start)
        records.write(tuned / "result.json", {"kind": "finetune", "accuracy": accuracy, "split": "val", "n": 60})
    records.make_run(tmp_path / "empty")
    return read_runs([tmp_path / name for name in ("ar", "bert", "ar-ft", "scratch", "empty")])


def own(table: Table) -> dict[str, list[str]]:
    """Rows of own runs by what they are called."""
    rows = [list(row) for row in table.rows if row[-1] == paper_tables.OURS]
    return {next(cell for cell in row if cell.split(",")[0] in NAMES).split(",")[0]: row for row in rows}


NAMES = {"ar", "bert", "ar-ft", "scratch", "empty"}


def test_tables_hold_the_records_and_say_what_is_missing(runs: list[RunRecords]) -> None:
    first, second, third, fourth, fifth = paper_tables.all_tables(runs)
    assert own(first)["ar"] == ["pets", "ar, layer 1", "81.2", "320 test", "pre-trained", "this run"]
    assert own(first)["bert"][2:4] == ["75.0", "60 val"]
    assert own(first)["empty"][2:4] == [MISSING, ""]
    assert own(second)["ar"] == ["ar", "2²·3", "0.0254", "32", "81.2", "320 test", "this run"]
    assert own(third)["ar-ft"][2:5] == ["90.0", "60 val", "pre-trained"]
    assert own(third)["scratch"][2:5] == ["70.0", "60 val", "none"]
    assert own(fourth)["ar"] == ["ar", "45.0 ± 4.1", "19.0 ± 1.0", MISSING, "5", "60 val", "this run"]
    assert own(fourth)["bert"][1:4] == [MISSING] * 3
    assert own(fifth)["ar"] == ["ar", "auto-regressive", "2²·3", "0.003", "", "1.2500", "60", "this run"]
    assert own(fifth)["bert"][1:] == ["BERT", "2²·3", "0.003", "", "1.7500", "60", "this run"]
    assert own(fifth)["empty"][5] == MISSING


def test_papers_rows_are_those_of_its_text(runs: list[RunRecords]) -> None:
    """Spot checks against the paper, and what can be held against itself."""
    tables = paper_tables.all_tables(runs)
    counts = [sum(row[-1] == paper_tables.PAPER for row in table.rows) for table in tables]
    assert counts == [8, 11, 8 + 5, 6, 8]
    assert ["iGPT-XL", "64²·3", "6801", "15360", "72.0", "", "paper"] in [list(r) for r in tables[1].rows]
    assert ["iGPT-L", "26.8 ± 1.5", "12.4 ± 0.6", "5.7 ± 0.1", "5", "", "paper"] in [list(r) for r in tables[3].rows]
    accuracies = [float(row[4]) for row in paper_numbers.TABLE_2]
    assert accuracies == sorted(accuracies)
    derived = [(name, value) for name, value, is_derived in paper_numbers.FIGURE_2 if is_derived]
    assert derived == [("CIFAR-10,\nlast layer", pytest.approx(96.3 - 2.4))]
    for _, model, accuracy, _ in paper_numbers.TABLE_1:
        assert 70 < float(accuracy) < 100 and model


def test_a_fine_tuning_of_few_labels_is_told_and_not_drawn_among_those_of_all(runs: list[RunRecords]) -> None:
    ar = next(run for run in runs if run.label == "ar")
    few = records.make_run(ar.path.parent / "few", "finetune.labels=4", start=f"{ar.path}/checkpoints/step-00000600")
    records.write(few / "result.json", {"kind": "finetune", "accuracy": 0.95, "split": "test", "n": 60})
    more = [*runs, read_run(few)]
    assert ["pets", "few, 4 labels a class", "95.0", "60 test", "pre-trained", "this run"] in [
        list(row) for row in paper_tables.table_3(more).rows
    ]
    for found in (runs, more):
        split = paper_figures.split_of(found)
        assert (split, paper_figures.groups_of(found, split)) == ("val", paper_figures.groups_of(runs, "val"))


def test_concatenated_layers_and_searched_rates_have_their_rows(tmp_path: Path) -> None:
    run = records.make_run(tmp_path / "search" / "lr-0.003")
    several = [
        {"layers": [0, 1], "accuracy": 0.9, "n": 60},
        {"layers": [0, 1, 2], "accuracy": 0.9, "n": 60, "test": {"accuracy": 0.95, "n": 320}},
    ]
    records.write(run / "probe.json", records.probe(600, 0.5, 0.875, 0.75, concatenation=several))
    records.write(run / "probe-none.json", records.probe(700, 0.1, 0.1, norm="none"))  # features not the paper's
    rates = [{"rate": 0.01, "status": "diverged"}, {"rate": 0.003, "status": "done"}]
    records.write(tmp_path / "search" / "sweep.json", {"rates": rates, "winner": 0.003})
    found = read_runs([run])
    rows = [list(row) for row in paper_tables.table_2(found).rows[-3:]]
    assert [row[3:6] for row in rows] == [
        ["32", "87.5", "60 val"],
        ["64", "90.0", "60 val"],
        ["96", "95.0", "320 test"],
    ]
    assert paper_tables.table_5(found).rows[-1][4] == "0.01, 0.003: best 0.003"


def test_a_tables_three_forms_agree() -> None:
    table = Table("Title", ["name", "n"], [["a|b\n<i>", "5"], ["long name", "1,234"], ["c", MISSING]], "note")
    assert table.text().splitlines() == [
        "Title",
        "name             n",
        "a|b\\n<i>         5",
        "long name    1,234",
        "c          missing",
        "note",
    ]
    lines = table.markdown().splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert "| a\\|b\\\\n&lt;i>" in table.markdown()
    assert lines[3].split("|")[2].strip().endswith(":")  # figures to the right
    assert list(csv.reader(table.csv().splitlines(keepends=True)))[1] == ["a|b\n<i>", "5"]


def points(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]


def words(axes: Axes) -> str:
    return " | ".join(text.get_text() for text in axes.texts)


def test_figure_2_draws_the_newest_probe_of_each_run(runs: list[RunRecords]) -> None:
    axes, theirs = paper_figures.figure_2(runs).axes
    assert points(axes) == [([0, 1, 2], [50, 87.5, 75]), ([0, 1, 2], [50, 75, 50])]
    assert axes.get_legend().get_texts()[0].get_text() == "ar, pets (n = 60), 600 steps"
    assert "96.3 | 93.9\nderived | 82.8" in words(theirs)
    assert "missing" in words(paper_figures.figure_2(runs[-1:]).axes[0])


def test_figure_3_pairs_probes_and_losses_of_a_step(runs: list[RunRecords]) -> None:
    axes, theirs = paper_figures.figure_3(runs).axes
    assert points(axes) == [([1.5, 1.25], [62.5, 87.5]), ([1.75], [75])]
    low, high = axes.get_xlim()
    assert low > high  # better to the right, as in the paper
    assert points(theirs)[2] == ([2.0466], [60.3])
    assert theirs.get_ylabel() == "accuracy on ImageNet, %" and "not figure 3's" in theirs.get_title()
    assert axes.get_legend().get_texts()[0].get_text() == "ar, pets (n = 60)"
    assert "missing" in words(paper_figures.figure_3(runs[-1:]).axes[0])


def test_a_line_of_figure_3_is_of_one_data_set(tmp_path: Path) -> None:
    run = records.make_run(tmp_path / "run")
    for step, accuracy, data in ((100, 0.9, "x/cats"), (200, 0.6, "x/pets"), (300, 0.7, "x/pets")):
        records.write(run / f"probe-{step}.json", records.probe(step, accuracy, data=data))
    records.write_metrics(run, *({"step": s, "val_loss": s / 100, "val_images": 60} for s in (100, 200, 300)))
    axes = paper_figures.figure_3(read_runs([run])).axes[0]
    assert points(axes) == [([2, 3], [60, 70])]


def bars(runs: list[RunRecords]) -> list[tuple[str, Any, Any]]:
    """What figure 4 draws: of each group the name, and (accuracy, n, accuracy of the vote) of probe and fine-tuning."""

    def shown(score: paper_figures.Score | None) -> tuple[float, int | None, float | None] | None:
        return score and (score.accuracy, score.n, score.masks)

    groups = paper_figures.groups_of(runs, paper_figures.split_of(runs))
    return [(group.name, shown(group.probe), shown(group.tuned)) for group in groups]


def test_figure_4_puts_fine_tunings_beside_their_pre_training(runs: list[RunRecords]) -> None:
    assert bars(runs) == [
        ("ar\nauto-regressive", (87.5, 60, None), (90, 60, None)),
        ("bert\nBERT", (75, 60, 78), None),
        ("scratch\nfrom scratch", None, (70, 60, None)),
    ]
    axes, theirs = paper_figures.figure_4(runs).axes
    heights = [(round(bar.get_y(), 6), round(bar.get_height(), 6)) for bar in axes.patches if bar.get_x() > -5]
    assert heights == [(0, 87.5), (0, 90), (0, 75), (75, 3), (0, 70)]
    assert words(axes).count("n = 60") == 4 and axes.get_title() == "these runs, validation images"
    assert words(axes).count("no record") == 2 and words(theirs).count("not printed") == 2
    assert "missing" in words(paper_figures.figure_4(runs[-1:]).axes[0])


def test_all_bars_of_figure_4_are_of_one_split(tmp_path: Path) -> None:
    """Those of the test split only where each has a result on it; a result on test/ keeps that on val/ beside it."""
    ar, tuned = records.make_run(tmp_path / "ar"), tmp_path / "tuned"
    records.make_run(tuned, start=f"{ar}/checkpoints/step-00000600")
    test = {"accuracy": 0.8125, "n": 320, "masks": records.masks(0.85)}
    records.write(ar / "probe.json", records.probe(600, 0.5, 0.875, masks=records.masks(0.9), test=test))
    result = {"accuracy": 0.75, "n": 320, "split": "test", "masks": {"count": 5, "accuracy": 0.8}}
    records.write(tuned / "result.json", {**result, "validation": {"accuracy": 0.875, "n": 60}})
    both = read_runs([ar, tuned])
    assert bars(both) == [("ar\nauto-regressive", (81.25, 320, 85), (75, 320, 80))]
    assert paper_figures.figure_4(both).axes[0].get_title() == "these runs, test images"
    records.write(ar / "probe.json", records.probe(600, 0.5, 0.875))
    assert bars(read_runs([ar, tuned])) == [("ar\nauto-regressive", (87.5, 60, None), (87.5, 60, None))]
    # Folded into training, no validation images are left to have an accuracy of.
    records.write(tuned / "result.json", {**result, "validation": None})
    assert bars(read_runs([ar, tuned])) == [("ar\nauto-regressive", (87.5, 60, None), None)]


def test_heat_map_puts_every_position_in_its_place() -> None:
    image = likelihood.figure(records.likelihood()).axes[0].images[0].get_array()
    assert image is not None
    np.testing.assert_array_equal(np.ma.filled(image, -1), [[1, 2], [-1, 0.5]])


def test_labels_are_words_whatever_they_hold(tmp_path: Path) -> None:
    """A dollar begins no formula; an underscore hides no line."""
    run = records.make_run(tmp_path / "_$\\frac$")
    records.write(run / "probe.json", records.probe(600, 0.5, 0.75))
    figure = paper_figures.figure_2(read_runs([run]))
    assert png(figure).startswith(b"\x89PNG")
    assert len(figure.axes[0].get_legend().get_texts()) == 1


def test_labels_tell_runs_of_one_name_apart(tmp_path: Path) -> None:
    paths = [records.make_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [run.label for run in read_runs([*paths, paths[0]])] == ["a/run", "b/run"]


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    def refused(name: str, content: str) -> str:
        run = records.make_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        (run / name).write_text(content)
        with pytest.raises(UserError) as error:
            read_run(run)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "probe.json: not readable JSON: write it anew with igpt-ds probe" in refused("probe.json", "{")
    assert "layers is missing" in refused("probe.json", json.dumps({"step": 3}))
    for facts, fault in (
        ({"layers": [{}]}, "layers[0].layer is missing or no int"),
        ({"layers": []}, "no layer was probed"),
        ({"layers": [{"layer": 0, "accuracy": "0.5"}]}, "layers[0].accuracy is missing or no number from 0 to 1"),
        ({"layers": [{"layer": 0, "accuracy": 1.5}]}, "layers[0].accuracy is missing or no number from 0 to 1"),
        ({"layers": [{"layer": 0, "accuracy": math.nan}]}, "not readable JSON"),
        ({"step": "3"}, "step is missing or no int"),
        ({"step": -3}, "step is missing or no int"),
        ({"untrained": {}}, "untrained is missing or no list"),
        ({"test": {"accuracy": 0.5}}, "test.n is missing or no int"),
        ({"concatenation": [{"layers": [None], "accuracy": 1}]}, "concatenation[0].layers[0] is missing or no int"),
    ):
        assert fault in refused("probe.json", json.dumps(records.probe(3, 0.5) | facts))
    assert "accuracy is missing or no number" in refused("result.json", json.dumps({"accuracy": True, "n": 3}))
    assert "rates[0].rate" in refused("../sweep.json", json.dumps({"rates": [{"rate": [1]}]}))
    (tmp_path / "sweep.json").unlink()
    assert "igpt-ds eval" in refused("eval.json", "[]")
    assert "5 positions of 2 x 2" in refused(
        "eval.json", json.dumps(records.likelihood() | {"positions": {"nats_per_token": [1.0] * 5}})
    )
    found = {"four": {"accuracies": [0.5], "mean": 0.5, "std": 0, "n": 6}}
    assert "'four' labels a class" in refused("low_data.json", json.dumps({"labels_per_class": found}))
    for path in (tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="no run directory"):
            read_run(path)


def test_the_command_writes_all_of_it(
    runs: list[RunRecords], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paper"

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *map(str, words)])
        cli.main()

    call("figures", *(run.path for run in runs), "--out", out)
    assert capsys.readouterr().out.startswith("written: ")
    tables = [f"table{number}.csv" for number in range(1, 6)]
    assert sorted(path.name for path in out.iterdir()) == [
        "figure2.png",
        "figure3.png",
        "figure4.png",
        *tables,
        "tables.md",
    ]
    for number in (2, 3, 4):
        with Image.open(out / f"figure{number}.png") as picture:
            assert picture.size == (1320, 528)
    text = (out / "tables.md").read_text()
    assert text.count("## Table") == 5 and "45.0 ± 4.1" in text
    with pytest.raises(SystemExit) as end:
        call("figures", tmp_path / "nowhere", "--out", out)
    assert end.value.code == 2 and "no run directory" in capsys.readouterr().err
