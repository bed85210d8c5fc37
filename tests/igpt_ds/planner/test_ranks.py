"""The planner against DeepSpeed on CPU ranks: its own log of messages, the bytes of its tensors, and the presets'
losses."""

from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config.size import parameter_count
from igpt_ds.planner.communication import transfers
from igpt_ds.planner.memory import bytes_per_rank
from tests.helpers.ranks import recorded
from tests.workers.plan import CASES, GROUPED, MEASURED, MESSAGES, OFFLOADED, RESUMED, Case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
Record = dict[str, Any]


class Ranks:
    """What the workers of each world size recorded; each is run when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, world: int) -> list[dict[str, Record]]:
        """The records of all ranks, by case."""
        return recorded("tests.workers.plan", self.folder, world, limit=600)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("plan"))


def logged(record: Record, world: int) -> dict[str, int]:
    """Bytes that a rank sent, from DeepSpeed's log: it has the input of each call, a ring sends the rest of the ranks'.

    Left out are messages of up to 8 bytes: norms and flags.
    """
    sent = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 0, "all_reduce": 0, "reduce": 0}
    for operation, sizes in record["messages"].items():
        for size, calls in ((int(size), calls) for size, calls in sizes.items()):
            share = {
                "all_gather_into_tensor": size * (world - 1),
                "all_reduce": 2 * size * (world - 1) // world,
            }.get(operation, size * (world - 1) // world)
            sent[operation] += calls * share if size > 8 else 0
    return sent


@pytest.mark.parametrize("case", MESSAGES, ids=lambda case: case.name)
def test_messages_are_those_that_deepspeed_logs(ranks: Ranks, case: Case) -> None:
    planned = {transfer.operation: transfer for transfer in transfers(case.layout(2))}
    gathered = sum(t.sent for name, t in planned.items() if name.startswith("gather"))
    reduced = sum(t.sent for name, t in planned.items() if name in ("reduce gradients", "scatter gradients"))
    for rank in ranks(2):
        found = logged(rank[case.name], 2)
        assert found["all_gather_into_tensor"] == gathered
        assert found["reduce_scatter_tensor"] + found["all_reduce"] + found["reduce"] == reduced
    assert gathered > 0 or case.ds == "zero0"


def test_hpz_gathers_once_over_all_ranks_and_then_within_a_node(ranks: Ranks) -> None:
    case = CASES[4][1]
    layout = case.layout(4)
    assert layout.hpz_group == 2
    planned = {transfer.operation: transfer for transfer in transfers(layout)}
    assert planned["gather weights"].ranks == 4 and planned["gather in node"].ranks == 2
    for rank in ranks(4):
        # The log does not tell the group: of the same whole a rank's input is a quarter or a half.
        gathered = sum(int(n) * calls for n, calls in rank[case.name]["messages"]["all_gather_into_tensor"].items())
        quarter, half = planned["gather weights"].size // 4, planned["gather in node"].size // 2
        assert gathered == quarter + half + planned["gather small weights"].size // 4


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_memory_is_what_the_tensors_take(ranks: Ranks, case: Case) -> None:
    layout = case.layout(2)
    planned = bytes_per_rank(layout, gpu=False)
    assert parameter_count(layout.config) > 3_000_000
    stays = planned.states + planned.resting
    # Below stage 3 gradients come and go with each step, but for those that stage 1 in bfloat16 sums up.
    summed = layout.stage == 1 and layout.bf16
    if layout.stage < 3:
        stays -= planned.gradients - (4 * parameter_count(layout.config) if summed else 0)
    records = [rank[case.name] for rank in ranks(2)]
    for record in records:
        assert record["stays"] == pytest.approx(stays, rel=0.02)
    if not layout.bf16:
        # A CPU's norms in bfloat16 keep float32 copies, which a GPU's do not. The plan is of the rank that takes most:
        # below stage 3 the last one, whose gradients arrive first.
        most = max(record["stays"] + max(record["passes"], record["step"]) for record in records)
        assert most == pytest.approx(planned.total, rel=0.05)


def test_gradients_are_copied_for_the_optimiser_group_by_group(ranks: Ranks) -> None:
    whole, grouped = MEASURED[0], MEASURED[2]
    assert whole.name in grouped.name and "sub_group_size" in grouped.name
    planned = [bytes_per_rank(case.layout(2), gpu=False).optimizer_step for case in (whole, grouped)]
    assert planned[1] < planned[0] / 3
    for rank in ranks(2):
        taken = [rank[case.name]["step"] - rank[case.name]["left"] for case in (whole, grouped)]
        assert taken[0] - taken[1] == pytest.approx(planned[0] - planned[1], rel=0.1)


@pytest.mark.parametrize("case", OFFLOADED, ids=lambda case: case.name)
def test_offload_changes_no_loss(ranks: Ranks, case: Case) -> None:
    plain = Case("zero3", case.precision)
    for rank in ranks(2):
        expected = rank[plain.name]["losses"]
        assert expected[0] != expected[-1]
        assert rank[case.name]["losses"] == pytest.approx(expected, rel=1e-3 if case.precision == "bfloat16" else 1e-6)


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_updating_group_by_group_changes_no_loss(ranks: Ranks, case: Case) -> None:
    for rank in ranks(2):
        assert rank[case.name]["losses"] == rank[Case("zero3", case.precision).name]["losses"]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(ranks: Ranks, case: Case) -> None:
    world = 4 if case in CASES[4] else 2
    for rank in ranks(world):
        assert rank[case.name]["resumed"] == rank[case.name]["losses"]


def test_hpz_changes_no_loss(ranks: Ranks) -> None:
    plain, grouped = CASES[4]
    for rank in ranks(4):
        assert rank[grouped.name]["losses"] == pytest.approx(rank[plain.name]["losses"], rel=1e-6)
