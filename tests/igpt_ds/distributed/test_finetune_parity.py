"""Fine-tuning through ZeRO against plain PyTorch in one process: losses, accuracy, gradients, evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import masked_pixel
from tests.helpers.models import random_model, save_model
from tests.helpers.ranks import recorded
from tests.workers.finetune import BATCH, CASES, CLASSES, LAYERS, RATE, STEPS, Case, labels, start
from tests.workers.parity import SEED, images

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]
EVALUATED = {1: np.arange(1000, 1003), 2: np.array([1000, 1001, 1002, 1004, 1005, 1006])}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> what each rank recorded."""
    folder = tmp_path_factory.mktemp("finetune")
    for objective in ("next_pixel", "masked_pixel"):
        config = Case(0, 0, objective=objective).config(1, finetune=False)
        save_model(random_model(config, seed=3), config, folder / objective, "palette")
    found = {world: recorded("tests.workers.finetune", folder, world, limit=240) for world in CASES}
    found[0] = [{"folder": str(folder)}]
    return found


class Plain:
    """The same fine-tuning by torch alone, the whole batch at once; the head stands outside the network."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.config = case, case.config(1, finetune=False)
        self.model = ImageGPT(self.config)
        self.model.load_state_dict(Checkpoint.open(start(folder, case.objective)).weights())
        self.head = torch.nn.Parameter(torch.zeros(CLASSES, 32))
        self.parameters = [*self.model.parameters(), self.head]
        self.adam = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def scores(self, positions: np.ndarray, seed: int = SEED) -> tuple[torch.Tensor, torch.Tensor, Any]:
        tokens = torch.from_numpy(images(positions))
        mask = None
        if self.case.objective == "masked_pixel":
            config = self.config.__class__(**{**self.config.__dict__, "seed": seed})
            mask = masked_pixel.mask(tokens, torch.from_numpy(positions), config.seed, config.objective.mask_rate)
        layer = LAYERS if self.case.layer is None else self.case.layer
        output = self.model(tokens, mask, features=[layer])
        nats = F.cross_entropy(output.logits_BTK.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        gen = torch.stack([n[m].mean() for n, m in zip(nats, mask, strict=True)]) if mask is not None else nats.mean(1)
        return output.features[layer] @ self.head.T, gen, torch.from_numpy(labels(positions))

    def measure(self, positions: np.ndarray) -> list[torch.Tensor]:
        scores, gen, truth = self.scores(positions)
        clf = (scores.logsumexp(1) - scores[torch.arange(len(truth)), truth]).mean()
        right = (scores.max(1).indices == truth).float().mean()
        if not self.case.weight:
            return [clf, right]
        return [self.case.weight * gen.mean() + clf, gen.mean(), clf, right]

    def step(self, step: int) -> tuple[list[float], float]:
        measured = self.measure(np.arange(step * BATCH, (step + 1) * BATCH))
        self.adam.zero_grad()
        measured[0].backward()
        norm = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]).norm().item()
        self.adam.step()
        return [value.item() for value in measured], norm


@pytest.mark.parametrize(("world", "case"), [pytest.param(w, c, id=f"{w}-{c.name}") for w in CASES for c in CASES[w]])
def test_it_is_plain_torch(records: dict[int, list[dict[str, Any]]], world: int, case: Case) -> None:
    plain = Plain(case, Path(records[0][0]["folder"]))
    steps = [plain.step(step) for step in range(STEPS)]
    expected = plain.measure(EVALUATED[world])
    learnt = plain.measure(np.arange(BATCH))[0].item()
    assert learnt < 0.998 * steps[0][0][0], "too little happens for a comparison"
    for rank, every in enumerate(records[world]):
        found = every[case.name]
        assert len(found["names"]) == (4 if case.weight else 2)
        clf = found["names"].index("clf_loss") if case.weight else 0
        assert found["measured"][0][clf] == pytest.approx(np.log(CLASSES), abs=1e-6)  # the class head is zero
        for (measured, norm), mine, my_norm in zip(steps, found["measured"], found["norms"], strict=True):
            assert mine == pytest.approx(measured, rel=1e-5)
            assert my_norm == pytest.approx(norm, rel=1e-4)
        assert found["count"] == len(EVALUATED[world])
        means = [total / found["count"] for total in found["totals"]]
        assert means == pytest.approx([value.item() for value in expected], rel=1e-5)
        positions = np.arange(1000 + 4 * rank, 1004 + 4 * rank)
        for seed, predicted in zip((SEED, 77), found["predictions"], strict=True):
            assert predicted == plain.scores(positions, seed)[0].argmax(1).tolist()
