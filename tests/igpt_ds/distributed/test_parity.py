"""ZeRO training on several ranks against plain PyTorch in one process, and checkpoints between world sizes."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt_ds.config.schema import HealthConfig
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.objectives import masked_pixel
from tests.helpers.ranks import recorded
from tests.workers.parity import (
    BATCH,
    CASES,
    LOADED,
    RESUMED,
    SEED,
    STEPS,
    SUMMED_IN_BFLOAT16,
    SUMMED_IN_FLOAT32,
    Case,
    images,
    rate,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]
Curves = dict[str, list[float]]


class Ranks:
    """What the workers of each world size recorded; each is run when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, world: int) -> list[dict[str, Any]]:
        """The records of all ranks."""
        if world != 2:
            self(2)  # writes the checkpoints that the others load
        return recorded("tests.workers.parity", self.folder, world, limit=500)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("parity"))


def plain(case: Case) -> Curves:
    """The same training by torch alone: float32, the whole batch at once, AdamW."""
    alike = {"objective": case.objective, "clip": case.clip, "width": case.width, "heads": case.heads}
    return _plain(Case(checkpointing="none", **alike))


@functools.cache
def _plain(case: Case) -> Curves:
    config = case.config(world=1)
    model = ImageGPT(config)
    initialise(model, SEED)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    curves: Curves = {"losses": [], "norms": []}
    for step in range(STEPS):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        tokens_BT = torch.from_numpy(images(positions))
        if case.objective == "next_pixel":
            logits_BTK = model(tokens_BT).logits_BTK
            loss = F.cross_entropy(logits_BTK.flatten(0, 1), tokens_BT.flatten())
        else:
            mask_BT = masked_pixel.mask(tokens_BT, torch.from_numpy(positions), config.seed, config.objective.mask_rate)
            logits_BTK = model(tokens_BT, mask_BT).logits_BTK
            each = [F.cross_entropy(k[m], t[m]) for k, t, m in zip(logits_BTK, tokens_BT, mask_BT, strict=True)]
            loss = torch.stack(each).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or math.inf)
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
        curves["losses"].append(loss.item())
        curves["norms"].append(norm.item())
    assert curves["losses"][-1] < 0.95 * curves["losses"][0], "too little happens for a comparison"
    return curves


def distance(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("world", "case"), [pytest.param(w, c, id=f"{w}-{c.name}") for w in (2, 1, 4) for c in CASES[w]]
)
def test_losses_and_gradients_are_those_of_plain_torch(ranks: Ranks, world: int, case: Case) -> None:
    expected = plain(case)
    loose = "bf" in case.precision + case.summed_in
    for record in ranks(world):
        found = record["parity"][case.name]
        assert distance(found["losses"], expected["losses"]) < (3e-2 if loose else 1e-5)
        # Small differences of large sums: gradients agree to fewer digits than losses.
        assert distance(found["norms"], expected["norms"]) < (0.2 if loose else 1e-4)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_no_module_is_kept_from_step_to_step(ranks: Ranks, world: int) -> None:
    """DeepSpeed forgets to strike out those that were computed again: a gigabyte in a run of iGPT-XL."""
    for record in ranks(world):
        assert set(record["left_open"].values()) == {0}, record["left_open"]


def test_one_rank_sums_up_with_nobody(ranks: Ranks) -> None:
    """Gradients would be copied for it, and in bfloat16 rounded; of some optimisers of DeepSpeed it is a part."""
    (alone,), (first, _) = ranks(1), ranks(2)
    named = {case.name: case for case in (*CASES[1], *CASES[2])}
    lower = {name for name, case in named.items() if case.stage == 0 or (case.stage, case.precision) == (1, "bfloat16")}
    for record, expected in ((alone, False), (first, True)):
        found = {name: elements > STEPS * 5000 for name, elements in record["summed"].items() if name in lower}
        assert found and set(found.values()) == {expected}, record["summed"]


