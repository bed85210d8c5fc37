"""What a fine-tuning writes at its end, with an engine that is played."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError
from igpt_ds.run.directory import Run
from igpt_ds.train.result import conclude
from tests.helpers.models import small_config


def played(digits: Path, masks: int = 0, scores: float = 1.0) -> tuple[Any, Any]:
    """An engine that finds an accuracy of a half, and the job of a fine-tuning without a test split."""
    dataset = Dataset.open(digits / "val")
    config = small_config("finetune.classes=10", resolution=8, palette_size=16)
    engine = SimpleNamespace(
        ranks=Ranks(),
        measures=("loss", "accuracy"),
        evaluate=lambda batches: ([2.0 * dataset.rows, 0.5 * dataset.rows], float(dataset.rows)),
        predict=lambda batch, seeds: torch.full((masks, len(batch["labels"])), 3 if math.isfinite(scores) else -1),
    )
    sets: dict[str, Any] = {"train_sets": [dataset], "validation_set": dataset, "test_set": None}
    return engine, SimpleNamespace(config=config, masks=masks, division=SimpleNamespace(micro_batch=16), **sets)


def test_without_a_best_validation_the_network_is_evaluated(digits: Path, tmp_path: Path) -> None:
    engine, job = played(digits)
    conclude(engine, job, Run(tmp_path), SimpleNamespace(best=None, step=5))  # type: ignore[arg-type]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["accuracy"], result["best_step"], result["n"]) == (0.5, 5, job.validation_set.rows)


def test_scores_that_are_not_finite_give_no_result(digits: Path, tmp_path: Path) -> None:
    progress: Any = SimpleNamespace(best=(5, 0.5), step=5)
    engine, job = played(digits, masks=2)
    conclude(engine, job, Run(tmp_path), progress)
    share = float((job.validation_set.labels() == 3).mean())
    assert json.loads((tmp_path / "result.json").read_text())["masks"] == {"count": 2, "accuracy": share}
    (tmp_path / "result.json").unlink()
    engine, job = played(digits, masks=2, scores=math.nan)
    with pytest.raises(RunError, match="the scores of 67 of 67 images are not finite: no result"):
        conclude(engine, job, Run(tmp_path), progress)
    assert not (tmp_path / "result.json").exists()
