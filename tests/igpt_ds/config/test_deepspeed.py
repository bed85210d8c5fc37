"""DeepSpeed's configuration: every fact has one owner, nothing stays "auto", nothing unknown passes."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from igpt_ds.config.batch import Division, divide_batch, divisors
from igpt_ds.config.deepspeed import FOLDER, bucket_sizes, load_ds_config, remembered, resolve
from igpt_ds.config.file import load_config, presets
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


@pytest.mark.parametrize("world", [1, 4, 16])
@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_file_resolves_for_every_preset(name: str, precision: str, preset: str, world: int) -> None:
    tree, config = load_ds_config(name), load_config(preset, [f"training.precision={precision}"])
    division = divide_batch(config.training.batch, "auto", world)
    if config.training.precision == "bfloat16" and tree["zero_optimization"]["stage"] == 0:
        with pytest.raises(UserError, match="ZeRO stage 1 to 3"):
            resolve(tree, config, division)
        return
    resolved = resolve(tree, config, division, 4)
    assert "auto" not in leaves(resolved)
    assert resolved["train_batch_size"] == config.training.batch
    assert resolved["train_micro_batch_size_per_gpu"] == config.training.batch // world
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["bf16"]["enabled"] is (config.training.precision == "bfloat16")
    stated = {key: value for key, value in tree["zero_optimization"].items() if value != "auto"}
    assert stated.items() <= resolved["zero_optimization"].items()
    # Groups of a node, where there is more than one.
    if "zero_hpz_partition_size" in tree["zero_optimization"]:
        assert resolved["zero_optimization"]["zero_hpz_partition_size"] == (4 if world > 4 else 1)
    # DeepSpeed would insist on an Adam of its own.
    assert resolved.get("zero_force_ds_cpu_optimizer", True) is ("offload_optimizer" not in tree["zero_optimization"])


@pytest.mark.parametrize("preset", presets())
def test_buckets_are_whole_blocks(preset: str) -> None:
    config = load_config(preset)
    sizes = bucket_sizes(config)
    d, layers = config.model.width, config.model.layers
    block, bucket = 12 * d * d + 2 * d, sizes["reduce_bucket_size"]
    assert sizes["stage3_prefetch_bucket_size"] == sizes["allgather_bucket_size"] == bucket
    blocks, rest = divmod(bucket - 512 * d, block)
    # One of the largest models, more of small ones, all of tiny ones.
    assert rest == 0 and 1 <= blocks <= layers
    assert blocks == layers or (blocks - 1) * block < 16 * 2**20 <= blocks * block
    # From its recomputation to its backward pass a matrix is kept: 18 d² elements lie between.
    assert sizes["stage3_max_reuse_distance"] > 18 * d * d
    assert sizes["stage3_max_live_parameters"] > 2 * bucket
    if config.name == "igpt-xl":
        assert (blocks, block) == (1, 113_252_352)


def test_sizes_that_are_stated_stand() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}
    resolved = resolve({**AUTO, "zero_optimization": zero}, FLOAT32, DIVISION)["zero_optimization"]
    assert resolved["reduce_bucket_size"] == 7
    assert resolved["stage3_prefetch_bucket_size"] == bucket_sizes(FLOAT32)["stage3_prefetch_bucket_size"]
    assert "stage3_max_live_parameters" not in resolved


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"stage": 3, "zero_hpz_partition_size": 3}, "8 ranks are no whole number of such groups"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, "write the number of GPUs of a node"),
        ({"stage": 3, "zero_hpz_partition_size": True}, "write the number of GPUs of a node"),
        ({"stage": 2, "zero_hpz_partition_size": "auto"}, "only stage 3 divides weights"),
    ],
)
def test_groups_that_cannot_be(zero: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        resolve({**AUTO, "zero_optimization": zero}, FLOAT32, Division(8, 1, 2), 2)


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"stage": 3, "offload_param": {"devise": "cpu"}}, "unknown key zero_optimization.offload_param.devise "),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "zero_optimization.offload_optimizer.device is 'nvme'"),
        ({"stage": 3, "offload_optimizer": True}, "zero_optimization.offload_optimizer must be an object"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "zero_optimization.offload_param needs stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1 or 2 or 3"),
        ({"stage": 3, "offload_param": {"device": "cpu", "pin_memory": 1}}, "pin_memory must be true or false"),
    ],
)
def test_offload_that_cannot_be(tmp_path: Path, zero: dict[str, object], told: str) -> None:
    assert told in refusal(tmp_path, {**AUTO, "zero_optimization": zero})


def test_a_batch_caps_the_ranks_and_the_ways_past_it_are_named() -> None:
    with pytest.raises(UserError) as caught:
        divide_batch(64, "auto", 128)
    told = str(caught.value)
    assert "training.batch=64: caps data parallelism at 64 ranks, not 128" in told
    assert "start 64 ranks" in told and "training.batch=128" in told and "training.sequence_parallel=2" in told


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


@pytest.mark.parametrize("key", ["overlap_comm", "sub_group_size"])
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
    resolved = resolve(AUTO, config, DIVISION)
    assert resolved["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert resolve({**AUTO, "bf16": {"enabled": True}}, config, DIVISION) == resolved
    assert resolve(resolved, config, DIVISION) == resolved
    with pytest.raises(UserError, match="bf16 is"):
        resolve({**AUTO, "bf16": {"enabled": True, "immediate_grad_update": False}}, config, DIVISION)


def test_what_a_run_keeps_serves_it_in_another_precision(tmp_path: Path) -> None:
    config = load_config("tiny", ["training.precision=bfloat16"])
    kept = remembered(AUTO, resolve(AUTO, config, DIVISION))
    assert resolve(load_ds_config(write(tmp_path, kept)), FLOAT32, DIVISION) == resolve(AUTO, FLOAT32, DIVISION)
    older = {**kept, "bf16": {"enabled": True}, "filled_in": ["bf16.enabled"]}
    assert load_ds_config(write(tmp_path, older))["bf16"] == {"enabled": "auto"}


def test_unknown_keys_are_named_together_with_the_nearest(tmp_path: Path) -> None:
    told = refusal(tmp_path, {**AUTO, "gradient_cliping": 1, "zero_optimization": {"stage": 3, "overlap_com": True}})
    assert "gradient_cliping (nearest: gradient_clipping)" in told
    assert "zero_optimization.overlap_com (nearest: zero_optimization.overlap_comm)" in told


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("optimizer", "it is torch's AdamW"),
        ("scheduler", "training.schedule"),
        ("fp16", "training.precision"),
        ("activation_checkpointing", "training.activation_checkpointing"),
        ("compile", "training.compile=true"),
        ("zero_optimization.zero_quantized_weights", "not seen to train"),
        ("zero_optimization.zero_quantized_gradients", "on one node it does nothing"),
    ],
)
def test_what_deepspeed_knows_and_is_refused_is_told_why(tmp_path: Path, key: str, told: str) -> None:
    section, _, last = key.rpartition(".")
    tree = json.loads(json.dumps(AUTO))
    (tree[section] if section else tree)[last] = {}
    text = refusal(tmp_path, tree)
    assert f"{key} is refused: " in text and told in text and text.endswith("(docs/deepspeed.md)")


@pytest.mark.parametrize("value", ["fp16", "float32", 32, None, ["fp32"]])
def test_gradients_are_summed_in_bfloat16_or_float32(tmp_path: Path, value: object) -> None:
    assert "communication_data_type must be bf16 or fp32" in refusal(
        tmp_path, {**AUTO, "communication_data_type": value}
    )
    for known in ("bf16", "fp32"):
        load_ds_config(write(tmp_path, {**AUTO, "communication_data_type": known}))


@pytest.mark.parametrize("content", [[], 3, {**AUTO, "zero_optimization": 3}, {**AUTO, "zero_optimization": [1]}])
def test_json_of_another_form_is_refused(tmp_path: Path, content: object) -> None:
    refusal(tmp_path, content)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"zero_optimization": {"stage": ' + "9" * 5000 + "}}", '{"a": NaN}'])
def test_a_file_that_would_surprise_its_reader(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UserError, match=r"odd\.json: cannot be read as JSON"):
        load_ds_config(str(tmp_path / "odd.json"))


@pytest.mark.parametrize("value", [-1, 1.5, True, "many", None, [1], 2**63])
@pytest.mark.parametrize("key", ["reduce_bucket_size", "stage3_max_reuse_distance"])
def test_sizes_are_whole_numbers(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"zero_optimization": {"stage": 3, key: value}}))
    with pytest.raises(UserError, match=f"zero_optimization.{key} must be a whole number"):
        load_ds_config(str(tmp_path / "odd.json"))


def test_switches_are_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": "yes"}}))
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_comm must be true or false, not 'yes'"):
        load_ds_config(str(tmp_path / "odd.json"))


def test_a_batch_of_two_thousand_million_is_divided_at_once() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 200))
    with pytest.raises(UserError, match=r"start 2 or 4 ranks or set training.batch=999999999 or 1000000002"):
        divide_batch(10**9, "auto", 3)
    with pytest.raises(UserError, match=r"set training.micro_batch=6 or 9"):
        divide_batch(2 * 3**19 // 3, 7, 1)


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
            for micro in ("auto", *range(1, 13)):
                share = batch / world
                fits = share.is_integer() and (micro == "auto" or (share / micro).is_integer())
                if fits:
                    division = divide_batch(batch, micro, world)
                    assert division.world * division.micro_batch * division.accumulation == batch == division.batch
                    assert division.world == world
                    assert division.micro_batch == (int(share) if micro == "auto" else micro)
                else:
                    with pytest.raises(UserError) as caught:
                        divide_batch(batch, micro, world)
                    check_remedies(str(caught.value), batch, micro, world)


def check_remedies(text: str, batch: int, micro: Literal["auto"] | int, world: int) -> None:
    """Every size that a refusal names really divides."""
    if batch % world:
        ranks = re.search(r"start ([\d or]+) ranks", text)
        batches = re.search(r"set training\.batch=([\d or]+)", text)
        assert ranks and batches, text
        named = [int(n) for n in re.findall(r"\d+", ranks[1])]
        assert named
        assert all(divide_batch(batch, "auto", n).batch == batch for n in named)
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        assert named == nearest(fitting, world)
        sizes = [int(n) for n in re.findall(r"\d+", batches[1])]
        assert sizes
        assert all(n > 0 and abs(n - batch) < world and divide_batch(n, "auto", world).batch == n for n in sizes)
    else:
        named = [int(n) for n in re.findall(r"\d+", text.split("set training.micro_batch=")[1])]
        assert named
        assert all(divide_batch(batch, n, world).batch == batch for n in named)
        assert micro != "auto"
        assert named == nearest(
            [n for n in range(1, batch + 1) if batch // world % n == 0 and n * world <= batch], micro
        )


def nearest(fitting: list[int], wanted: int) -> list[int]:
    """The fitting sizes on both sides of one that does not fit."""
    below, above = [n for n in fitting if n < wanted], [n for n in fitting if n > wanted]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_remembers_serves_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    config = load_config("xl", ["training.precision=bfloat16"] if name != "zero0" else ["training.precision=float32"])
    source = load_ds_config(name)
    two, four = (divide_batch(64, 4, world) for world in (8, 16))
    kept = remembered(source, resolve(source, config, two, 4))
    assert kept["train_batch_size"] == two.world * two.micro_batch * two.accumulation
    again = load_ds_config(write(tmp_path, kept))
    assert resolve(again, config, two, 4) == resolve(source, config, two, 4)
    assert resolve(again, config, four, 8) == resolve(source, config, four, 8)
    for damaged in ([3], ["zero_optimization.stage.x"], "stage", None):
        with pytest.raises(UserError, match="filled_in does not fit it"):
            load_ds_config(write(tmp_path, {**kept, "filled_in": damaged}))
