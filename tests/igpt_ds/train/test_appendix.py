"""What appendix A.1 of the paper compares: weight decay, a tied head, heads that do not begin at 0."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.config.schema import identity
from igpt_ds.config.size import parameter_count
from igpt_ds.errors import UserError
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.planner.layout import module_sizes
from igpt_ds.run.metrics import read_metrics
from igpt_ds.weights.convert import convert
from tests.helpers.commands import call, pretrain, run_command
from tests.helpers.models import random_model, save_model, small_config

DECAY, RATE = 0.5, 0.01


@pytest.mark.distributed
@pytest.mark.parametrize("ds", ["zero0", "zero1", "zero2", "zero3"])
def test_weight_decay_is_adamws_and_leaves_gains_alone(digits: Path, tmp_path: Path, ds: str) -> None:
    """One step from the same weights with the same gradient: p - p' = rate * decay * p_0, whatever Adam adds."""
    sets = ["training.steps=1", "training.warmup_steps=0", "training.schedule=constant", "training.validate_every=0"]
    sets += [f"training.learning_rate={RATE}", "training.head_std=0.1", "training.precision=float32"]
    found = {}
    for decay in (0.0, DECAY):
        run = tmp_path / str(decay)
        words = [word for fact in [*sets, f"training.weight_decay={decay}"] for word in ("--set", fact)]
        run_command(pretrain(digits, run, "--ds", ds, *words), tmp_path / "output.txt")
        found[decay] = Checkpoint.open(run / "checkpoints" / "step-00000001").weights()
    before = ImageGPT(small_config("training.head_std=0.1", resolution=8, palette_size=16))
    initialise(before, 1)
    for name, p in before.named_parameters():
        change = found[0.0][name] - found[DECAY][name]
        expected = torch.zeros_like(p) if name.endswith("gain") else RATE * DECAY * p
        torch.testing.assert_close(change, expected.detach(), rtol=1e-4, atol=3e-7)
        assert not torch.equal(found[0.0][name], p)  # a step was made


def test_a_tied_head_is_the_embedding_and_gets_both_gradients() -> None:
    tied, apart = (random_model(small_config(f"model.tied={tied}")) for tied in ("true", "false"))
    assert apart.head is not None
    weights = tied.state_dict()
    assert "head.weight" not in weights
    apart.load_state_dict({**weights, "head.weight": weights["token_embedding"]})
    tokens = torch.randint(0, 8, (3, 16), generator=torch.Generator().manual_seed(0))
    for model in (tied, apart):
        logits = model(tokens).logits_BTK
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(tied(tokens).logits_BTK, apart(tokens).logits_BTK)
    assert apart.head.weight.grad is not None and apart.token_embedding.grad is not None
    torch.testing.assert_close(tied.token_embedding.grad, apart.token_embedding.grad + apart.head.weight.grad)


def test_a_tied_network_is_counted_as_it_is() -> None:
    for classes in ([], ["finetune.classes=3"]):
        config = small_config("model.tied=true", *classes)
        total = sum(p.numel() for p in ImageGPT(config).parameters())
        sizes = module_sizes(config)
        assert parameter_count(config) == total
        assert sum(sizes.root) + config.model.layers * sum(sizes.block) + sum(sizes.after) == total
    assert "tied" not in identity(small_config())["model"]  # as older checkpoints have it
    assert identity(small_config("model.tied=true"))["model"]["tied"]


@pytest.mark.distributed
def test_a_tied_network_trains_alike_at_every_stage_and_is_evaluated(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["model.tied=true", "training.steps=6", "training.validate_every=6", "checkpoint.every=3"]
    words = [word for fact in sets for word in ("--set", fact)]
    losses = {}
    for ds in ("zero0", "zero2", "zero3"):
        run = tmp_path / ds
        run_command(pretrain(digits, run, "--ds", ds, *words), tmp_path / "output.txt")
        losses[ds] = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        assert losses[ds] == pytest.approx(losses["zero0"], rel=1e-5) and losses[ds][-1] < losses[ds][0]
    assert losses["zero0"][0] == pytest.approx(math.log(16), rel=0.05)
    run = tmp_path / "zero3"
    text = run_command(["pretrain", str(run), "--ds", "zero1", "--set", "training.steps=8"], tmp_path / "output.txt")
    assert "resumed from" in text
    for command in (["probe", run, "--regularisation", 1], ["eval", run], ["sample", run, "--images", 2, "--out"]):
        more = [tmp_path / "samples.png"] if command[0] == "sample" else []
        assert call(monkeypatch, *command, *more) == 0, capsys.readouterr().err
    found = json.loads((run / "eval.json").read_text())
    step_8 = next(line for line in read_metrics(run / "metrics.jsonl") if line["step"] == 8 and "val_loss" in line)
    assert found["nats_per_token"] == pytest.approx(step_8["val_loss"], rel=1e-5)


def test_a_tied_network_is_converted_to_our_own_format_alone(tmp_path: Path) -> None:
    config = small_config("model.tied=true")
    save_model(random_model(config), config, tmp_path / "run", "0" * 64)
    for target in ("hf", "safetensors", "npz"):
        with pytest.raises(UserError, match=f"its head is its token embedding, which {target} does not know"):
            convert(tmp_path / "run", tmp_path / "other", target)
    convert(tmp_path / "run", tmp_path / "native", "native")


def test_heads_begin_as_they_are_asked_to() -> None:
    for std in (0.0, 0.02):
        model = ImageGPT(small_config("finetune.classes=40", f"training.head_std={std}", "model.width=64"))
        initialise(model, 0)
        assert model.head is not None
        for weight in (model.head.weight, model.class_head.weight):
            assert float(weight.detach().std()) == pytest.approx(std, rel=0.2)
        bare = ImageGPT(small_config("finetune.classes=40", "model.width=64"))
        initialise(bare, 0)
        assert torch.equal(model.blocks[0].mlp.up.weight, bare.blocks[0].mlp.up.weight)


@pytest.mark.parametrize("fact", ["training.weight_decay=-0.1", "training.head_std=-1.0"])
def test_negative_figures_are_refused(fact: str) -> None:
    with pytest.raises(UserError, match="must not be negative"):
        small_config(fact)
