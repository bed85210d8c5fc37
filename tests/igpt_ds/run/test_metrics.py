"""metrics.jsonl, TensorBoard events and Weights & Biases: no step twice, whatever killed the run."""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from igpt_ds.errors import RunError, UserError
from igpt_ds.lock import Lock
from igpt_ds.run import metrics
from igpt_ds.run.metrics import Metrics, read_metrics, read_rollbacks

LINES = [{"step": step, "loss": 1 / step, "lr": 0.001 * step, "mfu": None} for step in range(1, 8)]


def record(run: Path, step: int, lines: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    metrics = Metrics(run, step, {"seed": 1})
    for line in lines:
        metrics.write(line)
    metrics.close()


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run / "events"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_lines_are_read_back_and_one_cut_short_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    record(tmp_path, 0, LINES)
    assert read_metrics(path) == LINES
    whole = path.read_text()
    assert [json.loads(line) for line in whole.splitlines()] == LINES
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(2, last + 1):
        path.write_text(whole[:-cut])
        assert read_metrics(path) == LINES[:-1], cut


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, {})
    for i, line in enumerate(LINES):
        metrics.write(line)
        assert read_metrics(tmp_path / "metrics.jsonl") == LINES[: i + 1]
    metrics.close()


def test_a_resumed_run_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    record(tmp_path, 0, [*LINES[:4], {"step": 4, "val_loss": 0.5}, *LINES[4:]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    again = [{**line, "loss": 9.0} for line in LINES[4:6]]
    record(tmp_path, 4, again)
    assert read_metrics(tmp_path / "metrics.jsonl") == [*LINES[:4], {"step": 4, "val_loss": 0.5}, *again]


def test_a_fresh_start_drops_every_line(tmp_path: Path) -> None:
    record(tmp_path, 0, LINES)
    record(tmp_path, 0, LINES[:2])
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES[:2]


def test_tensorboard_shows_the_same_figures(tmp_path: Path) -> None:
    record(tmp_path, 0, [*LINES, {"step": 7, "val_loss": 0.25}])
    for key in ("loss", "lr"):
        found = scalars(tmp_path, key)
        assert [step for step, _ in found] == list(range(1, 8))
        assert [value for _, value in found] == pytest.approx([line[key] for line in LINES])
    assert scalars(tmp_path, "val_loss") == [(7, 0.25)]
    with pytest.raises(KeyError):
        scalars(tmp_path, "mfu")  # unknown on this device


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, LINES)
    record(tmp_path, 4, [{"step": step, "loss": 9.0} for step in (5, 6)])
    steps, losses = zip(*scalars(tmp_path, "loss"), strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    assert losses == pytest.approx((1, 1 / 2, 1 / 3, 1 / 4, 9, 9))


def test_an_unwritable_directory_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another path"):
        Metrics(tmp_path / "file", 0, {})


def test_wandb_that_is_not_installed_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as caught:
        Metrics(tmp_path, 0, {}, wandb_project="images")
    assert "\n" not in str(caught.value)
    assert "pip install" in str(caught.value)


def test_wandb_gets_every_line_under_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    started: dict[str, Any] = {}
    ended: list[bool] = []

    class FakeRun:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            ended.append(True)

    def init(**kwargs: Any) -> FakeRun:
        started.update(kwargs)
        return FakeRun()

    fake = types.ModuleType("wandb")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics = Metrics(tmp_path / "my-run", 0, {"seed": 1}, wandb_project="images")
    metrics.write({"step": 3, "loss": 0.5})
    metrics.close()
    assert started["project"] == "images"
    assert started["config"] == {"seed": 1}
    assert started["resume"] == "allow"
    assert logged == [(3, {"loss": 0.5})]
    assert ended == [True]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the wandb extra is not installed")
def test_wandb_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = Metrics(tmp_path, 0, {"seed": 1}, wandb_project="images")
    metrics.write({"step": 1, "loss": 0.5})
    metrics.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


ROLLBACK = {"step": 2, "event": "rollback", "reason": "spikes", "left_out": [4, 6]}
DAMAGED = [
    b'{"step": 3, "loss": 0.3\x00\x00\n',
    b"\x00\x00\x00\n",
    b"\xff\xfe\x00\n",
    b"42\n",
    b"null\n",
    b'{"loss": 1}\n',
    b'{"step": "3"}\n',
    b'{"step": true}\n',
    b'{"step": 3.5}\n',
    b'{"step": -1}\n',
    b'{"step": 3, "loss": "low"}\n',
    b'{"step": 3, "loss": NaN}\n',
    b'{"step": 3, "loss": 1e999}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"[" * 100_000 + b"\n",
    b'{"step": 2, "event": "rollback", "left_out": [4]}\n',
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named_and_all_others_stay(tmp_path: Path, damaged: bytes) -> None:
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    record(tmp_path, 0, [*LINES, ROLLBACK])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damaged, b"\n", *lines[3:]]))
    kept = [*LINES[:2], *LINES[3:], ROLLBACK]
    assert read_metrics(path, warnings.append) == kept
    (warning,) = warnings
    assert warning.startswith(f"{path}: line 3 is passed over: damaged (") and "\n" not in warning
    before = path.read_bytes()
    record(tmp_path, 7, [])
    assert path.read_bytes() == before, "nothing lies beyond the checkpoint: nothing is rewritten"
    record(tmp_path, 5, [])
    assert read_metrics(path, lambda text: None) == [line for line in kept if line["step"] <= 5]
    assert damaged in path.read_bytes(), "it stays for a person to mend"


