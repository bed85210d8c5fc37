"""Sheets of samples: what stands where, the images to complete, the command, several ranks, a pre-training's own."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from igpt_ds.config.file import to_toml
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import UserError
from igpt_ds.model.sampling import Drawing, sample
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import Metrics, read_metrics
from igpt_ds.samples import draw
from igpt_ds.samples import sheet as samples
from igpt_ds.train import sheets
from tests.helpers import commands
from tests.helpers.commands import pretrain, run_command
from tests.helpers.models import random_model, save_model, small_config
from tests.helpers.ranks import run_ranks
from tests.igpt_ds.commands.test_bad_input import refused  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Ranks()
TILE, STRIDE = 64, 64 + samples.GAP


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    return random_model(small_config(resolution=8, palette_size=16))


@pytest.fixture(scope="module")
def run(digits: Path, model: ImageGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as a training would have left it."""
    run, config = tmp_path_factory.mktemp("sampled") / "run", small_config(resolution=8, palette_size=16)
    palette = Dataset.open(digits / "train").palette
    save_model(model, config, run, palette.sha256)
    palette.save(run / "palette.npy")
    (run / "config.toml").write_text(to_toml(config))
    return run


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """One pixel of each square of a tile: uint8 [8, 8, 3]."""
    top, left = samples.GAP + STRIDE * row, samples.GAP + STRIDE * column
    return sheet[top : top + TILE, left : left + TILE][4::8, 4::8]


def marked(sheet: np.ndarray, row: int, column: int) -> tuple[int, int]:
    """How many rows of pixels the lines left and right of a tile are long."""
    top, left = samples.GAP + STRIDE * row, samples.GAP + STRIDE * column
    lines = (sheet[top : top + TILE, x] for x in (left - 1, left + TILE))
    left_one, right_one = (int((line == samples.GIVEN).all(axis=1).sum()) for line in lines)
    return left_one, right_one


def test_contact_sheet_places_enlarged_pixels() -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[2, 7, 0] = (255, 0, 0)
    sheet = np.asarray(samples.contact_sheet(images, columns=2))
    gap, side = samples.GAP, 2 * STRIDE + samples.GAP
    assert sheet.shape == (side, side, 3)
    # Image 2 stands in the second row, first column; its lower left pixel is a square of 8.
    top = gap + STRIDE
    assert (sheet[top + 56 : top + 64, gap : gap + 8] == (255, 0, 0)).all()
    assert (sheet[top : top + 56, gap : gap + 64] == 0).all()
    assert (sheet[:gap] == 255).all() and (sheet[gap + 64 : top] == 255).all()
    assert (sheet[top:, top:] == 255).all(), "no fourth image"


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_completions_show_what_was_given_and_the_original(digits: Path, model: ImageGPT, rows: int) -> None:
    dataset = Dataset.open(digits / "val")
    tokens = samples.first_images(dataset, 3, 64, dataset.palette)
    drawn = draw.drawn_tokens(model, samples.prefixes(tokens, rows), Drawing(), ALONE, "test")
    assert drawn is not None
    sheet = np.asarray(samples.completion_sheet(tokens, drawn, dataset.palette, rows))
    assert sheet.shape == (3 * STRIDE + samples.GAP, 6 * STRIDE + samples.GAP, 3)
    originals = dataset.palette.decode(dataset.tokens(0)[:3]).reshape(3, 8, 8, 3)
    for row in range(3):
        tiles = [tile(sheet, row, column) for column in range(6)]
        assert np.array_equal(tiles[5], originals[row])
        assert (tiles[0][rows:] == samples.HIDDEN).all()
        for each in tiles[:5]:
            assert np.array_equal(each[:rows], originals[row][:rows])
        assert len({each[rows:].tobytes() for each in tiles[1:5]}) == 4, "four different completions"
        # The original's left line is the one right of the last completion.
        assert [marked(sheet, row, column)[1] for column in range(6)] == [8 * rows] * 5 + [0]
        assert marked(sheet, row, 0)[0] == 8 * rows


def test_first_images_refuse_other_data(digits: Path) -> None:
    dataset = Dataset.open(digits / "val")
    with pytest.raises(UserError, match="ask for at most"):
        samples.first_images(dataset, dataset.rows + 1, 64, dataset.palette)
    with pytest.raises(UserError, match="another palette"):
        samples.first_images(dataset, 2, 64, Palette(-dataset.palette.colours))
    with pytest.raises(UserError, match="tokens"):
        samples.first_images(dataset, 2, 16, dataset.palette)


