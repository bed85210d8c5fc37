"""The search for the rate: when it stops, what it takes for the best, that it goes on; runs are played but for one."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from igpt_ds import cli
from igpt_ds.lock import Lock
from igpt_ds.results.tables import sweep_table
from igpt_ds.train import sweep
from igpt_ds.train.sweep import Trial, blind_guess, folder, rose, summary, winner
from tests.helpers.commands import run_command
from tests.helpers.models import small_config

Plan = dict[float, Any]


@pytest.fixture
def call(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `igpt-ds sweep` with played runs; its exit status, what it printed, its errors, the rates started."""
    monkeypatch.setattr(sweep, "_LOOK_EVERY", 0.05)
    plan = tmp_path / "plan.json"

    def run(trials: Plan, *options: str, more: tuple[str, ...] = ()) -> tuple[int, str, str, list[float]]:
        plan.write_text(json.dumps({repr(rate): what for rate, what in trials.items()}))
        started = plan.with_suffix(".started")
        started.unlink(missing_ok=True)
        launcher = shlex.join([sys.executable, "-m", "tests.helpers.played_training", str(plan)])
        training = ["pretrain", "--preset", "tiny", "--data", str(digits), "--set", "training.steps=40", *more]
        arguments = ["sweep", "--out", str(tmp_path / "out"), "--launcher", launcher, *options, "--", *training]
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, errors = capsys.readouterr()
        return status, out, errors, [float(r) for r in started.read_text().split()] if started.exists() else []

    return run


def recorded(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "sweep.json").read_text())
    return found


def test_it_stops_once_the_final_loss_rises(call: Any, tmp_path: Path) -> None:
    plan = {0.01: [1.9, None], 0.003: [1.6, None], 0.001: [1.7, None], 0.0003: [1.0, None]}
    status, out, errors, started = call(plan)
    assert (status, errors, started) == (0, "", [0.01, 0.003, 0.001])
    record = recorded(tmp_path)
    assert (record["kind"], record["winner"], record["criterion"]) == ("sweep", 0.003, "val_loss")
    assert [(t["rate"], t["status"], t["step"], t["val_loss"], t["n"]) for t in record["rates"]] == [
        (0.01, "done", 40, 1.9, 67),
        (0.003, "done", 40, 1.6, 67),
        (0.001, "done", 40, 1.7, 67),
    ]
    assert out.endswith(f"best rate   0.003 (table written: {tmp_path / 'out' / 'sweep.json'})\n")
    # Given again, nothing is run again.
    assert call(plan)[3] == []
    assert recorded(tmp_path) == record


def test_a_directory_has_one_search_at_a_time(call: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = Lock.take(tmp_path / "out")
    status, out, errors, started = call({0.01: [1.9, None]})
    assert (status, out, started) == (2, "", [])
    assert errors.startswith(f"igpt-ds: {tmp_path / 'out'}: in use by process ") and errors.count("\n") == 1
    held.release()
    assert call({0.01: [1.5, None], 0.003: [1.6, None]})[0] == 0
    assert not held.path.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"rates": 3}', '{"rates": [{"rate": 1}]}', "[" * 100_000])