@pytest.mark.parametrize("rest", [b"\xff\xfe\x00", b'{"step": 8, "lo', b"\x00" * 50, b"[" * 100_000])
def test_what_a_killed_run_left_of_a_line_goes(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    record(tmp_path, 0, LINES)
    with path.open("ab") as file:
        file.write(rest)
    assert read_metrics(path, pytest.fail) == LINES
    record(tmp_path, 7, [{"step": 8, "loss": 0.5}])
    assert read_metrics(path, pytest.fail) == [*LINES, {"step": 8, "loss": 0.5}]
    # A whole line that lacks its end alone is a line.
    path.write_bytes(path.read_bytes()[:-1])
    record(tmp_path, 8, [])
    assert read_metrics(path, pytest.fail) == [*LINES, {"step": 8, "loss": 0.5}]
    assert path.read_bytes().endswith(b"}\n")


def test_what_is_no_file_is_told_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_metrics(tmp_path / name)


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    record(tmp_path, 0, [{"step": 1, "val_loss": math.nan, "val_bits": math.inf, "loss": -math.inf, "lr": 0.5}])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        **dict.fromkeys(("val_loss", "val_bits", "loss")),
        "step": 1,
        "lr": 0.5,
    }
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["val_loss"] is None


def test_who_lost_the_run_writes_no_line(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path)
    metrics = Metrics(tmp_path, 0, {}, lock=lock)
    metrics.write(LINES[0])
    lock.path.unlink()
    for action in (lambda: metrics.write(LINES[1]), lambda: metrics.rewind(0)):
        with pytest.raises(RunError, match="owns it no longer"):
            action()
    lock.release()
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES[:1]


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' + "x\n" for n in range(1, 41)))
    told: list[str] = []
    assert len(read_metrics(tmp_path / "metrics.jsonl", told.append)) == 40
    assert len(told) == 11 and told[-1].endswith("30 more damaged lines are passed over")


def _rewound(data: bytes, step: int) -> bytes:
    """What rewinding means, line by line: the reference."""
    kept = b""
    for raw in io.BytesIO(data):
        try:
            line = json.loads(raw) if raw.strip() else {"step": 0}
        except ValueError:
            line = None
        if line is None and not raw.endswith(b"\n"):
            continue
        if line is None or "event" in line or line["step"] <= step:
            kept += raw if raw.endswith(b"\n") else raw + b"\n"
    return kept


@pytest.mark.parametrize("seed", range(40))
def test_rewinding_is_that_of_a_reader_of_all_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Lines in order, decisions, damaged and blank ones among them, the last perhaps half written."""
    draw = random.Random(seed)
    monkeypatch.setattr(metrics, "_LOOK", draw.choice([1, 40, 200, 1 << 18]))
    lines, step = [], 0
    for _ in range(60):
        step += draw.random() < 0.9
        lines.append(json.dumps({"step": step, "loss": draw.random()}).encode() + b"\n")
        if draw.random() < 0.2:
            event = {"step": draw.randint(0, step), "event": draw.choice(["spike", "skipped"]), "reason": "x" * 30}
            lines.append(draw.choice([json.dumps(event).encode() + b"\n", b"\0\0\n", b"\n", b'{"step": 3, "lo\n']))
    data = b"".join(lines)
    data = data[: len(data) - draw.choice([0, 1, 10, 30])]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    before = path.stat().st_ino
    back = draw.choice([0, step // 2, step - 1, step])
    record(tmp_path, back, [])
    assert path.read_bytes() == _rewound(data, back)
    assert path.stat().st_ino == before, "what stands is not written again"
    assert not (tmp_path / "metrics.cut").exists()


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours may catch it."""


