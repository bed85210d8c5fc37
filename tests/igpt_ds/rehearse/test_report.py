"""What is made of measurements: by hand here, since a GPU is not at hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_ds.errors import RunError, UserError
from igpt_ds.planner.choose import Here
from igpt_ds.rehearse import job, measure, report
from igpt_ds.rehearse.job import Rehearsal, Request, prepare
from igpt_ds.rehearse.measure import Measured
from igpt_ds.rehearse.watch import Phase, Watched

GIB = 2**30
H100 = Here("NVIDIA H100 80GB HBM3", int(78.5 * GIB), True, True, 64, 1)
CPU = Here("CPU", 64 * GIB, False, False, 64, 1)
XL = Request("xl", nodes=8, gpus_per_node=8)


def measured(device: str, steps: tuple[float, ...], busy: float, peak: int = 30 * GIB) -> Measured:
    phases = {"forward": Phase(GIB, 2 * GIB), "backward": Phase(0, peak - 10 * GIB), "optimizer": Phase(0, GIB)}
    kinds = {"parameters": 1, "master": 2, "moments": 3}
    watched = Watched(phases, 2.0, busy, 0.125)
    return Measured(device, kinds, 10 * GIB, watched, 3 * GIB, 40 * GIB, 9.0, 5.0, steps, 0.5, 4.0, 12345)


def rehearsed(request: Request = XL, here: Here = H100) -> Rehearsal:
    return prepare(request, here)


def test_what_a_gpu_computed_and_what_the_network_takes_are_the_step_of_the_job() -> None:
    rehearsal, slow = rehearsed(), 400.0
    assert rehearsal.real and rehearsal.device.label == "H100"
    time = rehearsal.time
    assert 0 < time.hidden_messages < 0.4 and 0 < time.optimizer < 0.1
    record = report.make_record(rehearsal, 0, measured(H100.name, (0.625, 0.725, 0.525), busy=0.4))
    # The median without what only a rehearsal copies; the device is busy for a part of it.
    assert record["seconds"]["step"] == pytest.approx(0.5)
    assert record["seconds"]["computation"] == 0.4 and record["seconds"]["host"] == pytest.approx(0.1)
    found = record["job"]
    assert found["measured"] and found["step_seconds"] == pytest.approx(0.5 + time.messages)
    assert found["images_per_second"] == pytest.approx(64 / found["step_seconds"])
    assert found["days"] == pytest.approx(2e6 * found["step_seconds"] / 86400)
    # 6 N a token, and half of attention's products, of 989 TFLOP/s on each of 64.
    flops = 64 * (4096 * 6 * (12 * 60 * 3072**2 + 512 * 3072) + 6 * 60 * 4096**2 * 3072)
    assert found["mfu"] == pytest.approx(flops / found["step_seconds"] / 64 / 989e12)
    # Messages that take longer than the passes hide them; the optimiser waits for them.
    network = dataclasses.replace(rehearsal, network=rehearsal.network / slow)
    apart = report.make_record(network, 0, measured(H100.name, (0.625,), busy=0.4))["job"]
    assert apart["step_seconds"] == pytest.approx(
        network.time.hidden_messages + network.time.optimizer + network.time.messages
    )
    assert apart["step_seconds"] > 10


def test_a_gpu_that_is_never_idle_takes_what_it_is_busy() -> None:
    record = report.make_record(rehearsed(), 0, measured(H100.name, (0.5,), busy=0.45))
    assert record["seconds"]["step"] == 0.45 and record["seconds"]["host"] == 0


def test_a_peak_beyond_nine_tenths_of_the_memory_does_not_fit() -> None:
    fits, not_fits = (
        report.make_record(rehearsed(), 0, measured(H100.name, (0.5,), 0.4, peak)) for peak in (71 * GIB, 73 * GIB)
    )
    assert fits["job"]["fits"] and not not_fits["job"]["fits"]
    assert "of one H100: fits" in report.text(fits)
    assert "DOES NOT FIT" in report.text(not_fits) and "Torch's allocator held 40 GiB" in report.text(not_fits)
    assert fits["bytes"]["peak"] == 71 * GIB


@pytest.mark.parametrize(
    ("here", "changes", "computation"),
    [
        # On a CPU a share of the step: of the 2 s that were watched, an eighth of one in messages.
        (CPU, {"resolution": 8}, 8.875 * 1.5 / 1.875),
        (H100, {"resolution": 8}, 1.5),
        (H100, {"device": "h200"}, 1.5),
    ],
)
def test_elsewhere_or_on_other_images_the_job_is_as_planned_times_what_was_measured(
    here: Here, changes: dict[str, Any], computation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available_bytes", lambda: 64 * GIB)
    rehearsal = rehearsed(dataclasses.replace(XL, **changes), here)
    assert not rehearsal.real
    assert rehearsal.planned.config.data.resolution == 64
    assert rehearsal.here.config.data.resolution == changes.get("resolution", 64)
    record = report.make_record(rehearsal, 0, measured(here.name, (9.0,), 1.5))
    assert record["seconds"]["computation"] == pytest.approx(computation)
    assert record["seconds"]["host"] == pytest.approx(8.875 - computation)
    assert record["measured_over_planned"] == pytest.approx(30 * GIB / rehearsal.memory.total)
    planned = dataclasses.replace(rehearsal, here=rehearsal.planned, gpu=H100.name).memory.total
    assert record["job"]["peak_bytes"] == pytest.approx(planned * record["measured_over_planned"], rel=1e-6)
    assert record["job"]["step_seconds"] == rehearsal.time.step and not record["job"]["measured"]
    assert "planned" in report.text(record)


def test_what_a_cpu_has_offloaded_into_its_own_memory_is_planned_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "available_bytes", lambda: 64 * GIB)
    rehearsal = rehearsed(Request("s", ds_name="zero2_offload", nodes=2, resolution=8), CPU)
    record = report.make_record(rehearsal, 15, measured(CPU.name, (9.0,), 1.5))
    memory = rehearsal.memory
    assert memory.host > 0 and record["planned_bytes"] == {"peak": memory.total + memory.host}
    found = dataclasses.replace(measured(CPU.name, (9.0,), 1.5), kinds={"parameters": GIB, "master": 0, "moments": GIB})
    rest = next(line for line in report.text(report.make_record(rehearsal, 15, found)).splitlines() if "rest " in line)
    assert rest.split()[:3] == ["rest", "28.00", "gradients,"]  # of 30 GiB; nothing planned


def test_a_cpu_runs_in_float32_what_its_machines_run_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "available_bytes", lambda: 64 * GIB)
    rehearsal = rehearsed(Request("s", nodes=8, resolution=8), CPU)
    there, here = rehearsal.planned.config.training, rehearsal.here.config.training
    assert (there.precision, there.compile) == ("bfloat16", True)
    assert (here.precision, here.compile) == ("float32", False)
    assert (here.micro_batch, here.activation_checkpointing) == (there.micro_batch, there.activation_checkpointing)
    assert rehearsal.here.layout.stage == rehearsal.planned.layout.stage
    named = rehearsed(Request("s", ["training.precision=bfloat16"], nodes=8, resolution=8), CPU)
    assert named.here.config.training.precision == "bfloat16"


def test_a_gpu_of_which_no_sheet_is_here_asks_for_one() -> None:
    unknown = dataclasses.replace(H100, name="Mine 9000")
    with pytest.raises(UserError, match="Mine 9000: its data sheet is not here: name by --device what is nearest"):
        rehearsed(here=unknown)
    assert rehearsed(dataclasses.replace(XL, device="h200"), unknown).device.label == "H200"


def test_a_step_that_was_skipped_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        division = rehearsed().here.division
        config = dataclasses.replace(rehearsed().here.config, finetune=None)
        device = torch.device("cpu")

        def train_step(self, batches: list[object], rate: float) -> tuple[None, float]:
            return None, float("nan")

    with pytest.raises(RunError, match="gradient was not finite, so the update was skipped"):
        measure._train(Engine())  # type: ignore[arg-type]


def test_what_is_offloaded_is_not_in_the_devices_memory() -> None:
    weight, master = torch.nn.Parameter(torch.empty(10, device="meta")), torch.zeros(10)
    state = {master: {"exp_avg": torch.zeros(10, device="meta"), "exp_avg_sq": torch.zeros(10), "step": torch.zeros(1)}}
    engine = SimpleNamespace(
        device=torch.device("meta"),
        module=SimpleNamespace(parameters=lambda: [weight]),
        optimizer=SimpleNamespace(state=state),
    )
    assert measure._kinds(engine) == {"parameters": 40, "master": 0, "moments": 40}  # type: ignore[arg-type]


def test_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(measure, "_measure", short)
    with pytest.raises(RunError, match=r"it does not fit: CUDA out of memory\. Tried to allocate 2\.00 GiB") as caught:
        measure.measure(rehearsed().here, None, 1, print)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_disk_without_room_for_a_part_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure.tempfile, "gettempdir", lambda: str(tmp_path))
    usage = measure.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(UserError, match=r"954 MiB are free, and a rank's part .* takes 1\.19 GiB: set TMPDIR"):
        measure.measure(rehearsed().here, None, 1, print)  # type: ignore[arg-type]
