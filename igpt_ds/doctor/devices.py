"""GPUs: are they there, alike, free and sound?"""

import os
import shutil
import subprocess
from typing import Any

from igpt_ds.distributed.ranks import Ranks
from igpt_ds.doctor.report import Check, named
from igpt_ds.errors import UserError
from igpt_ds.text import size_text

_QUERY = "index,name,driver_version,ecc.errors.uncorrected.volatile.total"


def visible() -> int:
    """Number of GPUs that torch can use in this process."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def own(ranks: Ranks) -> int | None:
    """The GPU of this rank, as a training takes it; None: there is none for it."""
    try:
        return ranks.gpu()
    except UserError:
        return None


def only() -> str | None:
    """What tells the GPU that this process sees from all others; None where it sees several."""
    import torch

    return str(torch.cuda.get_device_properties(0).uuid) if visible() == 1 else None


def read_gpus() -> dict[str, Any]:
    """What torch and nvidia-smi say of this node's GPUs."""
    import torch

    from igpt_ds.distributed.device import has_bfloat16

    devices = [
        {"name": torch.cuda.get_device_name(index), "bfloat16": has_bfloat16(index)} for index in range(visible())
    ]
    return {
        "devices": devices,
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES") == "",
        "smi": _nvidia_smi(),
    }


def _nvidia_smi() -> list[dict[str, str]]:
    """A dictionary a GPU of the node, or nothing where the tool does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[dict[str, str]]:
    """nvidia-smi's lines "0, NVIDIA H100, 550.54, 0"; ECC is "[N/A]" where the GPU has none."""
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [dict(zip(("index", "name", "driver", "ecc"), cells, strict=True)) for cells in lines if len(cells) == 4]


def judge_gpus(fact: dict[str, Any], ranks: int, bfloat16: bool | None) -> Check:
    """As many GPUs as ranks, alike, with bfloat16 and without memory errors.

    Args:
        ranks: on this node.
        bfloat16: whether the run computes in it; None: no configuration is known.
    """
    devices, smi = fact["devices"], fact["smi"]
    count = len(devices)
    if count == 0 and smi and not fact["hidden"]:
        value = f"torch can use none of {len(smi)} ({smi[0]['name']}, driver {smi[0]['driver']})"
        return Check("gpus", "FAIL", value, "install a torch for this driver's CUDA, or mend CUDA_VISIBLE_DEVICES")
    if count == 0:
        return Check("gpus", "WARN", "none: a run would compute on the CPU", "ask for them: sbatch --gpus-per-node=8")
    names = sorted({device["name"] for device in devices})
    value = f"{count} x {' and '.join(names)}" + (f", driver {smi[0]['driver']}" if smi else "")
    if count < ranks:
        return Check("gpus", "FAIL", f"{value}, but {ranks} ranks here", "start one rank a GPU")
    broken = [f"GPU {gpu['index']} ({gpu['ecc']})" for gpu in smi if gpu["ecc"].isdecimal() and int(gpu["ecc"])]
    if broken:
        value += f": memory errors that ECC could not correct: {named(broken)}"
        return Check("gpus", "FAIL", value, "reset the GPU or leave the node out (sbatch --exclude), and report it")
    without = [str(index) for index, device in enumerate(devices) if not device["bfloat16"]]
    if without and bfloat16 is not False:
        value += f": no bfloat16 on GPU {named(without)}"
        return Check(
            "gpus", "FAIL" if bfloat16 else "WARN", value, "set training.precision=float32, or take other GPUs"
        )
    if len(names) > 1:
        return Check("gpus", "WARN", value, "take nodes of one kind: the slowest sets the pace")
    ecc = "no ECC errors" if any(gpu["ecc"].isdecimal() for gpu in smi) else "ECC not told"
    return Check("gpus", "OK", f"{value}, {'no ' if without else ''}bfloat16, {ecc}")


def read_gpu_memory(indices: list[int]) -> dict[str, Any]:
    """Free and total bytes of some GPUs."""
    import torch

    memory = {index: torch.cuda.mem_get_info(index) for index in indices}
    return {str(index): {"free": free, "total": total} for index, (free, total) in memory.items()}


def judge_gpu_memory(fact: dict[str, Any], need: float | None) -> Check:
    """Nobody else's processes on the GPUs, and room for what `plan.bytes_per_rank` says.

    Args:
        need: bytes; None: no configuration is known.
    """
    index, fullest = min(fact.items(), key=lambda item: item[1]["free"])
    free, total = fullest["free"], fullest["total"]
    value = f"{size_text(free)} of {size_text(total)} free on GPU {index}"
    if need is not None:
        value += f", {size_text(need)} needed by plan"
        if need > free:
            remedy = "more ranks, a smaller training.micro_batch, a higher ZeRO stage"
            return Check(
                "gpu_memory", "FAIL", value, remedy if need > total else f"end what else runs there, or {remedy}"
            )
    if total - free > 0.1 * total:
        return Check("gpu_memory", "WARN", value, "end what else runs there (nvidia-smi names the processes)")
    if need is not None and need > 0.9 * free:
        return Check("gpu_memory", "WARN", value, "it may just fit: a smaller training.micro_batch would be safe")
    return Check("gpu_memory", "OK", value)
