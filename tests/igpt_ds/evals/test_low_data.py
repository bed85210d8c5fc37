"""Few labels a class: the subsets, their statistics, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from igpt_ds.dataset.shards import Dataset
from igpt_ds.dataset.subset import balanced
from igpt_ds.evals.low_data import SUBSETS, judge
from igpt_ds.features.cache import Features
from igpt_ds.features.splits import Scored
from tests.helpers.commands import call
from tests.helpers.models import small_config
from tests.igpt_ds.evals.test_probe import make_run

pytestmark = pytest.mark.usefixtures("one_thread")


LABELS = np.repeat([0, 1, 2], [50, 80, 65])[np.random.default_rng(0).permutation(195)]


@pytest.mark.parametrize("layers", [(6,), (4, 6)])
def test_mean_and_deviation_are_those_of_scikit_learn_on_the_same_subsets(layers: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(3, 8))

    def features(labels: np.ndarray) -> Features:
        layers = np.stack([generator.normal(size=(len(labels), 8)), centres[labels]])
        return Features((4, 6), (layers + generator.normal(size=layers.shape)).astype(np.float32), labels)

    train, test = features(LABELS), features(generator.integers(0, 3, 300))
    found = judge(train, Scored(test), layers, (2, 20), 1.0, small_config("seed=9"))
    given, asked = (np.concatenate([each.of(layer) for layer in layers], axis=1) for each in (train, test))
    for count in (2, 20):
        accuracies = []
        for repeat in range(SUBSETS):
            chosen = balanced(LABELS, count, 9, repeat)
            scaler = StandardScaler().fit(given[chosen].astype(np.float64))
            model = LogisticRegression(max_iter=1000).fit(scaler.transform(given[chosen]), LABELS[chosen])
            accuracies.append(model.score(scaler.transform(asked), test.labels))
        result = found[str(count)]
        assert result["accuracies"] == pytest.approx(accuracies, abs=1.5 / 300)
        centre = sum(result["accuracies"]) / 5
        assert result["mean"] == pytest.approx(centre)
        assert result["std"] == pytest.approx((sum((a - centre) ** 2 for a in result["accuracies"]) / 4) ** 0.5)
        assert result["n"] == 300 and result["masks"] is None and result["std"] > 0
    assert found["20"]["mean"] > found["2"]["mean"] > 0.4


def test_masks_are_ensembled_in_each_subset() -> None:
    labels = np.arange(60) % 3
    layers = (10 * np.eye(3)[labels])[None].astype(np.float32)
    clear, blind = Features((0,), layers, labels), Features((0,), np.zeros_like(layers), labels)
    found = judge(clear, Scored(blind, [blind, clear, clear], clear), (0,), (5,), 1.0, small_config())["5"]
    assert found["masks"] == {"count": 3, "accuracies": [1.0] * 5, "mean": 1.0, "std": 0.0}
    assert found["mean"] == pytest.approx(1 / 3)  # under the first mask alone


def test_command_takes_the_probes_best_layer_and_refuses_what_does_not_fit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(digits, tmp_path / "run")

    def refused(*words: object) -> str:
        assert call(monkeypatch, "low-data", run, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("igpt-ds: "), lines
        return lines[0]

    assert "run igpt-ds probe first" in refused("--labels", "4")
    assert call(monkeypatch, "probe", run, "--regularisation", 1) == 0
    record = json.loads((run / "probe.json").read_text())
    capsys.readouterr()
    assert call(monkeypatch, "low-data", run, "--labels", "9, 3") == 0
    found = json.loads((run / "low_data.json").read_text())
    assert (found["layers"], found["step"], found["split"]) == ([record["best_layer"]], 7, "val")
    assert (found["norm"], found["precision"], found["store"]) == ("first", "float32", "float32")
    assert list(found["labels_per_class"]) == ["3", "9"]
    printed = capsys.readouterr().out
    images = Dataset.open(digits / "val").rows
    for result in found["labels_per_class"].values():
        assert result["n"] == images and len(result["accuracies"]) == 5
        assert f"{result['mean']:.4f}  {result['std']:.4f}" in printed
    assert "sample standard deviation" in printed
    # The probe's features are used again.
    assert len(list((run / "features").iterdir())) == 2

    assert "images: ask for at most" in refused("--labels", "4,400")
    assert "not of the form" in refused("--labels", "4,x")
    assert "layers 0 to 2" in refused("--labels", "4", "--layer", "3")
    (run / "probe.json").write_text(json.dumps({**record, "checkpoint": "0" * 64, "step": 5}))
    assert "a probe of another checkpoint (step 5)" in refused("--labels", "4")


def test_command_takes_the_very_features_that_did_best_in_the_probe(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers side by side, their norm, the network's precision, the type that they are kept in."""
    run = make_run(digits, tmp_path / "run")
    how = ("--norm", "none", "--precision", "bfloat16", "--store", "float16", "--concatenate", 2)
    assert call(monkeypatch, "probe", run, "--regularisation", 1, *how) == 0
    record = json.loads((run / "probe.json").read_text())
    best = record["best_layer"]
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "features").iterdir()}

    def features_of(**changes: object) -> dict[str, object]:
        (run / "probe.json").write_text(json.dumps({**record, **changes}))
        assert call(monkeypatch, "low-data", run, "--labels", 3) == 0
        found = json.loads((run / "low_data.json").read_text())
        return {key: found[key] for key in ("layers", "norm", "precision", "store")}

    same = {"norm": "none", "precision": "bfloat16", "store": "float16"}
    side_by_side = {**record["concatenation"][0], "layers": [1, 2], "accuracy": 1.0}
    assert features_of(concatenation=[side_by_side]) == {"layers": [1, 2], **same}
    assert "layers 1, 2, norm none, bfloat16 network, float16 features" in capsys.readouterr().out
    assert features_of(concatenation=[{**side_by_side, "accuracy": 0.0}]) == {"layers": [best], **same}
    assert {path.name: path.stat().st_mtime_ns for path in (run / "features").iterdir()} == kept, "none was taken anew"
    assert features_of(concatenation=None)["layers"] == [best]

    for damage in ({"norm": "last"}, {"layers": []}, {"layers": [{"layer": "1", "accuracy": 1.0}]}, {"store": 16}):
        (run / "probe.json").write_text(json.dumps({**record, "concatenation": None, **damage}))
        assert call(monkeypatch, "low-data", run, "--labels", 3) == 2
        assert "no record of a probe: run igpt-ds probe first" in capsys.readouterr().err
    assert call(monkeypatch, "low-data", run, "--labels", 3, "--layer", 1) == 0  # as if there had been no probe
    found = json.loads((run / "low_data.json").read_text())
    assert [found[key] for key in ("layers", "norm", "precision", "store")] == [[1], "first", "float32", "float32"]
