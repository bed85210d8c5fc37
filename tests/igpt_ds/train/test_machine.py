"""What the machine decides, what a run keeps of it, and what another machine decides anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import load_config, to_toml
from igpt_ds.config.schema import Config
from igpt_ds.config.schema import replace as replace_in
from igpt_ds.errors import UserError
from igpt_ds.loading.splits import open_split
from igpt_ds.planner.choose import Decision, Here, decide
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import read_metrics
from igpt_ds.train import machine
from igpt_ds.train.begin import finetuning, pretraining
from igpt_ds.train.job import Job, prepare
from igpt_ds.train.machine import settle
from tests.helpers.commands import call
from tests.helpers.machines import CPU, GIB, H100, V100, several
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import run_ranks

ON_A_CPU = {"precision": "float32", "micro_batch": 32, "activation_checkpointing": "none", "compile": False}
ON_A_GPU = {"precision": "bfloat16", "micro_batch": 32, "activation_checkpointing": "none", "compile": True}
V100_ALONE = {**ON_A_GPU, "precision": "float32"}


def played(config: Config, ds: dict[str, Any] | None, here: Here) -> Decision:
    """A planner with a will of its own, that tests may know."""
    recipe, scarce = config.training, here.memory < GIB
    share = recipe.batch // here.ranks // (2 if scarce else 1)
    chosen = {
        "precision": "bfloat16" if here.bf16 else "float32",
        "micro_batch": share,
        "activation_checkpointing": "full" if scarce else "none",
        "compile": here.gpu and here.compiles,
    }
    chosen = {
        name: value if getattr(recipe, name) == "auto" else getattr(recipe, name) for name, value in chosen.items()
    }
    stage = "" if ds else "zero1" if chosen["precision"] == "bfloat16" else "zero0"
    line = f"{here.ranks} x {here.name}: {stage}, {chosen}"
    return Decision(replace_in(config, "training", **chosen), ds or load_ds_config(stage), stage, line)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "decide", played)


class Begun:
    """A run directory, written as a training writes it, by commands on played machines."""

    def __init__(self, path: Path, data: Path):
        self.run, self.data = Run(path), str(data)
        path.mkdir()

    def command(
        self, here: Here, *sets: str, preset: str | None = "tiny", ds: str | None = None, fresh: bool = False
    ) -> Job:
        """What `pretrain RUN` would train; then RUN tells it."""
        data = [self.data] if preset else []
        job = prepare(pretraining(preset, self.run, data, ["training.batch=32", *sets], ds, fresh=fresh), here)
        job.record(self.run)
        return job


@pytest.fixture
def begun(planner: None, tmp_path: Path, digits: Path) -> Begun:
    return Begun(tmp_path / "run", digits)


def values(job: Job) -> dict[str, Any]:
    recipe = job.config.training
    return {name: getattr(recipe, name) for name in ON_A_CPU}


def stage(job: Job) -> int:
    return int(job.ds["zero_optimization"]["stage"])


@pytest.mark.parametrize(
    ("here", "expected", "zero"),
    [
        (CPU, ON_A_CPU, 0),
        (H100, ON_A_GPU, 1),
        (V100, V100_ALONE, 0),
        (replace(H100, compiles=False), {**ON_A_GPU, "compile": False}, 1),
        (several(CPU, 4), {**ON_A_CPU, "micro_batch": 8}, 0),
    ],
    ids=["CPU", "H100", "V100", "H100 without a compiler", "4 x CPU"],
)
def test_a_machine_decides_what_is_left_to_it(begun: Begun, here: Here, expected: dict[str, Any], zero: int) -> None:
    job = begun.command(here)
    assert (values(job), stage(job)) == (expected, zero)
    assert job.division.micro_batch == expected["micro_batch"]
    assert job.ds["bf16"]["enabled"] is (expected["precision"] == "bfloat16")
    assert job.how == f"{here.ranks} x {here.name}: zero{zero}, {expected}"
    # All of it can be read in the run directory.
    assert values(replace(job, config=load_config(begun.run.config))) == expected
    assert json.loads(begun.run.ds_config.read_text())["zero_optimization"]["stage"] == zero


def test_what_is_named_is_not_decided(begun: Begun) -> None:
    named = ["precision=float32", "micro_batch=4", "activation_checkpointing=selective", "compile=false"]
    job = begun.command(H100, *(f"training.{each}" for each in named), ds="zero2")
    expected = {"precision": "float32", "micro_batch": 4, "activation_checkpointing": "selective", "compile": False}
    assert (values(job), stage(job)) == (expected, 2)
    assert "decided" not in json.loads(begun.run.ds_config.read_text())


@pytest.mark.parametrize("preset", ["tiny", None])
def test_a_resume_keeps_what_was_decided(begun: Begun, preset: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = begun.command(H100)
    # Whatever the planner would decide now: a newer one, say, or with the memory that is free at the moment.
    less = replace(H100, memory=int(0.95 * H100.memory))
    for here in (H100, less, H100):
        after = begun.command(here, preset=preset)
        assert (values(after), stage(after), after.decided) == (values(before), 1, before.decided)
        assert "anew" not in after.how
    # And not the choice of another day.
    kept = {**before.decided["values"], "micro_batch": 8, "activation_checkpointing": "full", "ds": "zero2"}
    _rewrite(begun.run, kept)
    for _ in range(2):
        after = begun.command(H100, preset=preset)
        assert (after.config.training.micro_batch, after.config.training.activation_checkpointing) == (8, "full")


def _rewrite(run: Run, kept: dict[str, Any]) -> None:
    """As if another planner had decided these values when the run began."""
    config = load_config(run.config, [(f"training.{name}", value) for name, value in kept.items() if name != "ds"])
    run.config.write_text(to_toml(config))
    content = json.loads(run.ds_config.read_text())
    content["decided"]["values"] = kept
    run.ds_config.write_text(json.dumps(content))


@pytest.mark.parametrize("preset", ["tiny", None])
def test_what_a_resume_names_wins_and_the_rest_stays(begun: Begun, preset: str | None) -> None:
    begun.command(H100)
    named = begun.command(H100, "training.micro_batch=8", "training.compile=false", preset=preset, ds="zero3")
    assert (values(named), stage(named)) == ({**ON_A_GPU, "micro_batch": 8, "compile": False}, 3)
    # From then on they belong to the run, on any machine, however it goes on.
    for here in (H100, several(H100, 2)):
        after = begun.command(here, preset=preset)
        assert (after.config.training.micro_batch, after.config.training.compile, stage(after)) == (8, False, 3)
    # Until they are left to the machine again.
    again = begun.command(H100, "training.micro_batch=auto", "training.compile=auto", preset=preset, ds="auto")
    assert (values(again), stage(again)) == (ON_A_GPU, 1)
    assert set(again.decided["values"]) == {*ON_A_GPU, "ds"}


@pytest.mark.parametrize("preset", ["tiny", None])
def test_another_machine_decides_its_part_anew_and_says_so(begun: Begun, preset: str | None) -> None:
    begun.command(H100)
    two = begun.command(several(H100, 2), preset=preset)
    assert values(two) == {**ON_A_GPU, "micro_batch": 16}
    assert two.how.startswith(f"decided anew, as the run was on 1 x {H100.name}, 1 a node: 2 x {H100.name}: ")
    assert "anew" not in begun.command(several(H100, 2), preset=preset).how
    # Neither the identity of its checkpoints nor the recipe has changed.
    one = begun.command(H100, preset=preset)
    assert one.identity() == two.identity()
    assert one.config == replace(two.config, training=replace(two.config.training, micro_batch=32))


def test_a_node_without_a_compiler_does_not_compile(begun: Begun) -> None:
    begun.command(H100)
    without = begun.command(replace(H100, compiles=False))
    assert values(without) == {**ON_A_GPU, "compile": False}
    assert without.how.startswith("decided anew, as there was a compiler: ")
    # What is named is not decided otherwise: `require_device` will refuse it.
    begun.command(H100, "training.compile=true")
    assert begun.command(replace(H100, compiles=False)).config.training.compile is True


def test_less_memory_is_another_machine(begun: Begun) -> None:
    assert begun.command(replace(CPU, memory=2 * GIB)).config.training.micro_batch == 32
    # Less, and a tenth less, with which all stays as it was.
    for memory in (1.9, 1.5):
        assert "anew" not in begun.command(replace(CPU, memory=int(memory * GIB))).how
    begun.command(replace(CPU, memory=2 * GIB), fresh=True)
    after = begun.command(replace(CPU, memory=GIB // 2))
    assert (after.config.training.micro_batch, after.config.training.activation_checkpointing) == (16, "full")
    assert after.how.startswith("decided anew, as a rank had 2 GiB: 1 x CPU: ")
    # More of it is the same one: the run keeps what it has.
    assert begun.command(replace(CPU, memory=2 * GIB)).config.training.micro_batch == 16


@pytest.mark.parametrize("preset", ["tiny", None])
def test_the_precision_stays_with_the_run(begun: Begun, preset: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.command(CPU)
    on_gpu = begun.command(H100, preset=preset)
    assert values(on_gpu) == {**ON_A_GPU, "precision": "float32"}
    asked = begun.command(H100, "training.precision=bfloat16", preset=preset)
    assert (values(asked), stage(asked)) == (ON_A_GPU, 1)  # ZeRO-0 takes no bfloat16: it is decided anew
    assert asked.how.startswith(f"decided anew, as the run was in float32: 1 x {H100.name}: zero1")
    monkeypatch.setattr(machine, "decide", decide)  # the planner itself refuses
    with pytest.raises(UserError, match=r"training\.precision=bfloat16: Tesla V100.*: set training\.precision=float32"):
        begun.command(V100, preset=preset)
    assert values(begun.command(V100, "training.precision=float32", preset=preset))["precision"] == "float32"


@pytest.mark.parametrize("preset", ["tiny", None])
def test_what_a_person_changes_in_the_run_is_named(begun: Begun, preset: str | None) -> None:
    begun.command(H100)
    text = begun.run.config.read_text()
    assert "micro_batch = 32" in text
    begun.run.config.write_text(text.replace("micro_batch = 32", "micro_batch = 8"))
    job = begun.command(several(H100, 2), preset=preset)
    assert values(job) == {**ON_A_GPU, "micro_batch": 8}
    assert "micro_batch" not in job.decided["values"]


def test_another_batch_has_another_micro_batch(begun: Begun) -> None:
    begun.command(H100)
    after = begun.command(H100, "training.batch=48")
    assert (after.division.batch, after.division.micro_batch) == (48, 48)
    assert after.how.startswith("decided anew, as micro-batches of 32 do not divide a rank's images: ")
    begun.command(H100, "training.batch=48", "training.micro_batch=16")
    with pytest.raises(UserError, match=r"training\.micro_batch=16: does not divide the 40 images"):
        begun.command(H100, "training.batch=40")


def test_a_run_that_begins_anew_decides_anew(begun: Begun) -> None:
    begun.command(CPU)
    for preset in ("tiny", None):
        job = begun.command(H100, preset=preset, fresh=True)
        assert (values(job), stage(job)) == (ON_A_GPU, 1)
        assert "anew" not in job.how
        begun.command(CPU, fresh=True)


# --- runs from before the machine decided ----------------------------------------------------------------------------


def old(begun: Begun, *sets: str, ds: str = "zero3") -> dict[str, Any]:
    """A run directory as it was: everything in config.toml but the micro-batch, where it was not set."""
    named = ["precision=float32", "activation_checkpointing=full", "compile=false"]
    job = begun.command(CPU, *(f"training.{each}" for each in named), *sets, ds=ds)
    lines = begun.run.config.read_text().splitlines(keepends=True)
    if not any("micro_batch" in each for each in sets):
        lines = [line for line in lines if not line.startswith("micro_batch")]
    begun.run.config.write_text("".join(lines))
    assert "decided" not in json.loads(begun.run.ds_config.read_text()) or "micro_batch" not in "".join(lines)
    content = json.loads(begun.run.ds_config.read_text())
    content.pop("decided", None)
    begun.run.ds_config.write_text(json.dumps(content))
    return {**values(job), "micro_batch": 32}


@pytest.mark.parametrize("preset", ["tiny", None])
@pytest.mark.parametrize("here", [CPU, replace(CPU, memory=GIB // 2), H100, V100], ids=lambda here: here.name)
def test_an_older_run_goes_on_as_it_was(begun: Begun, here: Here, preset: str | None) -> None:
    before = old(begun)
    for _ in range(2):  # and again after it was written anew
        job = begun.command(here, preset=preset)
        assert (values(job), stage(job)) == (before, 3)
    assert "decided" not in json.loads(begun.run.ds_config.read_text())


def test_an_older_run_on_other_ranks_divides_its_batch_anew(begun: Begun) -> None:
    before = old(begun)
    assert values(begun.command(several(CPU, 2))) == {**before, "micro_batch": 16}


def test_an_older_runs_own_micro_batch_stays(begun: Begun) -> None:
    old(begun, "training.micro_batch=4", ds="zero2")
    job = begun.command(H100, preset=None)
    assert (job.division.micro_batch, job.division.accumulation, stage(job)) == (4, 8, 2)


def test_a_run_without_its_configuration_keeps_its_deepspeed_configuration(begun: Begun) -> None:
    begun.command(CPU, ds="zero1")
    begun.run.config.unlink()
    assert stage(begun.command(CPU)) == 1
    assert stage(begun.command(CPU, ds="zero2")) == 2


MACHINE = {"name": "CPU", "ranks": "x", "ranks_per_node": 1, "memory_gib": 1}


@pytest.mark.parametrize(
    "damaged", [3, [], {"values": 3}, {"values": {"micro_batch": 32}}, {"values": {"ds": ""}, "machine": MACHINE}]
)
def test_a_damaged_record_is_a_line(begun: Begun, damaged: Any) -> None:
    begun.command(CPU)
    content = json.loads(begun.run.ds_config.read_text())
    begun.run.ds_config.write_text(json.dumps({**content, "decided": damaged}))
    with pytest.raises(UserError, match=r"ds\.json: its decided cannot be read: delete it"):
        begun.command(CPU)
    begun.command(CPU, fresh=True)


# --- others that prepare a training -----------------------------------------------------------------------------------


def test_a_fine_tuning_leaves_the_machines_part_to_its_own_machine(planner: None, tmp_path: Path, digits: Path) -> None:
    named = ("training.precision=bfloat16", "training.micro_batch=4", "training.activation_checkpointing=full")
    config = small_config(*named, "training.compile=true", resolution=8, palette_size=16)
    save_model(random_model(config), config, tmp_path / "run", open_split(str(digits), "train").palette.sha256)
    job = prepare(finetuning(tmp_path / "run", None, None, str(digits), []), CPU)
    assert values(job) == {**ON_A_CPU, "micro_batch": 16}


def test_print_config_tells_the_runs_values_and_auto_of_a_preset(
    begun: Begun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "pretrain", "--preset", "xl", "--print-config") == 0
    assert 'precision = "auto"' in (text := capsys.readouterr().out) and 'micro_batch = "auto"' in text
    begun.command(H100)
    assert call(monkeypatch, "pretrain", begun.run.path, "--print-config") == 0
    assert 'precision = "bfloat16"' in (text := capsys.readouterr().out) and "micro_batch = 32" in text
    assert not list_checkpoints(begun.run.checkpoints)


@pytest.mark.distributed
def test_ranks_that_read_another_memory_each_decide_alike(digits: Path, tmp_path: Path) -> None:
    """The planner itself on two real ranks, where each of them alone would decide otherwise."""
    two = several(CPU, 2)

    def micro_batch(memory: int) -> int:
        asked = pretraining("tiny", None, [], ["data.resolution=8", "data.palette_size=16"])
        return settle(asked, replace(two, memory=memory)).division.micro_batch

    plenty, scarce = CPU.memory, next(size for size in range(2**23, 0, -(2**16)) if micro_batch(size) < 8)
    run, sets = tmp_path / "run", ["--set", "training.steps=4", "--set", "training.validate_every=0"]
    for readings in ((plenty, scarce), (scarce, plenty)):
        words = ["pretrain", str(run), "--preset", "tiny", "--data", str(digits), *sets, "--fresh", "--force"]
        texts = run_ranks("tests.workers.machine", [",".join(map(str, readings)), *words], 2, 200)
        assert settle(pretraining(None, Run(run), [], []), replace(two, memory=scarce)).how in texts[0]
        decided = json.loads((run / "ds.json").read_text())["decided"]
        assert decided["values"]["micro_batch"] == micro_batch(scarce) < 8
        assert decided["machine"]["memory_gib"] == scarce // GIB
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    # And again: the run keeps it, whatever they read.
    texts = run_ranks(
        "tests.workers.machine", [f"{plenty},{plenty}", "pretrain", str(run), "--set", "training.steps=6"], 2, 200
    )
    assert "anew" not in texts[0] and f"x {micro_batch(scarce)} x" in texts[0]
