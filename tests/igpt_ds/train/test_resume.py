"""How a run comes to stand where it stands: decisions outlive a damaged line, and changes are told."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_ds.config.file import to_tree
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.run.directory import LOGGER, Run
from igpt_ds.run.metrics import read_metrics
from igpt_ds.train import resume as resume_module
from igpt_ds.train.begin import pretraining
from igpt_ds.train.job import Job, prepare
from igpt_ds.train.resume import Progress, check_identity, find_start, resume
from tests.helpers.checkpoints import FACTS, SHAPES, one_rank, save, shards_of
from tests.helpers.commands import pretrain
from tests.helpers.machines import CPU
from tests.helpers.ranks import run_ranks

ENGINE: Any = SimpleNamespace(
    ranks=Ranks(), device=torch.device("cpu"), state=SimpleNamespace(load=lambda *_, **__: None)
)
ROLLBACKS = [
    {"step": 4, "event": "rollback", "reason": "spikes", "left_out": [5, 7]},
    {"step": 4, "event": "rollback", "reason": "spikes", "left_out": [9, 11]},
]


@pytest.fixture
def job(digits: Path) -> Job:
    return prepare(pretraining("tiny", None, [str(digits)], ["training.validate_every=0", "training.steps=50"]), CPU)


def resumed(run: Run, job: Job, progress: dict[str, Any], lines: list[bytes], **changes: Any) -> Progress:
    """Resume from a checkpoint of step 12 with this progress, and with these lines of metrics."""
    run.create()
    config = to_tree(job.config)
    config["training"] |= changes
    facts = {**FACTS, "config": config, "progress": progress}
    save(run.checkpoints, 12, shards_of(0, 1), facts, 0, 1, one_rank)
    run.metrics.write_bytes(b"".join(line + b"\n" for line in lines))
    return resume(ENGINE, job, run, find_start(job, run, Ranks()))


def test_decisions_behind_a_damaged_line_are_obeyed(job: Job, tmp_path: Path) -> None:
    decisions = [json.dumps(line).encode() for line in ROLLBACKS]
    progress = resumed(Run(tmp_path), job, {}, [b'{"step": 1, "loss": 2.0}', b"\x00\x00", *decisions])
    assert progress.left_out.spans == ((5, 7), (9, 11))
    assert progress.rollbacks == [4, 4]


def test_a_run_whose_checkpoints_a_person_moved_does_not_start_over(job: Job, tmp_path: Path) -> None:
    run = Run(tmp_path)
    resumed(run, job, {}, [])
    own = run.checkpoints / "step-00000012"
    own.rename(tmp_path / "on-a-larger-disk")
    own.symlink_to(tmp_path / "on-a-larger-disk")
    with pytest.raises(UserError, match="no checkpoint of the run's own, but step-00000012: give one its name back"):
        check_identity(job, run)
    own.unlink()
    check_identity(job, run)  # there is nothing at all: a new run


@pytest.mark.parametrize("kept", [[], [0], [1], [0, 1]], ids=str)
def test_a_checkpoint_knows_the_decisions_before_it(job: Job, tmp_path: Path, kept: list[int]) -> None:
    """Whichever of their lines are damaged, none counts twice."""
    known = {"left_out": [[5, 7], [9, 11]], "rollbacks": [4, 4]}
    lines = [json.dumps(line).encode() if number in kept else b"{" for number, line in enumerate(ROLLBACKS)]
    progress = resumed(Run(tmp_path), job, known, lines)
    assert progress.left_out.spans == ((5, 7), (9, 11))
    assert progress.rollbacks == [4, 4]
    assert progress.record()["rollbacks"] == [4, 4]


def test_what_has_changed_is_told_in_one_line(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level("INFO", "igpt_ds")
    resumed(Run(tmp_path / "same"), job, {}, [])
    assert "changed since" not in caplog.text
    before = {"learning_rate": 0.1, "precision": "bfloat16", "steps": 40, "micro_batch": 8, "stop_at": 12}
    resumed(Run(tmp_path / "other"), job, {}, [], **before)
    assert caplog.messages[-1] == (
        "changed since then: training.steps from 40 to 50 (where the cosine of the learning rate ends), "
        "training.learning_rate from 0.1 to 0.003, training.precision from bfloat16 to float32, "
        "training.micro_batch from 8 to 16"
    )


def test_one_rank_looks_at_the_run_for_all(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    resumed(run, job, {}, [json.dumps(ROLLBACKS[0]).encode()])
    seen = find_start(job, run, Ranks())
    assert seen.checkpoint is not None and seen.checkpoint.step == 12
    assert seen.rollbacks == ROLLBACKS[:1] and set(seen.given) == set(SHAPES)
    for name in ("list_checkpoints", "read_rollbacks"):
        monkeypatch.setattr(resume_module, name, lambda *_: pytest.fail("only rank 0 looks"))
    told = iter([([seen.checkpoint.path], seen.rollbacks)])
    other: Any = SimpleNamespace(rank=1, world=2, any=one_rank, from_rank_0=lambda mine: next(told))
    found = find_start(job, run, other)
    assert found.checkpoint is not None and found.checkpoint.path == seen.checkpoint.path
    assert found.rollbacks == seen.rollbacks


@pytest.mark.parametrize("damage", ["one", "all"])
def test_where_no_checkpoint_is_whole_nothing_is_spared(job: Job, tmp_path: Path, damage: str) -> None:
    run = Run(tmp_path)
    assert find_start(job, run, Ranks()).given == ()
    resumed(run, job, {}, [])
    save(run.checkpoints, 20, shards_of(0, 1)[:1], FACTS, 0, 1, one_rank)
    for path in run.checkpoints.glob("step-*/rank-00000.safetensors"):
        if damage == "all" or path.parent.name == "step-00000020":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    if damage == "all":
        with pytest.raises(UserError, match="no checkpoint in it is whole"):
            find_start(job, run, Ranks())
    else:
        assert set(find_start(job, run, Ranks()).given) == set(SHAPES), "those of the older one"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ds", "world"), [("zero1", 2), ("zero3", 1)])
def test_a_resumed_run_draws_no_weights_and_its_losses_are_the_unbroken_ones(
    digits: Path, tmp_path: Path, ds: str, world: int
) -> None:
    def run(name: str, stop_at: int) -> set[str]:
        sets = ["--ds", ds, "--set", "training.steps=6", "--set", f"training.stop_at={stop_at}"]
        words = pretrain(digits, tmp_path / name, *sets, "--set", "training.validate_every=0")
        told = run_ranks("tests.workers.drawing", words, world, 150)
        return {found for text in told for found in re.findall(r"^drawn: (.*)$", text, re.MULTILINE)}

    # Two embeddings, the start, and four matrices in each of two layers.
    assert run("unbroken", 6) == {"11"}
    assert run("broken", 3) == {"11"}
    assert run("broken", 6) == {"0"}
    assert len(losses(tmp_path / "broken")) == 6
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
