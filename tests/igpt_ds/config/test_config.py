"""The configuration: the paper's figures in the presets, and faults told all together."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from igpt_ds.config.file import from_tree, load_config, presets, to_toml, to_tree
from igpt_ds.config.schema import Config, identity, replace
from igpt_ds.errors import UserError
from igpt_ds.planner.report import Machine, decided_layout, make_plan

IMAGENET_TRAIN = 0.96 * 1_281_167

# layers, width, resolution, objective, rate, batch, steps: paper section 3.3 and table 5.
PAPER = {
    "s": (24, 512, 32, "next_pixel", 0.003, 128, 1_000_000),
    "m": (36, 1024, 32, "next_pixel", 0.003, 128, 1_000_000),
    "l": (48, 1536, 32, "next_pixel", 0.001, 128, 1_000_000),
    "l48": (48, 1536, 48, "next_pixel", 0.01, 128, 1_000_000),
    "xl": (60, 3072, 64, "next_pixel", 0.0003, 64, 2_000_000),
    "s-bert": (24, 512, 32, "masked_pixel", 0.01, 128, 1_000_000),
    "m-bert": (36, 1024, 32, "masked_pixel", 0.003, 128, 1_000_000),
    "l-bert": (48, 1536, 32, "masked_pixel", 0.001, 128, 1_000_000),
}
HEADS = {"s": 8, "m": 8, "l": 16, "xl": 24}


def message(source: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_presets_are_the_papers_and_two_small_ones() -> None:
    assert sorted(presets()) == sorted([*PAPER, "tiny", "demo"])


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_papers_figures(name: str) -> None:
    config = load_config(name)
    model, training = config.model, config.training
    assert (
        model.layers,
        model.width,
        config.data.resolution,
        config.objective.name,
        training.learning_rate,
        training.batch,
        training.steps,
    ) == PAPER[name]
    assert model.heads == HEADS[name.removesuffix("48").removesuffix("-bert")]
    assert config.palette_size == 512
    assert config.sequence_length == PAPER[name][2] ** 2
    assert (training.beta1, training.beta2) == (0.9, 0.95)
    assert config.objective.mask_rate == 0.15
    assert training.warmup_steps == pytest.approx(IMAGENET_TRAIN / training.batch, abs=1)
    assert config.causal == (config.objective.name == "next_pixel")
    assert training.stop_at is None


@pytest.mark.parametrize("name", presets())
def test_every_preset_leaves_the_machines_part_to_the_machine(name: str) -> None:
    recipe = load_config(name).training
    left = {recipe.precision, recipe.micro_batch, recipe.activation_checkpointing, recipe.compile}
    assert left == {"auto"}


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_small_presets_take_what_the_data_says(name: str) -> None:
    config = load_config(name)
    assert config.data.resolution is None
    assert config.data.palette_size is None
    assert load_config("tiny").training.batch == 16


@pytest.mark.parametrize("name", presets())
def test_toml_reads_back_unchanged(name: str, tmp_path: Path) -> None:
    sets = ["seed=7", "data.sources=['a', 'b \"c\"']", "data.weights=[3, 1]", "training.stop_at=12"]
    config = load_config(name, sets)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config
    assert from_tree(to_tree(config), "tree") == config


def test_a_configuration_is_frozen_and_replaced() -> None:
    config = load_config("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    changed = replace(config, "training", steps=7)
    assert (changed.training.steps, config.training.steps) == (7, 100)
    # A longer run goes on from the same checkpoints; another seed does not.
    assert identity(changed) == identity(config)
    assert identity(dataclasses.replace(config, seed=1)) != identity(config)


@pytest.mark.parametrize(
    ("text", "get", "value"),
    [
        ("training.steps=20", lambda c: c.training.steps, 20),
        ("training.steps=2_000", lambda c: c.training.steps, 2000),
        ("seed=1", lambda c: c.seed, 1),
        ("training.learning_rate=3e-4", lambda c: c.training.learning_rate, 0.0003),
        ("training.learning_rate=1", lambda c: c.training.learning_rate, 1.0),
        ("training.precision=bfloat16", lambda c: c.training.precision, "bfloat16"),
        ('training.precision="bfloat16"', lambda c: c.training.precision, "bfloat16"),
        ("name=my run", lambda c: c.name, "my run"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("training.compile=true", lambda c: c.training.compile, True),
        ("data.sources=['x', 'y']", lambda c: c.data.sources, ("x", "y")),
        ("data.sources=[]", lambda c: c.data.sources, ()),
    ],
)
def test_set_changes_one_fact(text: str, get, value) -> None:  # type: ignore[no-untyped-def]
    found = get(load_config("tiny", [text]))
    assert found == value
    assert type(found) is type(value)


def test_the_last_set_wins() -> None:
    assert load_config("tiny", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["training.steps", "=3", "training.steps.x=3", "name.x=1"])
def test_a_malformed_set_is_refused(text: str) -> None:
    assert f"--set {text}: " in message("tiny", text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("training.step=3", "unknown key training.step (nearest: training.steps)"),
        ("traning.steps=3", "unknown key traning (nearest: training)"),
        ("checkpoint.evry=3", "unknown key checkpoint.evry (nearest: checkpoint.every)"),
        ("training.steps=many", "training.steps must be int, not 'many'"),
        ("training.steps=", "training.steps must be int, not ''"),
        ("training.steps=2.5", "training.steps must be int, not 2.5"),
        ("training.steps=true", "training.steps must be int, not True"),
        ("training.learning_rate=true", "training.learning_rate must be float, not True"),
        ("data.resolution=true", "data.resolution must be int, not True"),
        ("training.compile=1", "training.compile must be bool, not 1"),
        ("name=3", "name must be str, not 3"),
        ("data.sources=x", "data.sources must be a list, not 'x'"),
        ("data.weights=[1, 'x']", "data.weights must be int, not 'x'"),
        ("objective.name=pixels", "objective.name must be one of masked_pixel, next_pixel, not 'pixels'"),
        ("model=3", "model must be a section, not 3"),
        ("training.steps=0", "training.steps must be above 0, not 0"),
        ("training.learning_rate=nan", "training.learning_rate must be a finite number of 64 bits, not nan"),
        ("training.warmup_steps=-1", "training.warmup_steps must not be negative, but is -1"),
        ("model.heads=3", "model.width 32 is no multiple of 3 heads"),
        ("model.heads=0", "model.heads must be above 0, not 0"),
        ("data.palette_size=65537", "data.palette_size must be at most 65536, not 65537"),
        ("objective.mask_rate=1.0", "objective.mask_rate 1.0 is not in (0, 1)"),
        ("training.beta2=1.0", "training.beta2 1.0 is not in [0, 1)"),
        ("training.stop_at=101", "training.stop_at 101 is not in 1..steps"),
        ("training.stop_at=0", "training.stop_at 0 is not in 1..steps"),
        ("data.weights=[1]", "data.weights is [1]: give one whole number above 0 for each of 0 sources"),
    ],
)
def test_a_fault_is_named(text: str, fault: str) -> None:
    told = message("tiny", text)
    assert told.startswith("configuration tiny: ")
    assert fault in told


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        section = next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)
        yield from keys(typing.cast(type, section), f"{prefix}{name}.") if section else [prefix + name]


ODD = ["nan", "-inf", "1e999", "-1", "0", "1e308", "9" * 18, "9" * 400, "-" + "9" * 400, "9" * 5000]
ODD += ["[" * 2000, "[nan]", "{a=1}", "1979-05-27"]


@pytest.mark.parametrize("key", [*keys(Config)])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key: str) -> None:
    begin = ["data.resolution=8", "data.palette_size=16", *(["finetune.classes=3"] if "finetune" in key else [])]
    begin += ["training.precision=float32", "training.activation_checkpointing=full", "training.compile=false"]
    for value in ODD:
        try:
            config = load_config("tiny", [*begin, f"{key}={value}"])
        except UserError as error:
            assert len(str(error)) < 1000
            continue
        with contextlib.suppress(UserError):  # a plan of it comes at once
            make_plan(decided_layout(config, "auto", 2, 8, Machine())[0], Machine())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("training.steps=5\nfoo=1", "its value is more than one line"),
        ("training.steps=5\n[model]\nlayers=1", "its value is more than one line"),
        ("name=a\nseed=3", "its value is more than one line"),
        ("training.steps=" + "9" * 5000, "its value cannot be read"),
        ("data.weights=" + "[" * 2000, "its value cannot be read"),
        ("training.learning_rate=" + "9" * 400, "training.learning_rate must be a finite number of 64 bits"),
        ("training.steps=" + "9" * 400, "training.steps must be a finite number of 64 bits"),
        ("health.hang_timeout=inf", "health.hang_timeout must be a finite number"),
        ("health.hang_timeout=1e10", "health.hang_timeout must be at most 31622400"),
        ("data.workers=1000000000", "data.workers must be at most 256"),
        ("model.layers=1000000000", "model.layers must be at most 4096"),
        ("training.batch=1000000000000", "training.batch must be at most 2147483647"),
    ],
)
def test_numbers_and_lines_are_bounded(text: str, fault: str) -> None:
    assert fault in message("tiny", text)


@pytest.mark.parametrize("text", ["a = " + "[" * 2000, "a = " + "9" * 5000, 'a = "' + "\\u0000" * 3])
def test_a_file_that_would_surprise_its_reader(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.toml").write_text(text)
    assert "cannot be read as TOML" in message(tmp_path / "odd.toml")


def test_all_faults_are_told_together() -> None:
    told = message("tiny", "training.step=3", "seed=true", "data.x=1", "training.steps=many", "model.layers=0.5")
    assert told.count("; ") == 4
    for fault in ("training.step ", "seed must", "data.x ", "training.steps must", "model.layers must"):
        assert fault in told
    told = message("tiny", "training.step=3", "model.heads=3", "training.stop_at=101", "checkpoint.keep=0")
    for fault in ("training.step ", "no multiple of 3 heads", "stop_at 101", "checkpoint.keep must be above 0"):
        assert fault in told


def test_missing_facts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text("[model]\nlayers = 2\n")
    told = message(path)
    for fault in ("name is missing", "model.width is missing", "model.heads is missing", "training.steps is missing"):
        assert fault in told


def test_a_seed_beyond_its_range_is_refused() -> None:
    # Generators and hashes take 64 bits.
    assert "seed" in message("tiny", f"seed={2**64}")
    assert "seed" in message("tiny", "seed=-1")


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    told = message("tny")
    assert told.startswith("preset tny: ")
    assert all(name in told for name in presets())
    assert "file.toml" in message(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seed = = 3")
    assert "cannot be read as TOML" in message(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read as TOML" in message(tmp_path / "bytes.toml")


def test_a_directory_of_a_presets_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `--preset tiny --run tiny` leaves behind.
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny")
    assert isinstance(config, Config)
    assert config.name == "tiny"
