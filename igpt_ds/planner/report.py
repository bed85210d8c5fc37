"""The plan of a job, as JSON and as tables."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from igpt_ds.config.deepspeed import load_ds_config, offloads
from igpt_ds.config.schema import Config
from igpt_ds.config.size import flops_per_image, parameter_count
from igpt_ds.planner.advice import advise, limits, presets
from igpt_ds.planner.choose import Choice, Here, choose, decision_line
from igpt_ds.planner.communication import transfers
from igpt_ds.planner.devices import Device, find_device, find_interconnect
from igpt_ds.planner.layout import Layout, require_facts
from igpt_ds.planner.memory import activation_bytes, bytes_per_rank
from igpt_ds.planner.step_time import Assumptions, recomputed_share, step_time

IMAGENET = 1_281_167  # training images
_CHECKPOINT = 12  # bytes a parameter: weights and both moments in float32
_STORED = {"uint16": 2.0, "packed9": 1.125}  # bytes a token in the shards
_FREE = 0.98  # of a data sheet's memory where nothing runs


@dataclass(frozen=True)
class Machine:
    """What is to be planned for.

    Attributes:
        device, peak_tflops, memory_gib, bandwidth: see `find_device`; interconnect: see `find_interconnect`.
        mfu: of the computation alone; None: by kernels.py.
    """

    device: str = "h200"
    interconnect: str = "ib-ndr"
    mfu: float | None = None
    peak_tflops: float | None = None
    memory_gib: float | None = None
    bandwidth: float | None = None

    @property
    def sheet(self) -> Device:
        """The device's data sheet."""
        return find_device(self.device, self.peak_tflops, self.memory_gib, self.bandwidth)

    def here(self, ranks: int, ranks_per_node: int) -> Here:
        """So many of them, as if a run had met them."""
        sheet, network = self.sheet, find_interconnect(self.interconnect)
        return Here(self.device, int(_FREE * sheet.memory), True, sheet.bf16 > 0, ranks, ranks_per_node, True, network)


def decided_layout(
    config: Config, ds_source: str, nodes: int, ranks_per_node: int, machine: Machine
) -> tuple[Layout, str]:
    """The job on so many GPUs, what is left open being decided for them; and what was decided, in a line.

    Args:
        ds_source: see `load_ds_config`; "auto": to be chosen.
    """
    require_facts(config)
    here = machine.here(nodes * ranks_per_node, ranks_per_node)
    best = choose(config, None if ds_source == "auto" else load_ds_config(ds_source), here, machine.sheet)
    return best.layout, decision_line(best, here, machine.sheet)


def make_plan(layout: Layout, machine: Machine, images: int = IMAGENET) -> dict[str, Any]:
    """Everything that is known of a job before it runs; bytes, seconds, FLOPs, all of them plain numbers.

    Args:
        images: of the data, each stored once.
    """
    device, here = machine.sheet, machine.here(layout.ranks, layout.ranks_per_node)
    config, training = layout.config, layout.config.training
    parameters, flops = parameter_count(config), flops_per_image(config) * training.batch
    peak = layout.ranks * device.peak(training.precision)
    assumed = Assumptions()
    if machine.mfu is not None:
        computation = step_time(layout, device, here.interconnect, assumed).computation
        assumed = replace(assumed, speed=computation / (flops / (peak * machine.mfu)))
    time = step_time(layout, device, here.interconnect, assumed)
    chosen = Choice(layout, {}, "", bytes_per_rank(layout), time)
    step = time.step
    return {
        "name": config.name,
        "parameters": parameters,
        "flops_per_step": flops,
        "flops_convention": "6 N a token and attention's products, "
        + ("half of them as the mask is causal" if config.causal else "all of them as there is no mask")
        + "; recomputation not counted",
        "layout": _layout(layout, machine),
        "bytes_per_rank": chosen.memory.kinds(),
        "activation_bytes": {
            mode: activation_bytes(layout.with_training(activation_checkpointing=mode))[0]
            for mode in dict.fromkeys(("none", layout.checkpointing, "selective", "full"))
        },
        "communication_bytes_per_step": _communication(layout),
        "by_ds_config": _by_ds_config(layout, device, here, assumed),
        "step_seconds": step,
        "step_parts": {
            "computation": time.computation,
            "gradients": time.gradients,
            "messages_hidden": time.hidden_messages,
            "messages": time.messages,
            "optimizer": time.optimizer,
            "waiting": time.waiting,
            "host": time.host,
        },
        "message_seconds": {transfer.operation: seconds for transfer, seconds in time.transfers},
        "images_per_second": training.batch / step,
        "tokens_per_second": training.batch * config.sequence_length / step,
        "mfu_of_step": flops / step / peak,
        "recomputed_flops_share": recomputed_share(layout),
        "steps": training.steps,
        "days": training.steps * step / 86400,
        "device_hours": training.steps * step / 3600 * layout.ranks,
        "checkpoint_bytes": _CHECKPOINT * parameters,
        "checkpoints_kept_bytes": _kept(layout) * _CHECKPOINT * parameters,
        "dataset_images": images,
        "dataset_bytes": {name: int(images * config.sequence_length * size) for name, size in _STORED.items()},
        "assumptions": {
            **asdict(assumed),
            "mfu": flops / time.computation / peak,
            "peak_flops": device.peak(training.precision),
            "device_memory": device.memory,
            "device_bandwidth": device.bandwidth,
            "link_bandwidth": device.link,
            "network_bandwidth_per_device": here.interconnect,
        },
        "limits": limits(chosen, here),
        "advice": advise(chosen, here, device, assumed),
    }


def _layout(layout: Layout, machine: Machine) -> dict[str, Any]:
    return {
        "device": machine.device,
        "interconnect": machine.interconnect,
        "ranks": layout.ranks,
        "nodes": layout.nodes,
        "ranks_per_node": layout.ranks_per_node,
        "data_parallel": layout.division.replicas,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch": layout.division.micro_batch,
        "accumulation": layout.division.accumulation,
        "batch": layout.division.batch,
        "zero_stage": layout.stage,
        "hpz_group": layout.hpz_group,
        "offload": [what for what in ("optimizer", "param") if offloads(layout.zero, what)],
        "precision": layout.config.training.precision,
        "activation_checkpointing": layout.checkpointing,
        "compiled": layout.config.training.compile,
    }


def _communication(layout: Layout) -> dict[str, int]:
    found = {transfer.operation: transfer.sent for transfer in transfers(layout)}
    return {**found, "total": sum(found.values())}


def _by_ds_config(layout: Layout, device: Device, here: Here, assumed: Assumptions) -> dict[str, dict[str, Any]]:
    """The same job under each of ds_configs/."""
    found = {}
    for name, other in presets(layout).items():
        time = step_time(other, device, here.interconnect, assumed)
        choice = Choice(other, {}, name, bytes_per_rank(other), time)
        found[name] = {
            "bytes_per_rank": choice.memory.total,
            "host_bytes_per_rank": choice.memory.host,
            "communication_bytes_per_step": _communication(other)["total"],
            "message_seconds": time.hidden_messages + time.messages,
            "step_seconds": time.step,
            "fits": choice.fits(here),
        }
    return found


def _kept(layout: Layout) -> int:
    """Checkpoints at the end of the run: the newest and the milestones."""
    checkpoint, steps = layout.config.checkpoint, layout.config.training.steps
    return checkpoint.keep + sum(m <= steps for m in checkpoint.milestones)
