"""What is rehearsed: the job as its machines would run it, and as the device that is here runs one of its ranks."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import load_config
from igpt_ds.config.rules import contradictions
from igpt_ds.config.schema import replace
from igpt_ds.errors import UserError
from igpt_ds.memory import available_bytes
from igpt_ds.planner.choose import Here
from igpt_ds.planner.devices import Device, find_device, find_interconnect, recognise
from igpt_ds.planner.layout import require_facts
from igpt_ds.planner.memory import Memory, bytes_per_rank
from igpt_ds.planner.report import Machine
from igpt_ds.planner.step_time import Assumptions, StepTime, step_time
from igpt_ds.text import size_text
from igpt_ds.train.machine import Asked, Settled, settle


@dataclass(frozen=True)
class Request:
    """What is to be rehearsed.

    Attributes:
        preset, overrides, ds_name: as `igpt-ds pretrain` takes them, by --preset, --set and --ds.
        nodes, gpus_per_node: the job's machines.
        device: theirs, see `find_device`; None: the GPU that is here, on a CPU an H200.
        interconnect: see `find_interconnect`.
        resolution: of the images here; None: the job's.
    """

    preset: str
    overrides: Sequence[str] = ()
    ds_name: str = "auto"
    nodes: int = 1
    gpus_per_node: int = 8
    device: str | None = None
    interconnect: str = "ib-ndr"
    resolution: int | None = None

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Rehearsal:
    """A job, one rank of which is to be run here.

    Attributes:
        gpu: the name of the GPU that is here; None: it is a CPU.
        planned: the job on its machines.
        here: the same as it runs here: on images of another resolution, if that is asked for; on a CPU in float32, and
            not compiled, if nothing else is asked for.
        device, network: the data sheet of the job's machines, and bytes/s between them.
    """

    gpu: str | None
    planned: Settled
    here: Settled
    device: Device
    network: float

    @property
    def real(self) -> bool:
        """Whether the rank runs here as it would on the job's machines; a GPU without a data sheet counts as theirs."""
        return self.gpu is not None and self.here == self.planned and recognise(self.gpu) in (None, self.device)

    @property
    def memory(self) -> Memory:
        """What the rank takes here, by plan."""
        return bytes_per_rank(self.here.layout, gpu=self.gpu is not None)

    @property
    def time(self) -> StepTime:
        """A step of the job on its machines, by plan."""
        return step_time(self.planned.layout, self.device, self.network, Assumptions())


def prepare(request: Request, at_hand: Here) -> Rehearsal:
    """Lay the job out.

    Args:
        at_hand: what is here.

    Raises:
        UserError: the job cannot be; or this machine's memory does not suffice for one of its ranks.
    """
    config = load_config(request.preset, request.overrides)
    require_facts(config, "rehearse")
    network = find_interconnect(request.interconnect)
    gpu = at_hand.name if at_hand.gpu else None
    device = _sheet(request.device, gpu)
    if gpu is None or request.device is not None:
        machine = Machine(request.device or "h200", request.interconnect)
        there = machine.here(request.ranks, request.gpus_per_node)
    else:
        # Of the processors' memory there, as of a planned machine's, nothing is known: it is taken to suffice.
        there = dataclasses.replace(
            at_hand, ranks_per_node=request.gpus_per_node, interconnect=network, host=sys.maxsize
        )
    ds = None if request.ds_name == "auto" else load_ds_config(request.ds_name)
    planned = settle(Asked(config, ds), there)
    asked = {override.partition("=")[0].strip() for override in request.overrides}
    changes: dict[str, Any] = {}
    if gpu is None:
        # A CPU's products in bfloat16 take many times as long.
        changes = {"precision": "float32", "compile": False}
        changes = {key: value for key, value in changes.items() if f"training.{key}" not in asked}
    changed = replace(planned.config, "training", **changes)
    if request.resolution is not None:
        changed = replace(changed, "data", resolution=request.resolution)
        if faults := contradictions(changed):
            raise UserError(f"--resolution {request.resolution}: {'; '.join(faults)}")
    here = planned if changed == planned.config else settle(Asked(changed, planned.ds_source), there)
    rehearsal = Rehearsal(gpu, planned, here, device, network)
    _require_memory(rehearsal)
    return rehearsal


def _sheet(named: str | None, gpu: str | None) -> Device:
    found = find_device(named or "h200") if named is not None or gpu is None else recognise(gpu)
    if found is None:
        raise UserError(f"rehearse: {gpu}: its data sheet is not here: name by --device what is nearest to it")
    return found


def _require_memory(rehearsal: Rehearsal) -> None:
    """Refuse what the system would end without a word. A GPU says by itself what it cannot hold."""
    memory = rehearsal.memory
    needed, free = memory.host + (memory.total if rehearsal.gpu is None else 0), available_bytes()
    if needed > free:
        raise UserError(
            f"rehearse: a rank takes {size_text(needed)} of this machine's memory by plan, and {size_text(free)} are "
            "free: rehearse smaller images (--resolution 8), a job of more ranks, or on a larger machine"
        )