def test_pictures_become_tokens_of_the_runs_palette(digits: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(digits / "val")
    tokens = dataset.images(2)
    pixels = dataset.palette.decode(tokens).reshape(2, 8, 8, 3)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    Image.fromarray(pixels[0]).save(paths[0])
    Image.fromarray(pixels[1]).convert("RGBA").save(paths[1])
    assert np.array_equal(samples.pictures(paths, 64, dataset.palette), tokens)


def test_other_pictures_are_refused(digits: Path, tmp_path: Path) -> None:
    palette = Dataset.open(digits / "val").palette
    Image.new("RGB", (8, 9)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, named in (
        ("large.png", "8 x 9 pixels, the model draws 8 x 8"),
        ("photo.jpg", "cannot be read as a PNG"),
        ("cut.png", "cannot be read as a PNG"),
        ("none.png", "cannot be read as a PNG"),
    ):
        with pytest.raises(UserError, match=f"{name}: {named}"):
            samples.pictures([tmp_path / name], 64, palette)


def test_more_images_than_memory_holds_are_drawn_in_turn(
    digits: Path, model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    palette = Dataset.open(digits / "val").palette

    def drawn() -> Image.Image:
        tokens = draw.drawn_tokens(model, torch.empty(5, 0, dtype=torch.int64), Drawing(1), ALONE, "test")
        assert tokens is not None
        return samples.sample_sheet(tokens, palette)

    whole = drawn()
    assert whole.size == (2 * STRIDE + samples.GAP, 3 * STRIDE + samples.GAP)
    at_once = []

    def note(model: ImageGPT, prefix_BT: torch.Tensor, *others: Any) -> torch.Tensor:
        at_once.append(len(prefix_BT))
        return sample(model, prefix_BT, *others)

    monkeypatch.setattr(draw, "sample", note)
    monkeypatch.setattr(draw, "images_at_once", lambda model, free: 2)
    sheet = drawn()
    assert at_once == [2, 2, 1]
    assert np.array_equal(np.asarray(sheet), np.asarray(whole))
    samples.save_png(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(whole))
    with pytest.raises(UserError, match="cannot write"):
        samples.save_png(sheet, tmp_path / "sheet.png" / "below.png")


# --- the command -----------------------------------------------------------------------------------------------


def call(*arguments: object) -> None:
    from igpt_ds.cli import cli

    cli(["sample", *map(str, arguments)], standalone_mode=False)


def test_command_draws_what_it_is_asked_for(
    run: Path, digits: Path, model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    palette, out = Dataset.open(digits / "val").palette, tmp_path / "sheet.png"
    how = ["--temperature", 1.5, "--top-k", 9, "--top-p", 0.9, "--seed", 4]
    call(run, "--n", 4, *how, "--out", out)
    drawn = sample(model, torch.empty(4, 0, dtype=torch.int64), Drawing(4, 1.5, 9, 0.9), title=None)
    sheet = np.asarray(Image.open(out))
    assert np.array_equal(tile(sheet, 1, 0), palette.decode(drawn[2].numpy()).reshape(8, 8, 3))

    call(run, "--complete", digits, "--n", 2, "--split", "train", "--rows", 3, "--out", out)
    sheet = np.asarray(Image.open(out))
    original = palette.decode(Dataset.open(digits / "train").images(2)[1]).reshape(8, 8, 3)
    assert sheet.shape[0] == 2 * STRIDE + samples.GAP
    assert np.array_equal(tile(sheet, 1, 5), original) and np.array_equal(tile(sheet, 1, 2)[:3], original[:3])
    assert marked(sheet, 1, 0)[0] == 24

    Image.fromarray(original).save(tmp_path / "mine.png")
    call(run, "--picture", tmp_path / "mine.png", "--out", out)
    sheet = np.asarray(Image.open(out))
    assert np.array_equal(tile(sheet, 0, 5), original) and (tile(sheet, 0, 0)[4:] == samples.HIDDEN).all()


def test_images_are_written_as_fid_tools_read_them(
    run: Path, digits: Path, model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free samples and completions: pixels and tokens in one .npz, the same pixels as PNG files; no sheet is needed."""
    monkeypatch.delenv("RANK", raising=False)
    dataset = Dataset.open(digits / "val")
    given = samples.prefixes(dataset.images(2), 4)
    for name, words, prefix in (
        ("free", ("--n", 5), torch.empty(5, 0, dtype=torch.int64)),
        ("completed", ("--complete", digits, "--n", 2), given),
    ):
        npz, pngs = tmp_path / f"{name}.npz", tmp_path / name
        call(run, *words, "--npz", npz, "--pngs", pngs)
        tokens = sample(model, prefix, Drawing(), title=None).numpy()
        pixels = dataset.palette.decode(tokens).reshape(len(tokens), 8, 8, 3)
        with np.load(npz, allow_pickle=False) as found:
            assert sorted(found) == ["arr_0", "tokens"]
            assert (found["arr_0"].dtype, found["tokens"].dtype) == (np.uint8, np.uint16)
            assert np.array_equal(found["arr_0"], pixels) and np.array_equal(found["tokens"], tokens)
        assert sorted(path.name for path in pngs.iterdir()) == [f"{i:06d}.png" for i in range(len(tokens))]
        for i, image in enumerate(pixels):
            with Image.open(pngs / f"{i:06d}.png") as read:
                assert read.mode == "RGB" and np.array_equal(np.asarray(read), image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completed", "completed.npz", "free", "free.npz"]


def test_where_nothing_can_be_written_nothing_is_drawn(
    refused: Callable[..., str],  # noqa: F811
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(*_: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(draw, "drawn_tokens", drawn)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "of another.png").touch()
    command = ("sample", str(run), "--n", "2")
    assert "nowhere to write to: add --out" in refused(*command)
    for option, path, named in (
        ("--pngs", "full", "full: exists already: choose another folder"),
        ("--pngs", "full/of another.png", "exists already"),
        ("--npz", "full", "full: cannot write: the path is a directory"),
        ("--out", "full", "full: cannot write: the path is a directory"),
    ):
        assert named in refused(*command, option, str(tmp_path / path))
    assert "do not fit in memory: draw several" in refused(*command[:3], "9" * 15, "--npz", str(tmp_path / "x.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_command_takes_a_step_and_a_precision(
    digits: Path, model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    run, config = tmp_path / "run", small_config(resolution=8, palette_size=16)
    palette = Dataset.open(digits / "val").palette
    palette.save(run / "palette.npy")
    other = random_model(config, seed=9)
    for step, network in ((7, model), (8, other)):
        save_model(network, config, run, palette.sha256, step)
    asked = {
        ("--step", "7"): model,
        (): other,
        ("--step", "7", "--precision", "bfloat16"): copy.deepcopy(model).bfloat16(),
    }
    sheets = set()
    for words, network in asked.items():
        call(run, "--n", 64, *words, "--out", tmp_path / "sheet.png")
        drawn = sample(network, torch.empty(64, 0, dtype=torch.int64), Drawing(0), title=None)
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        expected = palette.decode(drawn.numpy()).reshape(64, 8, 8, 3)
        assert all(np.array_equal(tile(sheet, *divmod(i, 8)), image) for i, image in enumerate(expected)), words
        sheets.add(sheet.tobytes())
    assert len(sheets) == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1"], "--temperature -1.0: is no finite number"),
        (["--top-k", "0"], "--top-k 0: leaves no token"),
        (["--top-p", "0"], "--top-p 0.0: is not in (0, 1]"),
        (["--top-p", "1.5"], "--top-p 1.5: is not in (0, 1]"),
        (["--complete", "DATA", "--rows", "8"], "--rows 8: the images have 8 rows"),
        (["--complete", "DATA", "--rows", "0"], "--rows 0: the images have 8 rows"),
        (["--complete", "DATA", "--rows", "-1"], "--rows -1: the images have 8 rows"),
        (["--complete", "DATA", "--n", "1000"], "ask for at most --images 67"),
        (["--complete", "DATA", "--picture", "a.png"], "--picture: not beside --complete"),
        (["--picture", "a.png", "--n", "2"], "--images: not beside --picture"),
        (["--picture", "none.png"], "none.png: cannot be read as a PNG"),
        (["--rows", "3"], "--rows 3: nothing is given"),
        (["--split", "test"], "--split test: without --complete"),
        (["--complete", "DATA", "--split", "test"], "has no test/ dataset"),
        (["--n", "0"], "0 is not in the range"),
        (["--n", "99999999999"], "--images 99999999999: a sheet holds 13,695 of 8 x 8"),
        (["--n", "9" * 400], "a sheet holds"),
        (["--complete", "DATA", "--n", "2283"], "--images 2283: a sheet holds 2,282"),
        (["--picture", "/dev/zero"], "/dev/zero: cannot be read as a PNG"),
        (["--temperature", "nan"], "--temperature nan: is no finite number"),
        (["--top-p", "nan"], "--top-p nan: is not in (0, 1]"),
    ],
)
def test_command_refuses(
    refused: Callable[..., str],  # noqa: F811
    run: Path,
    digits: Path,
    tmp_path: Path,
    arguments: list[str],
    named: str,
) -> None:
    words = [str(digits) if word == "DATA" else word for word in arguments]
    assert named in refused("sample", str(run), "--out", str(tmp_path / "x.png"), *words)
    assert not (tmp_path / "x.png").exists()


def test_command_refuses_another_palette_and_a_bert_model(
    refused: Callable[..., str],  # noqa: F811
    run: Path,
    digits: Path,
    tmp_path: Path,
) -> None:
    palette = Dataset.open(digits / "train").palette
    assert "cannot write" in refused("sample", str(run), "--n", "1", "--out", str(run / "config.toml" / "x.png"))
    for name, saved, objective, named in (
        ("other", Palette(-palette.colours), "next_pixel", "not the palette of"),
        ("bert", palette, "masked_pixel", "bert: is a BERT model"),
    ):
        config = small_config(f"objective.name={objective}", resolution=8, palette_size=16)
        save_model(random_model(config), config, tmp_path / name, palette.sha256)
        saved.save(tmp_path / name / "palette.npy")
        (tmp_path / name / "config.toml").write_text(to_toml(config))
        assert named in refused("sample", str(tmp_path / name), "--out", str(tmp_path / "x.png"))


@pytest.mark.parametrize("words", [["--n", "2"], ["--n", "3", "--complete", "DATA"]])
def test_nothing_is_written_of_damaged_weights(
    words: list[str],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, palette = small_config(resolution=8, palette_size=16), Dataset.open(digits / "train").palette
    model = random_model(config)
    with torch.no_grad():
        model.head.weight[3, 0] = math.nan
    save_model(model, config, tmp_path / "run", palette.sha256)
    palette.save(tmp_path / "run" / "palette.npy")
    words = [str(digits) if word == "DATA" else word for word in words]
    assert commands.call(monkeypatch, "sample", tmp_path / "run", "--out", tmp_path / "x.png", *words) == 1
    assert "logits are not finite (images 0, 1" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.distributed
def test_sheets_are_the_same_on_any_number_of_ranks(run: Path, digits: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        arguments = ["sample", str(run), "--n", "5", "--out", str(tmp_path / f"{world}.png")]
        run_ranks("igpt_ds", arguments, world, limit=120)
    one, *others = [(tmp_path / f"{world}.png").read_bytes() for world in (1, 2, 3)]
    assert others == [one, one]


# --- during a pre-training -------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_of_a_divided_network_draw_what_one_process_draws(
    run: Path, digits: Path, model: ImageGPT, tmp_path: Path
) -> None:
    run_ranks("tests.workers.sampling", [str(run), str(digits), str(tmp_path)], 2, limit=200)
    prefix = torch.from_numpy(Dataset.open(digits / "val").images(5).astype(np.int64))[:, :24]
    expected = sample(model, prefix, Drawing(3, 1.2, 12, 0.95), title=None)
    found = json.loads((tmp_path / "2-0.json").read_text())
    assert found["cases"].keys() == {f"{way} zero{stage} {size}" for way, stage, size in CASES}
    for name, tokens in found["cases"].items():
        assert tokens == expected.tolist(), name
    other = json.loads((tmp_path / "2-1.json").read_text())
    assert set(map(str, other["cases"].values())) == {"None"}
    for record in (found, other):
        assert record["losses with samples"] == record["losses"], "sampling must not disturb the training"
        assert record["state kept"] and record["lacking"] is None
        # Each rank draws 3 of the 5 images, one of them to keep step: 64 - 24 positions, one image at a time or three.
        assert record["beats"] == {"one at once": 3 * 40, "all at once": 40}


CASES = [(way, stage, size) for way in ("whole", "divided") for stage, size in ((3, 0), (3, 100_000))] + [("own", 1, 0)]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_sheets_of_a_training_appear_and_change_nothing(digits: Path, tmp_path: Path) -> None:
    def losses(name: str, *sets: str) -> list[tuple[float, float]]:
        words = [word for each in ("training.steps=8", *sets) for word in ("--set", each)]
        run_command(pretrain(digits, tmp_path / name, *words), tmp_path / f"{name}.txt")
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    plain = losses("plain", "training.sample_every=0")
    # Interrupted at a step with a sheet, and taken up again.
    often = ("training.sample_every=3", "checkpoint.every=3")
    losses("often", *often, "training.stop_at=6")
    assert losses("often", *often) == plain and len(plain) == 8
    folder = tmp_path / "often" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert not (tmp_path / "plain" / "samples").exists()
    events = EventAccumulator(str(tmp_path / "often" / "events"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [3, 6]
    sheet = np.asarray(Image.open(folder / "step-00000006.png"))
    assert sheet.shape[:2] == (events.Images("samples")[1].height, events.Images("samples")[1].width)
    # The same from a checkpoint of that step: free samples above, completions of the first validation images below.
    validation = Dataset.open(digits / "val")
    original = validation.palette.decode(validation.images(1)[0]).reshape(8, 8, 3)
    assert np.array_equal(tile(sheet, 2, 5), original) and marked(sheet, 2, 0)[0] == 32 and marked(sheet, 1, 0)[0] == 0


class Drawn:
    """An engine that draws the same token everywhere."""

    def __init__(self, memory: bool, token: int = 3):
        self.memory, self.token, self.asked = memory, token, []  # type: ignore[var-annotated]

    def sample(self, prefix: torch.Tensor, drawing: Drawing, beat: Callable[[], None]) -> torch.Tensor | None:
        beat()
        self.asked.append(tuple(prefix.shape))
        drawn = torch.full((len(prefix), 64 - prefix.shape[1]), self.token)
        return torch.cat([prefix, drawn], dim=1) if self.memory else None


@pytest.mark.parametrize("case", ["with validation", "without", "no memory", "no room on the disk", "not finite"])
def test_a_sheet_is_drawn_or_what_is_in_its_way_told(
    case: str, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = Dataset.open(digits / "val")
    job = SimpleNamespace(
        config=small_config(resolution=8, palette_size=16),
        train_sets=[Dataset.open(digits / "train")],
        validation_set=None if case == "without" else validation,
    )
    engine = Drawn(case != "no memory", -1 if case == "not finite" else 3)
    beats, folder = list[bool](), Run(tmp_path).samples
    metrics = Metrics(tmp_path, 0, {})
    if case == "no room on the disk":
        (tmp_path / "samples").write_text("a file where the folder is to be")
    monkeypatch.setattr(sheets.LOGGER, "propagate", True)
    with caplog.at_level("INFO", logger="igpt_ds"):
        for told in (metrics, None):
            sheets.draw_sheet(engine, job, folder, told, 20, lambda: beats.append(True))
    metrics.close()
    both = [(12, 0), (16, 32)]
    assert engine.asked == 2 * (both[:1] if case == "without" else both)
    assert len(beats) == len(engine.asked)
    path = tmp_path / "samples" / "step-00000020.png"
    if case in ("with validation", "without"):
        with Image.open(path) as sheet:
            assert sheet.height == samples.GAP + STRIDE * (2 if case == "without" else 6)
        assert str(path) in caplog.text
    else:
        assert not path.exists()
        told_of = {"no memory": "no memory is left", "not finite": "no samples: the network's logits are not finite"}
        assert told_of.get(case, "going on without these samples") in caplog.text


def test_a_sheet_is_due_of_a_next_pixel_training_that_does_well(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from igpt_ds.train.trainer import Trainer

    drawn = []
    monkeypatch.setattr(sheets, "draw_sheet", lambda *given: drawn.append(given[4]))
    meter, watchdog = SimpleNamespace(restart=lambda: None), SimpleNamespace(beat=print)
    rest: dict[str, Any] = {"engine": None, "run": Run(tmp_path), "metrics": None, "meter": meter, "watchdog": watchdog}

    def steps(*sets: str, bad: int = 0) -> list[int]:
        drawn.clear()
        config = small_config(*sets)
        for step in range(1, 31):
            progress = SimpleNamespace(step=step, stability=SimpleNamespace(bad=bad))
            job: Any = SimpleNamespace(config=config)
            Trainer._draw_samples(SimpleNamespace(job=job, progress=progress, **rest))  # type: ignore[arg-type]
        return list(drawn)

    assert steps("training.sample_every=10") == [10, 20, 30]
    assert steps("training.sample_every=0") == []
    assert steps() == []  # the default leaves a tiny run alone
    assert steps("training.sample_every=10", "objective.name=masked_pixel") == []
    assert steps("training.sample_every=10", "finetune.classes=10") == []
    assert steps("training.sample_every=10", bad=1) == []
    assert math.isfinite(small_config().training.sample_every)
    with pytest.raises(UserError, match=r"training\.sample_every must not be negative"):
        small_config("training.sample_every=-1")
