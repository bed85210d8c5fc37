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


def plan_text(plan: dict[str, Any]) -> str:
    """What `make_plan` gives, for a terminal."""
    return "\n\n".join([_facts(plan), *(table.text() for table in _tables(plan)), _advice(plan)])


def _facts(plan: dict[str, Any]) -> str:
    at, assumed, limit = plan["layout"], plan["assumptions"], plan["limits"]
    stored = plan["dataset_bytes"]
    rows = [
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
            f"{time_text(plan['step_seconds'])} a step, {plan['tokens_per_second']:,.0f} tokens/s, "
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
    return aligned(rows)


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
    return f"{text}; activation checkpointing: {at['activation_checkpointing']}"


def _tables(plan: dict[str, Any]) -> list[Table]:
    memory = plan["bytes_per_rank"]
    sizes = [[kind, f"{memory[kind] / 2**30:.2f}", text] for kind, text in _KINDS.items() if memory[kind]]
    modes = ", ".join(f"{mode} {size_text(size)}" for mode, size in plan["activation_bytes"].items())
    sent = plan["communication_bytes_per_step"]
    seconds = plan["message_seconds"]
    messages = [[name, f"{sent[name] / 1e9:.3f}", f"{1e3 * seconds[name]:.1f}"] for name in seconds]
    others = [
        [
            name,
            f"{other['bytes_per_rank'] / 2**30:.2f}",
            "yes" if other["fits"] else "no",
            f"{other['communication_bytes_per_step'] / 1e9:.3f}",
            f"{1e3 * other['message_seconds']:.1f}",
            f"{1e3 * other['step_seconds']:.1f}",
        ]
        for name, other in plan["by_ds_config"].items()
    ]
    parts = plan["step_parts"]
    times = [
        ["computation", f"{1e3 * parts['computation']:.1f}", "model FLOPs and recomputation"],
        ["messages beside it", f"{1e3 * parts['messages_hidden']:.1f}", "count where they are longer"],
        ["messages after it", f"{1e3 * parts['messages']:.1f}", "added"],
        ["optimizer", f"{1e3 * parts['optimizer']:.1f}", "added"],
        ["step", f"{1e3 * plan['step_seconds']:.1f}", ""],
    ]
    assumed = plan["assumptions"]
    note = (
        f"Assumed, not measured: MFU {assumed['mfu']:.2f} of the computation alone (--mfu), "
        f"{assumed['bandwidth_share']:.0%} of the data sheets' bandwidths, a message's delay of "
        f"{assumed['hop'] * 1e6:.1f} us a GPU and {assumed['hop_between_nodes'] * 1e6:.0f} us a node."
    )
    found = [
        Table("Memory of a rank", ("kind", "GiB", "what it is"), sizes, f"Activations by checkpointing: {modes}."),
        Table("Parts of a step", ("part", "ms", "how it counts"), times, note),
    ]
    if messages:
        found.insert(1, Table("Messages of a step", ("operation", "GB sent by a rank", "ms"), messages))
    headings = ("--ds", "GiB a rank", "fits", "GB sent", "ms of messages", "ms a step")
    found.append(Table("The same job by DeepSpeed configuration", headings, others))
    return found


def _advice(plan: dict[str, Any]) -> str:
    lines = plan["advice"] or ["nothing of what the planner knows would be faster by 3 % or more"]
    return aligned([("advice", line) for line in lines])
