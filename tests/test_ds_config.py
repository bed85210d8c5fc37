"""DeepSpeed's configuration: every fact has one owner, nothing stays "auto", nothing unknown passes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import load_config, presets
from igpt_ds.ds_config import FOLDER, Division, divide_batch, load_ds_config, resolve
from igpt_ds.errors import UserError

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FLOAT32 = load_config("tiny", ["training.gradient_clip=1.5"])
DIVISION = Division(world=2, micro_batch=4, accumulation=2)
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "zero_optimization": {"stage": 3},
}


def write(folder: Path, content: object) -> str:
    path = folder / "machine.json"
    path.write_text(json.dumps(content))
    return str(path)


def refusal(folder: Path, content: object) -> str:
    with pytest.raises(UserError) as caught:
        load_ds_config(write(folder, content))
    text = str(caught.value)
    assert "machine.json" in text
    assert "\n" not in text
    return text


def leaves(tree: dict[str, Any]) -> list[Any]:
    return [leaf for v in tree.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]


def test_every_zero_stage_has_a_file() -> None:
    assert [load_ds_config(f"zero{stage}")["zero_optimization"]["stage"] for stage in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("name", NAMES)
def test_every_file_resolves_for_every_preset(name: str, preset: str) -> None:
    tree, config = load_ds_config(name), load_config(preset)
    division = divide_batch(config.training.batch, None, 4)
    if config.training.precision == "bfloat16" and tree["zero_optimization"]["stage"] == 0:
        with pytest.raises(UserError, match="ZeRO stage 1 to 3"):
            resolve(tree, config, division)
        return
    resolved = resolve(tree, config, division)
    assert "auto" not in leaves(resolved)
    assert resolved["train_batch_size"] == config.training.batch
    assert resolved["train_micro_batch_size_per_gpu"] == config.training.batch // 4
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["bf16"]["enabled"] is (config.training.precision == "bfloat16")
    assert resolved["zero_optimization"] == tree["zero_optimization"]


def test_owned_facts_are_filled_in_and_the_file_is_left_as_it_was() -> None:
    tree = json.loads(json.dumps(AUTO))
    resolved = resolve(tree, FLOAT32, DIVISION)
    assert tree == AUTO
    assert resolved == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.5,
        "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3},
    }
    # What is not even mentioned is filled in all the same, and what is stated rightly may stand.
    assert resolve({"zero_optimization": {"stage": 3}}, FLOAT32, DIVISION) == resolved
    assert resolve(resolved, FLOAT32, DIVISION) == resolved


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 32),
        ("train_micro_batch_size_per_gpu", 8),
        ("gradient_accumulation_steps", 1),
        ("gradient_clipping", 1.0),
        ("bf16", {"enabled": True}),
        ("data_types", {"grad_accum_dtype": "bf16"}),
    ],
)
def test_a_fact_with_another_owner_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        resolve({**AUTO, key: value}, FLOAT32, DIVISION)


@pytest.mark.parametrize("key", ["overlap_comm", "reduce_bucket_size"])
def test_an_auto_that_nobody_resolves_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f'"auto" at zero_optimization.{key}'):
        resolve({**AUTO, "zero_optimization": {"stage": 3, key: "auto"}}, FLOAT32, DIVISION)
    with pytest.raises(UserError, match='"auto" at prescale_gradients'):
        resolve({**AUTO, "prescale_gradients": "auto"}, FLOAT32, DIVISION)


@pytest.mark.parametrize("stage", [{}, {"stage": 4}, {"stage": "3"}])
def test_the_stage_must_be_stated(stage: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"write 0, 1, 2 or 3"):
        resolve({**AUTO, "zero_optimization": stage}, FLOAT32, DIVISION)


def test_bfloat16_needs_zero() -> None:
    config = load_config("tiny", ["training.precision=bfloat16"])
    with pytest.raises(UserError, match=r"training\.precision=bfloat16"):
        resolve({**AUTO, "zero_optimization": {"stage": 0}}, config, DIVISION)
    assert resolve(AUTO, config, DIVISION)["bf16"] == {"enabled": True}


def test_unknown_keys_are_named_together_with_the_nearest(tmp_path: Path) -> None:
    told = refusal(tmp_path, {**AUTO, "gradient_cliping": 1, "zero_optimization": {"stage": 3, "overlap_com": True}})
    assert "gradient_cliping (nearest: gradient_clipping)" in told
    assert "zero_optimization.overlap_com (nearest: zero_optimization.overlap_comm)" in told


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "fp16", "activation_checkpointing"])
def test_what_the_code_decides_is_no_key(tmp_path: Path, key: str) -> None:
    assert f"unknown key {key} " in refusal(tmp_path, {**AUTO, key: {}})


@pytest.mark.parametrize("content", [[], 3, {**AUTO, "zero_optimization": 3}, {**AUTO, "zero_optimization": [1]}])
def test_json_of_another_form_is_refused(tmp_path: Path, content: object) -> None:
    refusal(tmp_path, content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zero9.*choose one of zero0, zero1"):
        load_ds_config("zero9")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_ds_config(str(tmp_path / "bad.json"))


def test_a_directory_of_a_files_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_ds_config("zero3")["zero_optimization"]["stage"] == 3


def test_a_batch_is_divided_exactly_or_refused() -> None:
    for batch in range(1, 25):
        for world in range(1, 10):
            for micro in (None, *range(1, 13)):
                share = batch / world
                fits = share.is_integer() and (micro is None or (share / micro).is_integer())
                if fits:
                    division = divide_batch(batch, micro, world)
                    assert division.world * division.micro_batch * division.accumulation == batch == division.batch
                    assert division.world == world
                    assert division.micro_batch == (int(share) if micro is None else micro)
                else:
                    with pytest.raises(UserError) as caught:
                        divide_batch(batch, micro, world)
                    check_remedies(str(caught.value), batch, micro, world)


def check_remedies(text: str, batch: int, micro: int | None, world: int) -> None:
    """Every size that a refusal names really divides."""
    if batch % world:
        ranks = re.search(r"start ([\d or]+) ranks", text)
        batches = re.search(r"set training\.batch=([\d or]+)", text)
        assert ranks and batches, text
        named = [int(n) for n in re.findall(r"\d+", ranks[1])]
        assert named
        assert all(divide_batch(batch, None, n).batch == batch for n in named)
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        assert named == nearest(fitting, world)
        sizes = [int(n) for n in re.findall(r"\d+", batches[1])]
        assert sizes
        assert all(n > 0 and abs(n - batch) < world and divide_batch(n, None, world).batch == n for n in sizes)
    else:
        named = [int(n) for n in re.findall(r"\d+", text.split("set training.micro_batch=")[1])]
        assert named
        assert all(divide_batch(batch, n, world).batch == batch for n in named)
        assert micro is not None
        assert named == nearest(
            [n for n in range(1, batch + 1) if batch // world % n == 0 and n * world <= batch], micro
        )


def nearest(fitting: list[int], wanted: int) -> list[int]:
    """The fitting sizes on both sides of one that does not fit."""
    below, above = [n for n in fitting if n < wanted], [n for n in fitting if n > wanted]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]
