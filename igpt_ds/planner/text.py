"""A plan for people: aligned tables that say what each figure is."""

from typing import Any

from igpt_ds.text import Table, aligned, counted, size_text, time_text

_KINDS = {
    "parameters": "weights of this rank",
    "gradients": "summed in float32",
    "master": "float32 weights that Adam updates",
    "moments": "Adam's two",
    "second_copy": "of the weights, within an hpZ group",
    "activations": "kept for the backward pass, at its peak",
    "live": "whole weights gathered at one time",
    "buffers": "messages on their way",
    "optimizer_step": "while Adam steps; no activations then",
    "total": "peak of a rank",
    "host": "in the processor's memory, by offload",
}

_PARTS = {
    "computation": "computation: forward and backward passes, what is computed again among them",
    "gradients": "gradients: copied and summed up, added",
    "messages_hidden": "messages beside it: count where they are longer",
    "messages": "messages after it: added",
    "optimizer": "optimizer: added",
    "waiting": "waiting: for the device, tensor by tensor (hpZ), added",
    "host": "processor: starts the kernels beside all this; counts where it is longer",
}


def plan_text(plan: dict[str, Any]) -> str:
    """What `make_plan` gives, for a terminal."""
    return "\n\n".join([aligned([*_facts(plan), *_advice(plan)]), *(table.text() for table in _tables(plan))])


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    at, assumed, limit = plan["layout"], plan["assumptions"], plan["limits"]
    stored = plan["dataset_bytes"]
    return [
        ("model", f"{plan['name']}: {plan['parameters']:,} parameters, {at['precision']}"),
        (
            "machine",
            f"{at['ranks']} x {at['device']}: {counted(at['nodes'], 'node')} of {at['ranks_per_node']}{_network(at)}",
        ),
        ("batch", _batch(at)),
        ("sharding", _sharding(at)),
        (
            "compute",
            f"{plan['flops_per_step']:.3g} FLOPs a step ({plan['flops_convention']}), "
            f"{plan['flops_per_step'] * plan['steps']:.3g} in {plan['steps']:,} steps",
        ),
        (
            "time",
            f"{time_text(plan['step_seconds'])} a step, {plan['images_per_second']:,.3g} images/s, "
            f"{plan['days']:.3g} days, {plan['device_hours']:,.0f} GPU hours; MFU {plan['mfu_of_step']:.1%} of "
            f"{assumed['peak_flops'] / 1e12:.0f} TFLOP/s",
        ),
        ("limited by", f"{limit['step']} ({limit['share']:.0%} of the step)"),
        (
            "memory",
            f"{size_text(plan['bytes_per_rank']['total'])} of {size_text(limit['memory_bytes'])} a GPU: "
            f"{'fits' if limit['fits'] else 'DOES NOT FIT'}",
        ),
        (
            "disk",
            f"{size_text(plan['checkpoint_bytes'])} a checkpoint, {size_text(plan['checkpoints_kept_bytes'])} those "
            f"kept at the end; {plan['dataset_images']:,} images are {size_text(stored['uint16'])} "
            f"({size_text(stored['packed9'])} packed9)",
        ),
    ]


def _network(at: dict[str, Any]) -> str:
    return f", {at['interconnect']} between them" if at["nodes"] > 1 else ""


def _batch(at: dict[str, Any]) -> str:
    text = f"{at['batch']} = {at['data_parallel']} ranks x {at['micro_batch']} x {at['accumulation']} accumulated"
    share = at["sequence_parallel"]
    return text + (f", each image shared by {share} ranks" if share > 1 else "")


def _sharding(at: dict[str, Any]) -> str:
    text = f"ZeRO stage {at['zero_stage']}"
    if at["hpz_group"] > 1:
        text += f", a second copy of the weights in each group of {at['hpz_group']}"
    if at["offload"]:
        text += f", {' and '.join(at['offload'])} in the processor's memory"
    return f"{text}; activation checkpointing: {at['activation_checkpointing']}" + ("; compiled" * at["compiled"])


def _tables(plan: dict[str, Any]) -> list[Table]:
    memory = plan["bytes_per_rank"]
    sizes = [[kind, f"{memory[kind] / 2**30:.2f}", text] for kind, text in _KINDS.items() if memory[kind]]
    modes = ", ".join(f"{mode} {size_text(size)}" for mode, size in plan["activation_bytes"].items())
    sent, seconds = plan["communication_bytes_per_step"], plan["message_seconds"]
    messages = [[name, f"{sent[name] / 1e9:.3f}", _ms(seconds[name])] for name in seconds]
    others = [
        [
            name,
            f"{other['bytes_per_rank'] / 2**30:.2f}",
            "yes" if other["fits"] else "no",
            f"{other['communication_bytes_per_step'] / 1e9:.3f}" if messages else "",
            _ms(other["message_seconds"]) if messages else "",
            _ms(other["step_seconds"]),
        ]
        for name, other in plan["by_ds_config"].items()
    ]
    parts, assumed = plan["step_parts"], plan["assumptions"]
    times = [
        [text.partition(":")[0], _ms(parts[kind]), text.partition(": ")[2]]
        for kind, text in _PARTS.items()
        if parts[kind]
    ]
    note = f"By assumptions, not measured: an MFU of {assumed['mfu']:.2f} of the computation alone (--mfu sets it)"
    if messages:
        note += (
            f", {assumed['links']:.0%} of the data sheets' bandwidths between GPUs, a message's delay of "
            f"{assumed['hop'] * 1e6:.1f} us a GPU and {assumed['hop_between_nodes'] * 1e6:.0f} us a node"
        )
    note += "; see docs/plan.md."
    found = [Table("Memory of a rank", ("kind", "GiB", "what it is"), sizes, f"Activations by checkpointing: {modes}.")]
    if messages:
        found.append(Table("Messages of a step", ("operation", "GB sent by a rank", "ms"), messages))
    found.append(
        Table(
            "Parts of a step", ("part", "ms", "how it counts"), [*times, ["step", _ms(plan["step_seconds"]), ""]], note
        )
    )
    headings = ("--ds", "GiB a rank", "fits", "GB sent", "ms of messages", "ms a step")
    found.append(Table("The same job by DeepSpeed configuration", headings, others).without_empty_columns())
    return found


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _advice(plan: dict[str, Any]) -> list[tuple[str, str]]:
    lines = plan["advice"] or ["nothing of what the planner knows would be faster by 3 % or more"]
    return [("advice", line) for line in lines]
