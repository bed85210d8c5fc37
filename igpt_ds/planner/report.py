"""The plan of a job, as JSON and as tables."""

from dataclasses import asdict, dataclass
from typing import Any

from igpt_ds.config.deepspeed import offloads
from igpt_ds.config.size import flops_per_image, parameter_count
from igpt_ds.planner.advice import advise, judge, limits, presets
from igpt_ds.planner.communication import transfers
from igpt_ds.planner.devices import Device, find_device, find_interconnect
from igpt_ds.planner.layout import Layout
from igpt_ds.planner.memory import activation_bytes
from igpt_ds.planner.step_time import Assumptions, assumed_mfu, recomputed_share

IMAGENET = 1_281_167  # training images
_CHECKPOINT = 12  # bytes a parameter: weights and both moments in float32
_STORED = {"uint16": 2.0, "packed9": 1.125}  # bytes a token in the shards


@dataclass(frozen=True)
class Machine:
    """What is to be planned for.

    Attributes:
        device, interconnect: see devices.py.
        mfu: of the computation alone; None: assumed (see step_time.py).
    """

    device: str = "h200"
    interconnect: str = "ib-ndr"
    mfu: float | None = None


def make_plan(layout: Layout, machine: Machine, images: int = IMAGENET) -> dict[str, Any]:
    """Everything that is known of a job before it runs; bytes, seconds, FLOPs, all of them plain numbers.

    Args:
        images: of the data, each stored once.
    """
    device, network = find_device(machine.device), find_interconnect(machine.interconnect)
    assumptions = Assumptions(mfu=assumed_mfu(layout) if machine.mfu is None else machine.mfu)
    chosen = judge(layout, device, network, assumptions)
    config, training = layout.config, layout.config.training
    parameters, flops = parameter_count(config), flops_per_image(config) * training.batch
    step = chosen.time.step
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
            for mode in ("none", "selective", "full")
        },
        "communication_bytes_per_step": _communication(layout),
        "by_ds_config": _by_ds_config(layout, device, network, assumptions),
        "step_seconds": step,
        "step_parts": {
            "computation": chosen.time.computation,
            "messages_hidden": chosen.time.hidden_messages,
            "messages": chosen.time.messages,
            "optimizer": chosen.time.optimizer,
        },
        "message_seconds": {transfer.operation: seconds for transfer, seconds in chosen.time.transfers},
        "tokens_per_second": training.batch * config.sequence_length / step,
        "mfu_of_step": flops / step / (layout.ranks * device.peak(layout.config.training.precision)),
        "recomputed_flops_share": recomputed_share(layout),
        "steps": training.steps,
        "days": training.steps * step / 86400,
        "device_hours": training.steps * step / 3600 * layout.ranks,
        "checkpoint_bytes": _CHECKPOINT * parameters,
        "checkpoints_kept_bytes": _kept(layout) * _CHECKPOINT * parameters,
        "dataset_images": images,
        "dataset_bytes": {name: int(images * config.sequence_length * size) for name, size in _STORED.items()},
        "assumptions": {
            **asdict(assumptions),
            "peak_flops": device.peak(layout.config.training.precision),
            "device_memory": device.memory,
            "device_bandwidth": device.bandwidth,
            "link_bandwidth": device.link,
            "network_bandwidth_per_device": network,
        },
        "limits": limits(chosen, device),
        "advice": advise(chosen, device, network, assumptions),
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
    }


def _communication(layout: Layout) -> dict[str, int]:
    found = {transfer.operation: transfer.sent for transfer in transfers(layout)}
    return {**found, "total": sum(found.values())}


def _by_ds_config(
    layout: Layout, device: Device, network: float, assumptions: Assumptions
) -> dict[str, dict[str, Any]]:
    """The same job under each of ds_configs/."""
    found = {}
    for name, other in presets(layout).items():
        choice = judge(other, device, network, assumptions)
        found[name] = {
            "bytes_per_rank": choice.memory.total,
            "host_bytes_per_rank": choice.memory.host,
            "communication_bytes_per_step": _communication(other)["total"],
            "message_seconds": choice.time.hidden_messages + choice.time.messages,
            "step_seconds": choice.time.step,
            "fits": choice.fits(device),
        }
    return found


def _kept(layout: Layout) -> int:
    """Checkpoints at the end of the run: the newest and the milestones."""
    checkpoint, steps = layout.config.checkpoint, layout.config.training.steps
    return checkpoint.keep + sum(m <= steps for m in checkpoint.milestones)
