"""The doctor's judgements on made-up facts, its readings on this machine, its table and exit status, and two ranks."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igpt_ds.distributed import device
from igpt_ds.doctor import devices, disk, examine, inputs, machine, ranks, speed
from igpt_ds.doctor.examine import Reading
from igpt_ds.doctor.inputs import Plan, Request
from igpt_ds.doctor.report import Check, Report, judged, judged_together, merged, table
from igpt_ds.planner.choose import Here
from igpt_ds.text import size_text, time_text
from tests.helpers import machines
from tests.helpers.checkpoints import save_all
from tests.helpers.commands import call
from tests.helpers.ranks import free_port, run_ranks

GIB = 2**30
H100 = {"name": "NVIDIA H100", "bfloat16": True}
V100 = {"name": "Tesla V100", "bfloat16": False}
SMI = {"index": "0", "name": "NVIDIA H100", "driver": "550.54", "ecc": "0"}
NEEDED = {"python": ">=3.11,<3.14", "torch": ">=2.6"}


def gpus(
    *devices_seen: dict[str, Any], smi: list[dict[str, str]] | None = None, hidden: bool = False
) -> dict[str, Any]:
    return {"devices": list(devices_seen), "hidden": hidden, "smi": smi if smi is not None else [SMI]}


def memory(free: float, total: float) -> dict[str, Any]:
    return {"0": {"free": total * GIB, "total": total * GIB}, "3": {"free": free * GIB, "total": total * GIB}}


def on_disk(**changes: Any) -> dict[str, Any]:
    fact = {"folder": "/runs", "free": 500 * GIB, "inodes": 10**6, "clock": 0.0, "write": 2e9, "read": 3e9}
    return fact | changes


def products(*rates: float, peak: float | None = None) -> list[tuple[str, dict[str, Any]]]:
    facts = [{"rate": rate * 1e12, "peak": peak and peak * 1e12, "kind": "bfloat16"} for rate in rates]
    return [(f"node{i // 2} rank {i}", fact) for i, fact in enumerate(facts)]


def sums(*seconds: float, wrong: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    return [(f"rank {i}", {"right": i != wrong, "seconds": s, "bytes": 2**28}) for i, s in enumerate(seconds)]


def cores(count: int, threads: str | None, first: int = 0) -> dict[str, Any]:
    return {"cores": list(range(first, first + count)), "threads": threads}


def versions(**found: str | None) -> Check:
    return machine.judge_versions({"found": {"python": "3.11.7", "torch": "2.6.0"} | found, "wanted": NEEDED})


JUDGEMENTS: list[tuple[Callable[[], Check], str, str]] = [
    (lambda: versions(torch="2.13.0+cpu"), "OK", "python 3.11.7, torch 2.13.0+cpu"),
    (lambda: versions(torch="2.5.1"), "FAIL", "torch 2.5.1 (>=2.6 is needed)"),
    (lambda: versions(torch=None), "FAIL", "torch is missing"),
    (lambda: versions(python="3.14.0"), "FAIL", "python 3.14.0"),
    (
        lambda: machine.judge_versions({"found": {"python": "3.11.7", "torch": "2.6"}, "wanted": {"torch": ""}}),
        "WARN",
        "not installed",
    ),
    (lambda: machine.judge_locks({}), "OK", "none"),
    (lambda: machine.judge_locks({"/c/fused_adam/lock": 60.0}), "WARN", "/c/fused_adam/lock, 60 s old"),
    (lambda: machine.judge_locks({"/c/a/lock": 5.0, "/c/b/lock": 1e5}), "FAIL", "/c/b/lock, 27.8 h old, and 1 more"),
    (lambda: devices.judge_gpus(gpus(H100, H100), 2, True), "OK", "2 x NVIDIA H100, driver 550.54, bfloat16"),
    (lambda: devices.judge_gpus(gpus(smi=[]), 1, True), "WARN", "none"),
    (lambda: devices.judge_gpus(gpus(hidden=True), 1, True), "WARN", "none"),
    (lambda: devices.judge_gpus(gpus(), 1, True), "FAIL", "torch can use none of 1"),
    (lambda: devices.judge_gpus(gpus(H100), 2, True), "FAIL", "but 2 ranks here"),
    (lambda: devices.judge_gpus(gpus(H100, smi=[SMI | {"ecc": "4"}]), 1, True), "FAIL", "GPU 0 (4)"),
    (lambda: devices.judge_gpus(gpus(H100, smi=[SMI | {"ecc": "[N/A]"}]), 1, True), "OK", "ECC not told"),
    (lambda: devices.judge_gpus(gpus(H100, V100), 2, False), "WARN", "NVIDIA H100 and Tesla V100"),
    (lambda: devices.judge_gpus(gpus(H100, V100), 2, None), "WARN", "no bfloat16 on GPU 1"),
    (lambda: devices.judge_gpus(gpus(H100, V100), 2, True), "FAIL", "no bfloat16 on GPU 1"),
    (lambda: devices.judge_gpus(gpus(V100), 1, False), "OK", "no bfloat16"),
    (lambda: devices.judge_gpu_memory(memory(78, 80), 50 * GIB), "OK", "78 GiB of 80 GiB free on GPU 3"),
    (lambda: devices.judge_gpu_memory(memory(78, 80), None), "OK", "on GPU 3"),
    (lambda: devices.judge_gpu_memory(memory(60, 80), None), "WARN", "60 GiB of 80 GiB free on GPU 3"),
    (lambda: devices.judge_gpu_memory(memory(78, 80), 75 * GIB), "WARN", "75 GiB needed"),
    (lambda: devices.judge_gpu_memory(memory(60, 80), 70 * GIB), "FAIL", "70 GiB needed"),
    (lambda: machine.judge_memory({"available": 500 * GIB, "limited": False}, 10 * GIB, 8), "OK", "96 GiB needed"),
    (lambda: machine.judge_memory({"available": 100 * GIB, "limited": True}, 10 * GIB, 8), "WARN", "control group"),
    (lambda: machine.judge_memory({"available": 90 * GIB, "limited": False}, 10 * GIB, 8), "FAIL", "by 8 ranks"),
    (lambda: machine.judge_memory({"available": 9 * GIB, "limited": False}, None, 8), "OK", "9 GiB available"),
    (lambda: machine.judge_shared_memory({"free": 8 * GIB}), "OK", "8 GiB"),
    (lambda: machine.judge_shared_memory({"free": 2**28}), "WARN", "256 MiB"),
    (lambda: machine.judge_shared_memory({"free": None}), "WARN", "no /dev/shm"),
    (lambda: machine.judge_shared_memory({"free": 2**20}), "FAIL", "1 MiB"),
    (lambda: machine.judge_open_files({"limit": 65536}), "OK", "65536"),
    (lambda: machine.judge_open_files({"limit": None}), "OK", "no limit"),
    (lambda: machine.judge_open_files({"limit": 512}), "WARN", "512"),
    (lambda: machine.judge_open_files({"limit": 64}), "FAIL", "64"),
    (lambda: machine.judge_threads([("a", cores(16, "8"))] * 2), "OK", "2 ranks on 16 cores, 16 threads"),
    # Each bound to cores of its own: they add up.
    (lambda: machine.judge_threads([("a", cores(8, "8")), ("a", cores(8, "8", 8))]), "OK", "on 16 cores"),
    (lambda: machine.judge_threads([("a", cores(16, "9"))] * 2), "WARN", "a: 2 ranks on 16 cores, 18 threads"),
    (lambda: machine.judge_threads([("a", cores(16, None))] * 2), "OK", "divide the cores"),
    (lambda: machine.judge_threads([("a", cores(16, "40"))] * 2), "FAIL", "80 threads"),
    (
        lambda: machine.judge_threads([("a", cores(16, "1")), ("b", cores(1, "1")), ("b", cores(1, "1"))]),
        "FAIL",
        "b: 2",
    ),
    (lambda: machine.judge_threads([("a", cores(16, "eight"))]), "FAIL", "'eight'"),
    (lambda: disk.judge_disk_speed([("a", on_disk()), ("b", on_disk())], 76e9), "OK", "a checkpoint takes 19 s"),
    (lambda: disk.judge_disk_speed([("a", on_disk())], None), "OK", "1.86 GiB/s written"),
    (
        lambda: disk.judge_disk_speed([("a", on_disk()), ("b", on_disk(write=1e6))], 2e12),
        "WARN",
        "least on b: 977 KiB/s",
    ),
    (lambda: disk.judge_disk_speed([("a", on_disk(write=1e6))], None), "WARN", "977 KiB/s written"),
    (lambda: disk.judge_disk_speed([("a", on_disk(write=1e7))], 76e9), "FAIL", "2.1 h"),
    (lambda: disk.judge_disk_space(on_disk(), 100 * GIB, 0, 5), "OK", "room for 5 checkpoints"),
    (lambda: disk.judge_disk_space(on_disk(), None, 0, 3), "OK", "500 GiB free"),
    (lambda: disk.judge_disk_space(on_disk(), 110 * GIB, 0, 5), "WARN", "room for 4 checkpoints"),
    (lambda: disk.judge_disk_space(on_disk(), 110 * GIB, 110 * GIB, 5), "OK", "room for 5 checkpoints"),
    (lambda: disk.judge_disk_space(on_disk(free=199 * GIB), 100 * GIB, 0, 5), "FAIL", "room for 1 checkpoint of"),
    (lambda: disk.judge_inodes(on_disk(), 64, 5), "OK", "about 389 needed"),
    (lambda: disk.judge_inodes(on_disk(inodes=None), 64, 5), "OK", "not limited"),
    (lambda: disk.judge_inodes(on_disk(inodes=3000), 64, 5), "WARN", "3,000 free"),
    (lambda: disk.judge_inodes(on_disk(inodes=388), 64, 5), "FAIL", "388 free"),
    (lambda: disk.judge_disk_clock(on_disk(clock=-0.9)), "OK", "less than 1 s"),
    (lambda: disk.judge_disk_clock(on_disk(clock=30.0)), "WARN", "30 s ahead"),
    (lambda: disk.judge_disk_clock(on_disk(clock=-3600.0)), "FAIL", "60 min behind"),
    (
        lambda: speed.judge_matmul(products(700, 690, 710)),
        "OK",
        "700 TFLOP/s median of 3, least 690 TFLOP/s in bfloat16",
    ),
    (lambda: speed.judge_matmul(products(700, peak=989)), "OK", "71% of the data sheet's peak"),
    (lambda: speed.judge_matmul(products(700, 700, 600)), "WARN", "slow: node1 rank 2 (86% of the median)"),
    (lambda: speed.judge_matmul(products(300, 300, peak=989)), "WARN", "30% of the data sheet's peak"),
    (
        lambda: speed.judge_matmul(products(700, 450, 700, 600)),
        "FAIL",
        "node0 rank 1 (64% of the median), node1 rank 3",
    ),
    # Of two, one cannot tell which is wrong but by their speed: the slower one is.
    (lambda: speed.judge_matmul(products(400, 700)), "FAIL", "slow: node0 rank 0 (57%"),
    # 2 (n - 1) / n times 268 MB in 1 ms
    (lambda: speed.judge_all_reduce(sums(9e-4, 1e-3, 9e-4, 9e-4), "nccl"), "OK", "right, 403 GB/s"),
    (lambda: speed.judge_all_reduce(sums(0.3, 0.3), "nccl"), "WARN", "0.895 GB/s"),
    (lambda: speed.judge_all_reduce(sums(0.3, 0.3), "gloo"), "OK", "0.895 GB/s"),
    (lambda: speed.judge_all_reduce(sums(1e-3, 1e-3, wrong=1), "nccl"), "FAIL", "a wrong sum on rank 1"),
    (lambda: inputs.judge_data({"value": "9 images", "faults": [], "warnings": []}), "OK", "9 images"),
    (lambda: inputs.judge_data({"value": "9 images", "faults": [], "warnings": ["D: has no val/"]}), "WARN", "no val/"),
    (
        lambda: inputs.judge_data({"value": "", "faults": ["D: bad", "E: bad"], "warnings": []}),
        "FAIL",
        "D: bad; E: bad",
    ),
    (lambda: inputs.judge_run({"value": "step 5", "faults": [], "warnings": []}), "OK", "step 5"),
    (lambda: inputs.judge_run({"value": "step 5", "faults": [], "warnings": ["cut"]}), "WARN", "cut; step 5"),
    (lambda: inputs.judge_run({"value": "step 5", "faults": ["seed"], "warnings": ["cut"]}), "FAIL", "seed"),
]


@pytest.mark.parametrize(("judge", "status", "text"), JUDGEMENTS)
def test_each_judgement(judge: Callable[[], Check], status: str, text: str) -> None:
    check = judge()
    assert (check.status, text in check.value) == (status, True), check
    assert (check.status == "OK") == (check.remedy == ""), check


def test_every_check_has_each_outcome_above() -> None:
    seen: dict[str, set[str]] = {}
    for judge, _, _ in JUDGEMENTS:
        check = judge()
        seen.setdefault(check.name, set()).add(check.status)
    assert all(statuses == {"OK", "WARN", "FAIL"} for statuses in seen.values()), seen
    assert len(seen) == 16


# --- many ranks' checks as one ---------------------------------------------------------------------------------------


def test_the_worst_rank_is_named() -> None:
    ok, slow = Check("memory", "OK", "90 GiB"), Check("memory", "WARN", "20 GiB", "ask for more")
    assert merged([("a", ok), ("b", ok)]) == ok
    found = merged([("a", ok), ("b", slow), ("c", slow), ("d", Check("memory", "WARN", "19 GiB", "ask for more"))])
    assert found == Check("memory", "WARN", "b, c: 20 GiB; d: 19 GiB", "ask for more")
    assert merged([(str(i), slow) for i in range(9)]) == slow
    many = merged([("ok", ok), *((f"n{i}", slow) for i in range(9))])
    assert many.value == "n0, n1, n2, n3 and 5 more: 20 GiB"


def test_what_must_be_alike_is_warned_of() -> None:
    checks = [(host, Check("versions", "OK", f"torch 2.{minor}")) for host, minor in (("a", 6), ("b", 7), ("c", 6))]
    assert merged(checks).status == "OK"
    found = merged(checks, alike=True)
    assert (found.status, found.value) == ("WARN", "not alike: a, c: torch 2.6; b: torch 2.7")


def test_what_cannot_be_read_or_judged_fails() -> None:
    assert judged("memory", {"error": "OSError: no"}, machine.judge_open_files).value == "OSError: no"
    assert judged("memory", {}, machine.judge_open_files).status == "FAIL"
    found = judged_together("matmul", [*products(700), ("node9 rank 9", {"error": "it burns"})], speed.judge_matmul)
    assert (found.status, found.value) == ("FAIL", "node9 rank 9: it burns")


def test_amounts_are_told_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1024, 5e6, 76.2 * GIB, 3e15)] == [
        "0 B",
        "999 B",
        "1 KiB",
        "4.77 MiB",
        "76.2 GiB",
        "2.66 PiB",
    ]
    assert [time_text(s) for s in (0.034, 12.3, 300, 7201)] == ["0.034 s", "12 s", "5 min", "2.0 h"]


# --- readings on this machine ----------------------------------------------------------------------------------------


def test_readings_of_this_machine_fit_into_json(tmp_path: Path) -> None:
    facts = examine.local_facts(Request(run=tmp_path / "run"), Plan(), [], 0, leads=True)
    facts["disk"] |= {"folder": ""}
    assert json.loads(json.dumps(facts)) == facts
    assert [name for name, fact in facts.items() if "error" in fact] == []
    assert set(facts) >= {
        "versions",
        "compile_locks",
        "gpus",
        "memory",
        "shared_memory",
        "open_files",
        "threads",
        "run",
    }
    assert facts["versions"]["found"]["torch"] and "torch" in facts["versions"]["wanted"]
    assert 2**20 < facts["memory"]["available"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert list(tmp_path.iterdir()) == []  # looked at, and left as it was


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    fact = disk.read_disk(tmp_path / "a" / "b", most=2**20)
    assert list(tmp_path.iterdir()) == []
    assert fact["folder"] == str(tmp_path)
    assert fact["write"] > 0 and fact["read"] > 0 and abs(fact["clock"]) < 1
    status = os.statvfs(tmp_path)
    assert abs(fact["free"] - status.f_bavail * status.f_frsize) < GIB


def test_a_file_systems_clock_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(disk.time, "time", lambda: now() - 100)
    assert disk.read_disk(tmp_path, most=1)["clock"] == pytest.approx(100, abs=5)
    monkeypatch.setattr(disk.time, "time", lambda: now() + 100)
    assert disk.read_disk(tmp_path, most=1)["clock"] == pytest.approx(-100, abs=5)


def test_locks_are_found_at_both_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine.read_locks() == {}
    for folder in ("fused_adam", "py311_cu121/async_io"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    os.utime(tmp_path / "fused_adam" / "lock", (0, time.time() - 7200))
    ages = machine.read_locks()
    assert ages[str(tmp_path / "fused_adam/lock")] == pytest.approx(7200, abs=60)
    assert ages[str(tmp_path / "py311_cu121/async_io/lock")] < 60


def test_what_nvidia_smi_writes_is_read() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 550.54.15, 0\n1, NVIDIA A10G, 550.54.15, [N/A]\nsomething else\n"
    assert [gpu["ecc"] for gpu in devices.parse_smi(text)] == ["0", "[N/A]"]
    assert devices.parse_smi(text)[1]["name"] == "NVIDIA A10G"


def test_a_matrix_product_is_timed() -> None:
    fact = speed.matmul(None, seconds=0.0)
    assert fact["kind"] == "float32" and fact["peak"] is None and 1e7 < fact["rate"] < 1e14


# --- configuration, data, run ----------------------------------------------------------------------------------------


def test_data_are_opened_and_sampled(digits: Path, tmp_path: Path) -> None:
    fine = inputs.read_data([str(digits), str(digits)], True)
    assert fine["faults"] == [] and "1,066 images to train on, 8 x 8 in 16 colours" in fine["value"]
    assert "no such directory" in inputs.read_data([str(tmp_path / "none")], None)["faults"][0]

    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    shutil.rmtree(copy / "val")
    assert "no val/" in inputs.read_data([str(copy)], None)["warnings"][0]
    assert "no val/" in inputs.read_data([str(copy)], True)["faults"][0]
    no_validation = inputs.read_data([str(copy)], False)
    assert (no_validation["faults"], no_validation["warnings"]) == ([], [])
    # Only the first folder's val/ is used.
    assert inputs.read_data([str(digits), str(copy)], True)["faults"] == []

    shard = next((copy / "train").glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    assert "damaged shard" in inputs.read_data([str(copy)], False)["faults"][0]
    shard.write_bytes(b"\xff" * len(whole))  # right in size: only the rows tell
    assert "beyond the palette" in inputs.read_data([str(copy)], False)["faults"][0]


def test_datasets_that_differ_are_told(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from igpt_ds.loading import splits

    real = splits.open_split(digits, "train")

    def opened(folder: str, split: str) -> Any:
        if folder == str(digits):
            return real
        other = SimpleNamespace(sha256="other", decode=real.palette.decode)
        manifest = SimpleNamespace(resolution=16, shards=real.manifest.shards)
        return SimpleNamespace(path=Path(folder), palette=other, manifest=manifest, rows=1, read_many=real.read_many)

    monkeypatch.setattr(splits, "open_split", opened)
    faults = inputs.read_data([str(digits), "OTHER"], False)["faults"]
    assert "OTHER: another palette" in faults[0] and "OTHER: resolution 16" in faults[1]


def test_a_job_is_planned_as_far_as_it_goes(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(machine: Here) -> None:
        planned = lambda ranks: replace(machine, ranks=ranks.world, ranks_per_node=ranks.neighbours)  # noqa: E731
        monkeypatch.setattr(device, "at_hand", planned)

    here(machines.CPU)
    assert inputs.make_plan(Request(data=(str(digits),)), 1) == Plan()  # nothing says what to train

    whole = inputs.make_plan(Request(data=(str(digits),), preset="tiny"), 2)
    assert inputs.judge_job(whole).status == "OK"
    assert "batch 16 = 2 ranks x 8 x 1" in inputs.judge_job(whole).value
    assert "2 x CPU: float32, ZeRO-0, no recomputation, micro-batch 8" in inputs.judge_job(whole).value
    assert whole.need and whole.need.checkpoint == 12 * 27840 and not whole.need.bfloat16

    here(machines.H100)
    alone = inputs.make_plan(Request(preset="xl"), 64)
    assert inputs.judge_job(alone).status == "WARN"
    assert alone.need and alone.need.bfloat16 and alone.need.kept == 3
    assert alone.need.checkpoint == pytest.approx(12 * 6.8e9, rel=0.01)
    assert alone.need.rank < 0.9 * machines.H100.memory  # it was decided so

    # What the run is to be made of may be missing, and not be needed to know what it needs.
    missing = inputs.make_plan(Request(data=(str(tmp_path),), preset="xl"), 64)
    assert "build it with igpt-data shards" in missing.fault and missing.need == alone.need
    here(machines.V100)
    older = inputs.make_plan(Request(preset="s"), 8)
    assert older.need and not older.need.bfloat16
    here(replace(machines.V100, memory=GIB))
    too_large = inputs.make_plan(Request(preset="xl"), 1)
    assert "igpt-xl does not fit" in inputs.judge_job(too_large).value and too_large.need is None

    uneven = inputs.make_plan(Request(data=(str(digits),), preset="tiny"), 3)
    assert inputs.judge_job(uneven).status == "FAIL" and "3 ranks cannot share it" in uneven.fault
    assert "5 ranks cannot share it" in inputs.make_plan(Request(preset="xl"), 5).fault
    unknown = inputs.make_plan(Request(preset="none-such"), 1)
    assert inputs.judge_job(unknown).status == "FAIL" and unknown.config is None


def test_the_run_directory_is_looked_at(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert inputs.read_run(run, Plan())["value"] == f"{run} is to be made"
    assert not run.exists()
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    for step in (5, 10):
        save_all(folder, step)
    found = inputs.read_run(run, Plan())
    assert "is not empty, but no run directory" in found["warnings"][0]
    assert found["present"] == sum(file.stat().st_size for file in folder.glob("*/*"))
    (run / "config.toml").write_text('name = "x"\nunknown = 1\n')
    assert "unknown key" in inputs.read_run(run, Plan())["faults"][0]
    (run / "config.toml").unlink()

    job: Any = SimpleNamespace(identity=lambda: {"seed": 4})
    other = inputs.read_run(run, Plan(job=job))
    assert other["faults"] == [f"{folder / 'step-00000010'}: seed was 3, but now is 4"]
    same: Any = SimpleNamespace(identity=lambda: {"seed": 3})
    assert inputs.read_run(run, Plan(job=same))["faults"] == []

    for step, kind in ((10, "warnings"), (5, "faults")):
        file = next((folder / f"step-{step:08d}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        assert any(str(file) in text or "step-00000010" in text for text in inputs.read_run(run, Plan())[kind])


# --- the whole -------------------------------------------------------------------------------------------------------


def some_report(status: str = "WARN") -> Report:
    checks = [Check("versions", "OK", "torch 2.6"), Check("disk_space", "WARN", "little", "free some")]
    if status == "FAIL":
        checks.append(Check("run", "FAIL", "gone", "look for it"))
    return Report(checks, ["data (no --data)"], 8, ["n1"] * 4 + ["n2"] * 4)


def test_the_table_is_aligned() -> None:
    lines = table(some_report("FAIL")).splitlines()
    assert lines == [
        "OK    versions    torch 2.6",
        "WARN  disk_space  little",
        "                  -> free some",
        "FAIL  run         gone",
        "                  -> look for it",
        "not checked: data (no --data)",
        "1 OK, 1 WARN, 1 FAIL (8 ranks on n1, n2)",
    ]
    painted = table(some_report("FAIL"), lambda status: f"<{status}>")
    assert [line.replace("<", "").replace(">", "", 1) for line in painted.splitlines()[:2]] == lines[:2]


def test_the_figures_have_stable_keys() -> None:
    content = some_report().figures()
    assert list(content) == ["status", "ranks", "hosts", "checks", "unchecked"]
    assert (content["status"], content["ranks"], content["hosts"]) == ("WARN", 8, ["n1", "n2"])
    assert content["checks"][1] == {"name": "disk_space", "status": "WARN", "value": "little", "remedy": "free some"}


@pytest.mark.parametrize(("shown", "status"), [("abcd", "OK"), ("abca", "OK"), ("abcc", "FAIL"), ("ab  ", "FAIL")])
def test_ranks_that_each_see_one_gpu_are_as_many_as_there_are(shown: str, status: str) -> None:
    """As `srun --gpus-per-task=1` starts them; what tells a GPU from others is its own on every machine."""
    readings = [Reading(host, rank, {"threads": cores(16, "8")}) for rank, host in enumerate("aabb")]
    for reading, gpu in zip(readings, shown, strict=True):
        reading.facts |= {"only_gpu": gpu.strip() or None}
    readings[0].facts |= {"gpus": gpus(H100)}
    readings[2].facts |= {"gpus": gpus(H100)}
    found = {check.name: check for check in examine.judge(readings, Plan(ranks=4), [], list("aabb"))}
    assert found["gpus"].status == status


def test_many_readings_are_judged_together() -> None:
    """Two nodes of two ranks: node facts come from the first rank of each, rates and sums from all."""
    readings = [Reading(host, rank, {"threads": cores(16, "8")}) for rank, host in enumerate("aabb")]
    for reading in (readings[0], readings[2]):
        reading.facts |= {
            "gpus": gpus(H100, H100),
            "memory": {"available": 500 * GIB, "limited": False},
            "disk": on_disk(),
            "open_files": {"limit": 64 if reading.host == "b" else 65536},
        }
    for reading in readings:
        reading.facts |= {"all_reduce": sums(1e-3)[0][1], "backend": "nccl", "gpu_memory": memory(78, 80)}
    readings[0].facts["clock"] = [0.0, 0.1, 90.0, 0.0]
    readings[3].facts["gpu_memory"] = memory(40, 80)
    found = {check.name: check for check in examine.judge(readings, Plan(ranks=4), products(1, 1, 1, 1), list("aabb"))}
    assert found["gpus"].status == "OK"
    assert found["open_files"].value == "b: limit of 64" and found["open_files"].status == "FAIL"
    assert found["gpu_memory"].value.startswith("b rank 3: 40 GiB")
    assert found["clock_ranks"].value == "the clock of b rank 2 is 90 s ahead"
    assert "by 2 nodes at once" in found["disk_speed"].value
    assert found["threads"].status == found["matmul"].status == "OK"
    assert "GB/s" in found["all_reduce"].value


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, no multiplication, and a disk measured with little."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(speed, "matmul", lambda device: products(0.1)[0][1])
    read = disk.read_disk
    monkeypatch.setattr(disk, "read_disk", lambda path: read(path, most=2**20) | {"free": 500 * GIB})


@pytest.mark.usefixtures("quick")
def test_the_exit_status_is_for_job_scripts(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    fine = ["doctor", run, "--data", str(digits), "--preset", "tiny"]
    assert call(monkeypatch, *fine, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["status"] in ("OK", "WARN")  # no GPU is a WARN
    names = [check["name"] for check in content["checks"]]
    assert len(set(names)) == len(names)
    assert set(names) >= {"versions", "gpus", "matmul", "disk_speed", "disk_space", "data", "job", "run", "threads"}

    assert call(monkeypatch, *fine, "--gpus-per-node", "3") == 1
    printed = capsys.readouterr()
    assert any(line.startswith("FAIL  job") for line in printed.out.splitlines())
    assert printed.err.splitlines()[-1].startswith("igpt-ds: doctor: 1 of ")
    assert not Path(run).exists()

    assert call(monkeypatch, "doctor", "--nodes", "0") == 2
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert call(monkeypatch, "doctor") == 2
    assert "RANK" in capsys.readouterr().err


def test_what_hangs_is_given_up() -> None:
    release = threading.Event()
    assert ranks.within(5, lambda: 3) == (3, False)
    fact, hangs = ranks.within(0.05, release.wait)
    release.set()
    assert hangs and "no end within" in fact["error"]
    fact, hangs = ranks.within(5, lambda: 1 / 0)
    assert not hangs and "ZeroDivisionError" in fact["error"]


@pytest.mark.usefixtures("quick")
def test_a_rank_that_hangs_ends_after_its_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(examine, "examine", lambda *_: examine.Outcome(some_report("FAIL"), hangs=True))
    monkeypatch.setattr(os, "_exit", ended.append)
    assert call(monkeypatch, "doctor") == 1
    assert ended == [1]
    assert "1 OK, 1 WARN, 1 FAIL" in capsys.readouterr().out


@pytest.mark.distributed
def test_two_ranks_name_who_is_slow_late_or_missing() -> None:
    run_ranks("tests.workers.doctor", [str(free_port()) for _ in range(3)], world=2, limit=120)
