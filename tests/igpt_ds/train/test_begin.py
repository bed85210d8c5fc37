"""What a training begins with, and that a run remembers it."""

import json
from pathlib import Path

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, remembered, resolve
from igpt_ds.config.file import from_tree, load_config, to_tree
from igpt_ds.run.directory import Run
from igpt_ds.train.begin import machine


def test_a_run_remembers_its_deepspeed_configuration(tmp_path: Path) -> None:
    run, config = Run(tmp_path), load_config("tiny")
    assert machine(None, run)["zero_optimization"]["stage"] == 3
    source = load_ds_config("zero1")
    run.ds_config.write_text(json.dumps(remembered(source, resolve(source, config, divide_batch(16, None, 2)))))
    assert machine(None, run)["zero_optimization"]["stage"] == 1
    assert machine("zero2", run)["zero_optimization"]["stage"] == 2
    assert machine(None, None)["zero_optimization"]["stage"] == 3


def test_the_beginning_of_older_fine_tunings_is_read() -> None:
    tree = to_tree(load_config("tiny"))
    tree["finetune"] = {"start": "/runs/s/checkpoints/step-00000007", "classes": 10}
    config = from_tree(tree, "old")
    assert config.init_from == "/runs/s/checkpoints/step-00000007"
    assert config.finetune is not None and config.finetune.classes == 10