@pytest.mark.parametrize("world", [2, 4])
def test_no_group_gives_up_before_the_watchdog(ranks: Ranks, world: int) -> None:
    """Neither ours nor DeepSpeed's: its own, and those that share an image."""
    latest = 2 * HealthConfig().hang_timeout + 30  # see guard.py
    for record in ranks(world):
        assert min(record["waits"].values()) > latest, record["waits"]


@pytest.mark.parametrize("case", SUMMED_IN_BFLOAT16, ids=lambda case: case.name)
def test_gradients_are_summed_in_bfloat16_where_that_is_chosen(ranks: Ranks, case: Case) -> None:
    """Of two ranks' sums each number has lost up to 2^-8 of itself, and the first norm a little of that."""
    first, expected = ranks(2)[0]["parity"][case.name]["norms"][0], plain(case)["norms"][0]
    assert 1e-6 < abs(first / expected - 1) < 2**-8
    unchanged = ranks(2)[0]["parity"]["zero3" + case.name.removeprefix(f"zero{case.stage}").removesuffix("bf16")]
    assert abs(unchanged["norms"][0] / expected - 1) < 1e-6


@pytest.mark.parametrize("case", SUMMED_IN_FLOAT32, ids=lambda case: case.name)
def test_bfloat16_gradients_are_summed_in_float32_where_that_is_chosen(ranks: Ranks, case: Case) -> None:
    """The same steps but for the sums' rounding, which the losses show."""
    record = ranks(2)[0]["parity"]
    found, shipped = record[case.name]["losses"], record[case.name.removesuffix("fp32")]["losses"]
    assert found[0] == shipped[0] and found[1:] != shipped[1:]
    assert distance(found, shipped) < 3e-2


def test_clipping_makes_a_difference() -> None:
    free, clipped = plain(Case()), plain(Case(clip=0.5))
    assert max(free["norms"]) > 0.5
    assert distance(clipped["losses"], free["losses"]) > 1e-3


@pytest.mark.parametrize(
    ("world", "case"), [pytest.param(w, c, id=f"{w}-{c.name}") for w in RESUMED for c in RESUMED[w]]
)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(ranks: Ranks, world: int, case: Case) -> None:
    for record in ranks(world):
        assert record["resumed"][case.name] == record["parity"][case.name]
        assert record["in_place"][case.name], "what is saved is the optimiser's own memory, and no copy"


@pytest.mark.parametrize(
    ("world", "source", "case"),
    [pytest.param(w, s, c, id=f"{s.name} on 2 as {c.name} on {w}") for w in LOADED for s, c in LOADED[w]],
)
def test_a_checkpoint_serves_another_world_size_and_stage(ranks: Ranks, world: int, source: Case, case: Case) -> None:
    unbroken = ranks(2)[0]["parity"][source.name]
    for record in ranks(world):
        found = record["loaded"][f"{source.name} as {case.name}"]
        assert distance(found["losses"], unbroken["losses"][10:]) < 1e-5
        assert distance(found["norms"], unbroken["norms"][10:]) < 1e-4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_initial_weights_do_not_depend_on_the_world_size(ranks: Ranks, world: int) -> None:
    ranks(world)
    model = ImageGPT(Case(width=30).config(world=1))
    initialise(model, SEED)
    slices = [np.load(ranks.folder / f"weights-{world}-{rank}.npz") for rank in range(world)]
    for name, parameter in model.named_parameters():
        joined = np.concatenate([part[name] for part in slices])[: parameter.numel()]
        np.testing.assert_array_equal(joined, parameter.detach().flatten(), err_msg=name)


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_ever_holds_the_whole_model(ranks: Ranks, world: int) -> None:
    for record in ranks(world):
        construction = record["construction"]
        sizes = {name: p["elements"] for name, p in construction["parameters"].items()}
        largest = max(sizes.values())
        # A module is divided when its constructor is done: the root's own tables wait for those of its children.
        own = sum(size for name, size in sizes.items() if "." not in name)
        assert largest <= construction["building"] <= own + largest < sum(sizes.values()) / 2
        assert construction["drawing"] == largest
        for name, p in construction["parameters"].items():
            assert p["here"] == math.ceil(p["elements"] / world), name
            assert p["whole"] == 0, name
