"""Checkpoints of one to three ranks: read back exactly, and refused when damaged."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.checkpoint.names import list_checkpoints, step_directory
from igpt_ds.checkpoint.read import Checkpoint, newest_valid
from igpt_ds.errors import UserError
from tests.helpers.checkpoints import FACTS, KINDS, SHAPES, on_ranks, one_rank, originals, save_all


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}ranks".format)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_all(tmp_path_factory.mktemp("run"), 7, world=request.param))


def test_everything_is_read_back(opened: Checkpoint) -> None:
    assert (opened.step, opened.identity, opened.config) == (7, FACTS["identity"], FACTS["config"])
    opened.verify()
    weights = opened.weights()
    assert set(weights) == set(SHAPES)
    for name, values in originals().items():
        assert weights[name].shape == SHAPES[name]
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name].flatten(), values["weight"])
    for rank in range(opened.world):
        state = opened.random_state(rank)
        assert state is not None
        assert state.dtype == torch.uint8
        torch.Generator().set_state(state)
    assert opened.random_state(opened.world) is None


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), kind=st.sampled_from(KINDS), data=st.data())
def test_any_slice_is_read_back(opened: Checkpoint, name: str, kind: str, data: st.DataObject) -> None:
    whole = originals()[name][kind]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert torch.equal(opened.read(name, kind, start, stop), whole[start:stop])


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for module, name in [(torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dumps")]:
        monkeypatch.setattr(module, name, refuse)
    found = newest_valid([save_all(tmp_path, 1)], one_rank, pytest.fail)
    assert found is not None
    found.weights()
    found.random_state(0)
    assert {p.suffix for p in found.path.iterdir()} == {".json", ".safetensors"}


def cut_short(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_a_file(path: Path) -> None:
    (path / "rank-00000.safetensors").unlink()


def remove_the_mark(path: Path) -> None:
    (path / "checkpoint.json").unlink()


def half_a_mark(path: Path) -> None:
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text[: len(text) // 2])


def another_version(path: Path) -> None:
    content = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**content, "version": 2}))


def a_list(path: Path) -> None:
    (path / "checkpoint.json").write_text("[]")


def a_word(path: Path) -> None:
    (path / "checkpoint.json").write_text('"x"')


def null(path: Path) -> None:
    (path / "checkpoint.json").write_text("null")


def nested_deep(path: Path) -> None:
    (path / "checkpoint.json").write_text("[" * 100_000)


def a_pipe(path: Path) -> None:
    (path / "checkpoint.json").unlink()
    os.mkfifo(path / "checkpoint.json")


def no_text(path: Path) -> None:
    (path / "checkpoint.json").write_bytes(b"\xff\xfe\x00")


def flip_a_byte(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


DAMAGES = [cut_short, remove_a_file, remove_the_mark, half_a_mark, another_version]
DAMAGES += [a_list, a_word, null, nested_deep, a_pipe, no_text]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_does_not_open(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = save_all(tmp_path, 1, world=2)
    damage(path)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save_all(tmp_path, 1, world=2)
    rng = random.Random(0)
    for name, content in contents(path).items():
        places = range(len(content)) if name == "checkpoint.json" else rng.sample(range(len(content)), 60)
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(damaged)
            with pytest.raises(UserError):
                Checkpoint.open(path).verify()
        (path / name).write_bytes(content)
    Checkpoint.open(path).verify()


def test_a_flipped_byte_is_found_by_the_rank_that_looks(tmp_path: Path) -> None:
    path = save_all(tmp_path, 1, world=2)
    flip_a_byte(path)
    opened = Checkpoint.open(path)
    with pytest.raises(UserError, match=r"rank-00001\.safetensors: damaged"):
        opened.verify()
    opened.verify(rank=0, world=2)
    with pytest.raises(UserError, match="damaged"):
        opened.verify(rank=1, world=2)


@pytest.mark.parametrize("damage", [*DAMAGES, flip_a_byte])
@pytest.mark.parametrize("world", [1, 3])
def test_an_older_whole_one_is_taken(tmp_path: Path, damage: Callable[[Path], None], world: int) -> None:
    for step in (5, 10, 15):
        save_all(tmp_path, step, world=2, seed=step)
    for step in (10, 15):
        damage(step_directory(tmp_path, step))
    warnings: list[str] = []
    found = on_ranks(
        world, lambda r, any_rank: newest_valid(list_checkpoints(tmp_path), any_rank, warnings.append, r, world)
    )
    for one in found:
        assert isinstance(one, Checkpoint)
        assert one.step == 5
        assert torch.equal(one.weights()["start"], originals(5)["start"]["weight"])
    for name in ("step-00000015", "step-00000010"):
        assert any(name in text for text in warnings)
    assert step_directory(tmp_path, 15).exists()  # left for a person to look at


def test_no_checkpoint_is_not_the_same_as_none_whole(tmp_path: Path) -> None:
    assert newest_valid([], one_rank, pytest.fail) is None
    flip_a_byte(save_all(tmp_path, 1, world=2))
    with pytest.raises(UserError, match=r"whole.*--fresh --force"):
        newest_valid(list_checkpoints(tmp_path), one_rank, lambda _: None)
