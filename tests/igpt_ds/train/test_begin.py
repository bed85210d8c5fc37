"""What a training begins with, and that a run remembers it."""

import os
from pathlib import Path

import pytest

from igpt_ds.config.file import from_tree, load_config, to_toml, to_tree
from igpt_ds.errors import UserError
from igpt_ds.run.directory import Run
from igpt_ds.train import begin
from igpt_ds.train.begin import pretraining


def test_the_beginning_of_older_fine_tunings_is_read() -> None:
    tree = to_tree(load_config("tiny"))
    tree["finetune"] = {"start": "/runs/s/checkpoints/step-00000007", "classes": 10}
    config = from_tree(tree, "old")
    assert config.init_from == "/runs/s/checkpoints/step-00000007"
    assert config.finetune is not None and config.finetune.classes == 10


@pytest.mark.parametrize("name", ["𠮷😀", 'a"b\\c', "a\nb", "a\x7fb", "[1, 2]", "true"])
def test_any_name_that_is_text_is_kept_as_it_is(tmp_path: Path, name: str) -> None:
    data = tmp_path / name
    config = pretraining("tiny", None, [str(data), str(data)], ["data.weights=[1, 2]"]).config
    assert config.data.sources == (str(data), str(data))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config


def test_a_name_that_is_no_text_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a name in its path is not UTF-8"):
        pretraining("tiny", None, [os.fsdecode(os.fsencode(tmp_path) + b"/d8_\xe9")], [])


def test_a_pre_training_that_was_moved_is_still_what_a_run_began_with(tmp_path: Path) -> None:
    before, now, run = tmp_path / "before", tmp_path / "now", Run(tmp_path / "run")
    began = before / "checkpoints" / "step-00000007"
    began.mkdir(parents=True)
    run.path.mkdir()
    run.config.write_text(to_toml(load_config("tiny", [("init_from", str(began))])))
    assert begin._weights(run, before) == str(began)
    before.rename(now)
    before.symlink_to(now)
    for named in (before, now, before / "checkpoints" / "step-00000007", None):
        assert begin._weights(run, named) == str(began)
    for named in (tmp_path, tmp_path / "other"):
        with pytest.raises(UserError, match=r"began with .*/before/.*: leave --from out, or choose another RUN"):
            begin._weights(run, named)
