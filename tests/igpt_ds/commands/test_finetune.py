"""`igpt-ds finetune` as it is called: killed and resumed, ended early, its best checkpoint, its result; bad input."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ds import cli
from igpt_ds.checkpoint.names import list_checkpoints
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.file import from_tree, load_config
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.dataset.subset import Subset, balanced
from igpt_ds.errors import UserError
from igpt_ds.features.extract import load_model
from igpt_ds.loading.augment import crop_and_flip
from igpt_ds.loading.loader import MicroBatches, shard_labels
from igpt_ds.loading.order import LeftOut
from igpt_ds.objectives import load_objective
from igpt_ds.run.metrics import read_metrics
from igpt_ds.train import begin
from igpt_ds.train.job import prepare
from igpt_ds.train.resume import Progress
from igpt_ds.train.stability import Stability
from tests.helpers.commands import kill_all, run_command, started, wait_until
from tests.helpers.machines import CPU
from tests.helpers.models import random_model, save_model, small_config
from tests.igpt_ds.loading.test_loader import build

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a test split."""
    folder = tmp_path_factory.mktemp("data")
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        shutil.copytree(digits / source, folder / split)
    return folder


@pytest.fixture(scope="module")
def starts(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-training of each objective: next_pixel/ and masked_pixel/."""
    folder = tmp_path_factory.mktemp("starts")
    palette = Palette.load(digits / "train" / "palette.npy")
    for objective in ("next_pixel", "masked_pixel"):
        config = small_config(f"objective.name={objective}", "seed=1", resolution=8, palette_size=16)
        save_model(random_model(config), config, folder / objective, palette.sha256)
    return folder


def finetune(start: Path, data: Path, run: Path, *sets: str) -> list[str]:
    options = [word for text in sets for word in (("--set", text) if "=" in text else (text,))]
    return ["finetune", str(run), "--from", str(start), "--data", str(data), *options]


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if key in line]


def accuracy(checkpoint: Path, dataset: Dataset) -> float:
    """Of a checkpoint's network, all images at once, without DeepSpeed."""
    found = Checkpoint.open(checkpoint)
    config = from_tree(found.config, "test")
    tokens, positions = torch.from_numpy(dataset.images().astype(np.int64)), torch.arange(dataset.rows)
    with torch.no_grad():
        output = load_model(config, found)(
            tokens,
            load_objective(config.objective.name).mask(tokens, positions, config.seed, config.objective.mask_rate),
        )
    return float((output.class_logits_BC.argmax(1).numpy() == dataset.labels()).mean())


# --- runs --------------------------------------------------------------------------------------------------------

LENGTH = ("training.steps=24", "training.validate_every=6", "training.log_every=1", "checkpoint.every=4")
RECIPE = ("training.learning_rate=0.003", "finetune.dropout=0.1", "finetune.augmentation=crop_flip")


@pytest.mark.distributed
def test_killed_and_started_again_gives_the_same_run(data: Path, starts: Path, tmp_path: Path) -> None:
    more = (*LENGTH, *RECIPE, "checkpoint.keep=1", "--split", "test")
    command = finetune(starts / "next_pixel", data, tmp_path / "run", *more)
    run_command(command, tmp_path / "output.txt")
    (tmp_path / "run").rename(tmp_path / "whole")
    run, whole, output = tmp_path / "run", tmp_path / "whole", tmp_path / "output.txt"

    with started(command, output) as process:
        wait_until(lambda: len(lines(run, "loss")) >= 10, process, output)
        kill_all(process)
    before = len(lines(run, "loss"))
    assert 10 <= before < 24 and not (run / "result.json").exists(), "killed too late"
    text = run_command(command, output)
    assert "resumed from" in text

    for key in ("loss", "gen_loss", "clf_loss", "accuracy", "lr", "grad_norm"):
        assert [line[key] for line in lines(run, "loss")] == [line[key] for line in lines(whole, "loss")]
    assert {line["lr"] for line in lines(run, "loss")} == {0.003}
    assert lines(run, "val_loss") == lines(whole, "val_loss")
    assert (run / "result.json").read_bytes() == (whole / "result.json").read_bytes()

    # The best validation, the first of equals, is kept beside the newest, and is what was tested.
    validations = lines(whole, "val_loss")
    assert [line["step"] for line in validations] == [6, 12, 18, 24]
    best = max(validations, key=lambda line: line["val_accuracy"])
    result = json.loads((whole / "result.json").read_text())
    kept = [path.name for path in list_checkpoints(whole / "checkpoints")]
    assert kept == sorted({f"step-{best['step']:08d}", "step-00000024"})
    test_set = Dataset.open(data / "test")
    mine = accuracy(whole / "checkpoints" / f"step-{best['step']:08d}", test_set)
    assert (result["kind"], result["split"], result["n"]) == ("finetune", "test", test_set.rows)
    assert result["accuracy"] == pytest.approx(mine) == pytest.approx(best["val_accuracy"])
    assert result["best_step"] == best["step"]
    assert result["from"] == {"checkpoint": str(starts / "next_pixel/checkpoints/step-00000007"), "step": 7}
    # A beginning from the weights: the first step's loss is the start's, and a class is guessed blindly.
    first = lines(whole, "loss")[0]
    assert first["clf_loss"] == pytest.approx(np.log(10), abs=1e-6)
    assert first["loss"] == pytest.approx(first["gen_loss"] + first["clf_loss"], rel=1e-6)


@pytest.mark.distributed
def test_a_run_that_gets_no_better_ends_early_and_stays_ended(data: Path, starts: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    sets = ("training.steps=50", "training.validate_every=2", "finetune.patience=3", "training.learning_rate=1e-12")
    command = finetune(starts / "masked_pixel", data, run, *sets, "--from-scratch")
    text = run_command(command, output)
    assert "ended early" in text
    assert [line["step"] for line in lines(run, "val_loss")] == [2, 4, 6, 8]
    result = json.loads((run / "result.json").read_text())
    assert (result["best_step"], result["steps"], result["split"], result["from"]) == (2, 8, "val", None)
    assert result["masks"]["count"] == 5 and 0 <= result["masks"]["accuracy"] <= 1  # as the paper has it, unasked
    assert result["generative_weight"] == 0 and "val_gen_loss" not in lines(run, "val_loss")[0]
    assert result["accuracy"] == pytest.approx(
        accuracy(run / "checkpoints" / "step-00000002", Dataset.open(data / "val"))
    )
    content = (run / "result.json").read_bytes()
    (run / "result.json").unlink()  # as if killed before it was written
    assert "nothing to do" in run_command(["finetune", str(run)], output)
    assert (run / "result.json").read_bytes() == content


# --- parts -------------------------------------------------------------------------------------------------------


def test_early_stopping_on_known_accuracies() -> None:
    config = small_config("finetune.classes=2", "finetune.patience=2")
    progress = Progress(0, LeftOut(), Stability(config.health, {}))
    told = []
    for step, value in enumerate([0.3, 0.5, 0.5, 0.6, 0.2, 0.6], start=1):
        progress.step = step
        told.append((progress.note_validation(value), progress.ended_early(config)))
    assert [best for best, _ in told] == [True, True, False, True, False, False]
    assert [ended for _, ended in told] == [False, False, False, False, False, True]
    assert progress.best == (4, 0.6)
    assert json.loads(json.dumps(progress.record()))["best"] == [4, 0.6]
    assert not progress.ended_early(small_config("finetune.patience=0"))
    assert not progress.ended_early(small_config())  # a pre-training


def test_batches_have_the_labels_of_their_rows_in_every_view(tmp_path: Path) -> None:
    dataset = build(tmp_path / "data", [(7, 0), (3, 0), (5, 1), (5, 1)], labelled=True, resolution=6)
    labels = shard_labels(dataset)
    assert [part.tolist() for part in labels] == [[*range(7)], [7, 8, 9], [*range(5)], [*range(5, 10)]]
    from igpt_ds.loading.loader import source_rows
    from igpt_ds.loading.order import Order

    order = Order(4, [source_rows(dataset)], None, 2)

    def augment(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return crop_and_flip(tokens, positions, seed=9)

    cut = [{"micro_batch": 4, "rank": 0, "world": 1}, *({"micro_batch": 2, "rank": r, "world": 2} for r in (0, 1))]
    whole, *halves = (
        next(MicroBatches([dataset], order, batch=4, labels=[labels], augment=augment, **each).read([3]))
        for each in cut
    )
    places = [order(position) for position in range(12, 16)]
    assert whole["labels"].tolist() == [labels[shard][row] for _, shard, row in places]
    plain = np.stack([dataset.read(shard, row) for _, shard, row in places])
    np.testing.assert_array_equal(whole["tokens"], crop_and_flip(plain, np.arange(12, 16), seed=9))
    for name in ("tokens", "labels", "positions"):
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[name])


def test_dropout_drops_in_training_alone_and_scales() -> None:
    config = small_config("finetune.classes=3", "finetune.dropout=0.5", "model.layers=1")
    model = random_model(config)
    torch.nn.init.normal_(model.class_head.weight)
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    still = model(tokens).class_logits_BC
    torch.testing.assert_close(still[0], still[1])
    drawn = model.train()(tokens).class_logits_BC
    assert not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(1)
    first = model(tokens).class_logits_BC
    torch.manual_seed(1)
    assert torch.equal(model(tokens).class_logits_BC, first)


def test_unused_layers_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_config("finetune.classes=3", "finetune.layer=1", "model.layers=3"))
    ran = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    cheap = model(tokens, logits=False)
    assert ran == [0, 1]
    torch.testing.assert_close(cheap.class_logits_BC, model(tokens).class_logits_BC)
    assert cheap.logits_BTK is None and cheap.features == {}


def test_defaults_come_from_the_pre_training(
    data: Path, starts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = starts / "next_pixel"
    for extra, rate, origin, generative in (
        ([], 0.0003, str(start / "checkpoints/step-00000007"), 1),
        (["--from-scratch"], 0.003, "", 0),
        (["--from-scratch", "finetune.generative_weight=1"], 0.003, "", 1),
    ):
        monkeypatch.setattr(
            sys, "argv", ["igpt-ds", *finetune(start, data, tmp_path / "run", *extra), "--print-config"]
        )
        cli.main()
        path = tmp_path / "printed.toml"
        path.write_text(capsys.readouterr().out)
        config = load_config(path)
        training = config.training
        assert config.finetune is not None and config.init_from == origin
        assert training.learning_rate == pytest.approx(rate)
        assert config.finetune.generative_weight == generative  # of scratch the classification alone, as the paper's
        assert (training.schedule, training.warmup_steps, training.batch) == ("constant", 0, 16)
        assert (training.validate_every, training.steps, config.model.layers) == (533 // 16, 50 * (533 // 16), 2)


@pytest.mark.parametrize("sets", [["data.fold_validation=true"], ["finetune.fold_validation=true"]])
def test_folding_trains_on_both_splits(data: Path, starts: Path, sets: list[str]) -> None:
    job = prepare(begin.finetuning(starts / "next_pixel", None, None, str(data), sets), CPU, test=True)
    assert [dataset.rows for dataset in job.train_sets] == [533, 67]
    assert job.validation_set is None
    positions = [job.order(p) for p in range(600)]
    assert sum(source == 1 for source, _, _ in positions) == pytest.approx(67, abs=1)


def test_a_folded_pre_training_is_fine_tuned_on_train_alone(data: Path, starts: Path, tmp_path: Path) -> None:
    config = small_config("seed=1", "data.fold_validation=true", resolution=8, palette_size=16)
    save_model(random_model(config), config, tmp_path / "folded", Palette.load(data / "train/palette.npy").sha256)
    asked = begin.finetuning(tmp_path / "folded", None, None, str(data), [])
    assert not asked.config.folded


# --- few labels ----------------------------------------------------------------------------------------------------


def test_few_labels_are_as_many_of_each_class_and_those_of_low_data(data: Path, starts: Path) -> None:
    sets = ["finetune.labels=3", "seed=5"]
    job = prepare(begin.finetuning(starts / "next_pixel", None, None, str(data), sets), CPU)
    train = Dataset.open(data / "train")
    chosen = balanced(train.labels(), 3, seed=5, repeat=0)
    assert job.train_sets[0].rows == 30
    assert np.bincount(job.train_sets[0].labels()).tolist() == [3] * 10
    np.testing.assert_array_equal(job.train_sets[0].images(), train.images()[chosen])
    # An epoch is 30 images, less than two batches of 16.
    assert (job.config.training.validate_every, job.config.training.steps) == (20, 1000)
    assert job.validation_set is not None and job.validation_set.rows == 67
    other = prepare(begin.finetuning(starts / "next_pixel", None, None, str(data), [*sets, "seed=6"]), CPU)
    assert other.identity() != job.identity()


@pytest.mark.distributed
def test_few_labels_are_learnt_by_heart_and_recorded(data: Path, starts: Path, tmp_path: Path) -> None:
    """All that is trained on is the 20 images: they are known in the end, the others are not."""
    run, output = tmp_path / "run", tmp_path / "output.txt"
    recipe = (
        "training.learning_rate=0.003",
        "training.steps=120",
        "finetune.generative_weight=0",
        "finetune.patience=0",
    )
    sets = ("finetune.labels=2", "seed=4", *recipe)
    run_command(finetune(starts / "next_pixel", data, run, *sets, "--split", "test"), output)
    result = json.loads((run / "result.json").read_text())
    assert (result["labels"], result["train_images"], result["n"]) == (2, 20, 67)
    assert result["chance"] == pytest.approx(float((Dataset.open(data / "test").labels() == 0).mean()))
    train = Dataset.open(data / "train")
    chosen = Subset(train, balanced(train.labels(), 2, seed=4))
    last = run / "checkpoints" / "step-00000120"
    assert accuracy(last, chosen) > 0.9 > accuracy(last, train)
    text = run_command(["finetune", str(run), "--set", "training.steps=130"], output)
    assert "resumed from" in text and "2 labels each" in text


# --- bad input ---------------------------------------------------------------------------------------------------

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def call(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, errors = capsys.readouterr()
        assert (end.value.code, out) == (2, ""), errors
        assert errors.startswith("igpt-ds: ") and errors.count("\n") == 1 and errors.count(": ") >= 2, errors
        return errors.removeprefix("igpt-ds: ")

    yield call
    for number, handler in signals.items():
        signal.signal(number, handler)


def edited(data: Path, copy: Path, split: str, **changes: Any) -> Path:
    """The data with a manifest that says something else."""
    shutil.copytree(data, copy)
    path = copy / split / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("train", {"classes": None}, "train: has no labels"),
        ("val", {"classes": ["a", "b"]}, "val: its classes are not those of"),
        ("test", {"classes": None}, "test: has no labels"),
    ],
)
def test_labels_that_do_not_serve(
    refused: Refused, data: Path, starts: Path, tmp_path: Path, split: str, changes: dict[str, Any], message: str
) -> None:
    other = edited(data, tmp_path / "data", split, **changes)
    assert message in refused(finetune(starts / "next_pixel", other, tmp_path / "run", "--split", "test"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune.layer=3"], "finetune.layer 3 is not in 0..2"),
        (["finetune.classes=7"], "has 10 classes, 7 are needed"),
        (["finetune.generative_weight=-1"], "finetune.generative_weight must not be negative, but is -1.0"),
        (["finetune.dropout=1.0"], "finetune.dropout 1.0 is not in [0, 1)"),
        (["training.validate_every=0"], "leaves no best checkpoint"),
        (["data.fold_validation=true"], "add --split test"),
        (["data.fold_validation=true", "finetune.labels=4"], "few labels are drawn of train/ alone"),
        (["finetune.labels=0"], "finetune.labels must be above 0, not 0"),
        (["finetune.labels=60"], "finetune.labels=60: class "),
        (["model.width=64"], "its model is "),
        (["--masks", "5"], "next_pixel hides nothing"),
        (["--preset", "tiny"], "--from and --preset"),
        (["finetune.layr=3"], "unknown key finetune.layr (nearest: finetune.layer)"),
    ],
)
def test_settings_that_do_not_serve(
    refused: Refused, data: Path, starts: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused(finetune(starts / "next_pixel", data, tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_serve(refused: Refused, data: Path, starts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "no run directory and no checkpoint" in refused(finetune(tmp_path, data, run))
    assert "has no weights" in refused(["finetune", str(run), "--preset", "tiny", "--data", str(data)])
    assert "neither weights nor a model" in refused(["finetune", str(run), "--data", str(data)])
    assert "add --data DIR" in refused(["finetune", str(run), "--from", str(starts / "next_pixel")])
    assert "RUN: none is named" in refused(["finetune", "--from", str(starts / "next_pixel"), "--data", str(data)])
    config = small_config(resolution=8, palette_size=16)
    save_model(random_model(config), config, tmp_path / "palette", "another palette")
    assert "another palette than the one" in refused(finetune(tmp_path / "palette", data, run))
    tuned = small_config("finetune.classes=10", resolution=8, palette_size=16)
    save_model(random_model(tuned), tuned, tmp_path / "tuned", "any")
    assert "is a fine-tuning" in refused(finetune(tmp_path / "tuned", data, run))
    assert not run.exists()


def test_pretrain_and_finetune_do_not_take_each_others_runs(tmp_path: Path, data: Path, starts: Path) -> None:
    from igpt_ds.config.file import to_toml
    from igpt_ds.run.directory import Run

    run = Run(tmp_path)
    begun = small_config("finetune.classes=10", f"init_from={starts / 'next_pixel/checkpoints/step-00000007'}")
    run.config.write_text(to_toml(begun))
    with pytest.raises(UserError, match="go on with igpt-ds finetune"):
        begin.pretraining(None, run, [], [])
    assert begin.finetuning(starts / "next_pixel", None, run, None, []).config == begun
    with pytest.raises(UserError, match=r"began with .*next_pixel.*, not with .*masked_pixel"):
        begin.finetuning(starts / "masked_pixel", None, run, None, [])
    with pytest.raises(UserError, match="not with random ones"):
        begin.finetuning(starts / "next_pixel", None, run, None, [], scratch=True)
    run.config.write_text(to_toml(small_config()))
    with pytest.raises(UserError, match="is a pre-training"):
        begin.finetuning(starts / "next_pixel", None, run, None, [])