def test_a_damaged_record_is_told_in_one_line(call: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(content)
    status, _, errors, started = call({0.01: [1.9, None]})
    assert (status, started) == (2, [])
    assert "sweep.json: no record of a search" in errors and errors.count("\n") == 1


def test_what_cannot_be_started_or_asked_to_stop_is_a_line(call: Any, tmp_path: Path) -> None:
    status, _, errors, _ = call({}, "--launcher", "nowhere --to be found")
    assert status == 2
    assert errors == "igpt-ds: sweep: nowhere: cannot be started: No such file or directory: mend --launcher\n"
    stop = tmp_path / "out" / "lr-0.01" / "STOP"
    stop.mkdir(parents=True)
    status, _, errors, started = call({0.01: [1.9, None]})
    assert (status, started) == (2, [])
    assert errors == f"igpt-ds: {stop}: cannot write: the path is a directory: choose another path\n"


def test_diverged_rates_are_stopped_and_count_as_worst(call: Any, tmp_path: Path) -> None:
    plan = {0.01: "diverges", 0.003: "lost", 0.001: [1.6, None], 0.0003: "lost", 0.0001: [0.1, None]}
    status, _, errors, started = call(plan)
    assert (status, errors, started) == (0, "", [0.01, 0.003, 0.001, 0.0003])
    assert [trial["status"] for trial in recorded(tmp_path)["rates"]] == ["diverged", "diverged", "done", "diverged"]
    assert recorded(tmp_path)["winner"] == 0.001
    assert not (tmp_path / "out" / "lr-0.01" / "STOP").exists()
    assert call(plan)[3] == []


def test_a_fine_tuning_is_judged_by_its_best_accuracy(call: Any, tmp_path: Path) -> None:
    # The loss would choose otherwise.
    plan = {0.01: [1.0, 0.5], 0.003: [1.5, 0.7], 0.001: [1.2, 0.6]}
    status, out, _, started = call(plan)
    assert (status, started) == (0, [0.01, 0.003, 0.001])
    record = recorded(tmp_path)
    assert (record["winner"], record["criterion"]) == (0.003, "val_accuracy")
    assert record["rates"][1] == {
        "rate": 0.003,
        "status": "done",
        "step": 39,
        "val_loss": 1.5,
        "val_accuracy": 0.7,
        "n": 67,
    }
    widths = {len(line) for line in out.splitlines()[-5:-2]}
    assert len(widths) <= 2  # the best line has a mark


def test_a_part_of_the_steps_and_going_on_after_a_crash(call: Any, tmp_path: Path) -> None:
    plan = {0.01: [2.0, None], 0.003: "killed once", 0.001: [1.9, None]}
    options = ("--share", "0.5", "--rates", "0.01,0.003,0.001")
    status, _, errors, started = call(plan, *options)
    assert (status, started) == (1, [0.01, 0.003])
    assert errors == (
        "igpt-ds: sweep: rate 0.003 ended at step 19 of 20 (exit status 1); the same command goes on from there\n"
    )
    (tmp_path / "plan.started").write_text("0.003\n")
    status, _, errors, started = call({**plan, 0.003: [1.5, None]}, *options)
    assert (status, errors, started) == (0, "", [0.003, 0.001])
    assert [trial["step"] for trial in recorded(tmp_path)["rates"]] == [20, 20, 20]
    assert recorded(tmp_path)["share"] == 0.5
    status, _, errors, started = call(plan)
    assert (status, started) == (
        2,
        [],
    ) and "share was 0.5, but now is 1.0: restore it, or choose another --out" in errors


def test_nothing_but_divergence_is_told(call: Any) -> None:
    status, _, errors, started = call({0.01: "lost", 0.003: "lost"}, "--rates", "0.01,0.003")
    assert (status, started) == (1, [0.01, 0.003]) and "no rate gave a result" in errors


@pytest.mark.parametrize(
    ("plan", "edge", "told"),
    [
        ({0.01: [2.0, None], 0.003: [1.0, None]}, "smallest", "smaller ones may be better still (--rates)\n"),
        ({0.01: [1.0, None], 0.003: [2.0, None]}, "largest", "larger ones may be better still (--rates)\n"),
        ({0.01: [1.0, None]}, "only", "one rate alone was tried: others may be better (--rates)\n"),
        ({0.01: "lost", 0.003: [1.0, None], 0.001: [2.0, None]}, None, "sweep.json)\n"),
    ],
    ids=["smallest", "largest", "only", "between"],
)
def test_a_best_rate_at_the_edge_of_the_grid_is_told(
    call: Any, tmp_path: Path, plan: Plan, edge: str | None, told: str
) -> None:
    _, out, _, _ = call(plan, "--rates", ",".join(map(str, plan)))
    assert out.endswith(told) and out.count("--rates") == ("--rates" in told)
    assert recorded(tmp_path)["edge"] == edge


def test_collecting_runs_that_were_started_otherwise(call: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    call({0.01: [2.0, None], 0.003: [1.5, None], 0.001: "killed once"}, "--rates", "0.01,0.003,0.001")
    (tmp_path / "out" / "sweep.json").unlink()
    monkeypatch.setattr(sys, "argv", ["igpt-ds", "sweep", "--out", str(tmp_path / "out"), "--collect"])
    cli.main()
    assert [(t["rate"], t["status"]) for t in recorded(tmp_path)["rates"]] == [
        (0.01, "done"),
        (0.003, "done"),
        (0.001, "unfinished"),
    ]
    assert (recorded(tmp_path)["winner"], recorded(tmp_path)["edge"]) == (0.003, "smallest")  # of those that ended
    assert "best rate   0.003" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--"], "what to run is not told"),
        (["--", "probe", "x"], "what to run is not told"),
        (["--", "pretrain", "--run", "x"], "--run: cannot be a part of a search"),
        (["--", "pretrain", "x"], "RUN: cannot be a part of a search"),
        (["--", "finetune", "--test"], "--split test: cannot be a part of a search"),
        (["--", "pretrain", "--set", "training.learning_rate=1"], "the search sets it"),
        (["--rates", "0.001,0.01", "--", "pretrain"], "not numbers above 0 from large to small"),
        (["--rates", "fast", "--", "pretrain"], "not numbers above 0 from large to small"),
        (["--", "pretrain", "--preset", "xxl"], "preset xxl: there is none of this name"),
        (["--", "pretrain", "--preset", "tiny", "--set", "training.validate_every=0"], "without validation no rate"),
        (["--", "pretrain", "--preset", "tiny", "--set", "data.fold_validation=true"], "search before you fold"),
        (["--collect"], "no run in it"),
        (["--share", "2", "--", "pretrain"], "--help"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["igpt-ds", "sweep", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, errors = capsys.readouterr()
    assert (end.value.code, out, errors.count("\n")) == (2, "", 1), errors
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_the_parts() -> None:
    done = [Trial(0.01, "done", 9, 2.0, None, 5), Trial(0.003, "diverged", 3), Trial(0.001, "done", 9, 2.0, None, 5)]
    assert winner(done) == done[0]  # the largest of equals
    assert winner(done[1:2]) is None
    assert [rose(done[:n]) for n in range(4)] == [False, False, True, False]
    assert [folder(Path("d"), rate).name for rate in (1.0, 0.01, 0.0003, 3e-7)] == [
        "lr-1.0",
        "lr-0.01",
        "lr-0.0003",
        "lr-0.0000003",
    ]
    assert blind_guess(small_config()) == pytest.approx(math.log(8))
    tuned = small_config("finetune.classes=5", "finetune.generative_weight=0.5")
    assert blind_guess(tuned) == pytest.approx(0.5 * math.log(8) + math.log(5))
    line = sweep_table(summary(done)).text().splitlines()[1]
    assert line.split() == ["0.01", "done", "9", "2.0000", "5", "best"]


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_real_run(digits: Path, tmp_path: Path) -> None:
    training = ["pretrain", "--preset", "tiny", "--data", str(digits), "--set", "training.steps=10"]
    arguments = ["sweep", "--out", str(tmp_path / "out"), "--rates", "0.003", "--share", "0.5", "--", *training]
    text = run_command(arguments, tmp_path / "output.txt")
    (trial,) = recorded(tmp_path)["rates"]
    assert (trial["status"], trial["step"], trial["n"]) == ("done", 5, 67)
    assert 2.6 < trial["val_loss"] < math.log(16)
    assert "best rate   0.003" in text