@pytest.mark.parametrize("moment", range(7))
def test_a_run_that_is_killed_while_it_rewinds_loses_no_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    record(tmp_path, 0, [*LINES[:4], ROLLBACK, *LINES[4:], {**ROLLBACK, "left_out": [8, 9]}])
    expected = _rewound(path.read_bytes(), 3)
    calls = iter(range(100))

    def fragile(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == moment:
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    class FragileFile(io.FileIO):
        def truncate(self, size: int | None = None) -> int:
            if next(calls) == moment:
                raise Killed
            return super().truncate(size)

        def write(self, data: Any) -> int:
            if next(calls) == moment:
                super().write(bytes(data)[: len(data) // 2])
                raise Killed
            return super().write(data)

    def opened(name: Any, mode: str = "r", **options: Any) -> Any:
        # Unbuffered, so that each write is one, and can be cut short.
        return FragileFile(name, mode) if mode == "rb+" else open(name, mode, **options)

    with monkeypatch.context():
        for name in ("fsync", "replace", "unlink"):
            fragile(os, name)
        monkeypatch.setattr(metrics, "open", opened, raising=False)
        with contextlib.suppress(Killed):
            metrics.Metrics(tmp_path, 3, {})
        fired = next(calls) > moment
        monkeypatch.undo()
    assert fired, "there are fewer moments"
    assert [line["left_out"] for line in read_rollbacks(path)] == [[4, 6], [8, 9]]
    record(tmp_path, 3, [])
    assert path.read_bytes() == expected


def test_a_plan_of_another_file_is_refused(tmp_path: Path) -> None:
    record(tmp_path, 0, LINES)
    for text in ("100000\nrest", "-1\n", "x", ""):
        (tmp_path / "metrics.cut").write_text(text)
        with pytest.raises(UserError, match=r"metrics.cut: damaged .*: delete it"):
            record(tmp_path, 3, [])
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES


def test_rollbacks_are_found_without_parsing_what_tells_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PIECE", 4096)
    path, parsed, warnings = tmp_path / "metrics.jsonl", list[bytes](), list[str]()
    spike = {"step": 500, "event": "spike", "reason": "x"}
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 2001)]
    lines[300] += json.dumps(ROLLBACK).encode() + b"\n"
    lines[500] += json.dumps(spike).encode() + b"\n"
    lines[1900] += json.dumps({**ROLLBACK, "left_out": [8, 9]}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    real = metrics._parsed
    monkeypatch.setattr(metrics, "_parsed", lambda raw: (parsed.append(raw), real(raw))[1])
    assert [line["left_out"] for line in read_rollbacks(path, warnings.append)] == [[4, 6], [8, 9]]
    assert len([raw for raw in parsed if raw.strip()]) == 3 and not warnings
    # Damage is seen by the look of the lines, and costs the parsing of its neighbours alone.
    lines[1000] = lines[1000][:9] + b"\0" + lines[1000][10:]
    lines[1500] = lines[1500][:9] + b"\n"
    path.write_bytes(b"".join(lines))
    parsed.clear()
    assert [line["left_out"] for line in read_rollbacks(path, warnings.append)] == [[4, 6], [8, 9]]
    assert [warning.split(" is passed")[0] for warning in warnings] == [f"{path}: line 1003", f"{path}: line 1503"]
    assert len(parsed) < 600
    full: list[str] = []
    monkeypatch.undo()
    read_metrics(path, full.append)
    assert full == warnings


def test_one_line_whose_step_is_too_low_does_not_hide_what_lies_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_LOOK", 300)
    lines = [{"step": step, "loss": 0.5} for step in range(1, 101)]
    lines[79]["step"] = 8
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record(tmp_path, 50, [])
    assert read_metrics(tmp_path / "metrics.jsonl") == [*lines[:50], lines[79]]
