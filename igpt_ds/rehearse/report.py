"""What was measured of a rank, beside what is planned for it: as plain numbers, and as text."""

from dataclasses import asdict
from typing import Any

from igpt_ds.config.size import flops_per_image, parameter_count
from igpt_ds.planner.choose import USABLE
from igpt_ds.planner.memory import bytes_per_rank
from igpt_ds.rehearse.job import Rehearsal
from igpt_ds.rehearse.measure import Measured
from igpt_ds.text import Table, aligned, counted, size_text, time_text

# Of `igpt_ds.planner.memory.Memory`, those whose tensors are known; the rest is told apart by when it is there.
_STATES = {
    "parameters": "weights of this rank",
    "master": "float32 weights that Adam updates",
    "moments": "Adam's two",
}


def make_record(rehearsal: Rehearsal, rank: int, measured: Measured) -> dict[str, Any]:
    """Everything that is known: bytes, seconds, FLOPs, all of them plain numbers."""
    layout, plan = rehearsal.here.layout, rehearsal.memory
    config, recipe = layout.config, layout.config.training
    # On a CPU all memory is the processor's.
    planned_peak = plan.total + (plan.host if rehearsal.gpu is None else 0)
    ratio = measured.peak / planned_peak
    job_peak = measured.peak if rehearsal.real else int(ratio * bytes_per_rank(rehearsal.planned.layout).total)
    planned = {}
    if rehearsal.gpu is not None or not plan.host:  # else what is offloaded lies in the same memory, planned in one
        planned = {kind: getattr(plan, kind) for kind in _STATES}
        planned["rest"] = planned_peak - sum(planned.values())
    return {
        "name": config.name,
        "parameters": parameter_count(rehearsal.planned.config),
        "decided": rehearsal.planned.how,
        "job": {
            "device": rehearsal.device.label.replace(".*", " "),
            "ranks": layout.ranks,
            "nodes": layout.nodes,
            "ranks_per_node": layout.ranks_per_node,
            "precision": rehearsal.planned.config.training.precision,
            "peak_bytes": job_peak,
            "device_bytes": int(rehearsal.device.memory),
            "fits": job_peak <= USABLE * rehearsal.device.memory,
            **_speed(rehearsal, measured),
        },
        "rehearsed": {
            "device": measured.device,
            "rank": rank,
            "precision": recipe.precision,
            "compile": recipe.compile,
            "zero_stage": layout.stage,
            "activation_checkpointing": layout.checkpointing,
            "tokens_per_image": config.sequence_length,
            "batch": layout.division.batch,
            "micro_batch": layout.division.micro_batch,
            "accumulation": layout.division.accumulation,
        },
        "bytes": {
            **{kind: measured.kinds[kind] for kind in _STATES},
            "stays": measured.stays,
            "phases": {name: asdict(phase) for name, phase in measured.watched.phases.items()},
            "peak": measured.peak,
            "build_peak": measured.build_peak,
            "reserved": measured.reserved,
        },
        "planned_bytes": {**planned, "peak": planned_peak},
        "measured_over_planned": ratio,
        "seconds": {
            "build": measured.build,
            "first_step": measured.first,
            "steps": list(measured.steps),
            "step": measured.step,
            "computation": measured.step - measured.host,
            "host": measured.host,
            "played_messages": measured.watched.playing,
            "save_pause": measured.pause,
            "save": measured.saved,
        },
        "save_bytes": measured.part,
    }


def _speed(rehearsal: Rehearsal, measured: Measured) -> dict[str, Any]:
    """How fast the job is: what was computed here with the messages planned; or all of it as planned, on a CPU say."""
    layout, time = rehearsal.planned.layout, rehearsal.time
    config, step = layout.config, time.step
    if rehearsal.real:
        # The optimiser does not begin before the last message of the passes has come.
        passes = max(measured.step - time.optimizer, time.hidden_messages)
        step = passes + time.optimizer + time.messages
    flops = flops_per_image(config) * config.training.batch
    return {
        "measured": rehearsal.real,
        "step_seconds": step,
        "planned_seconds": {
            "step": time.step,
            "computation": time.computation + time.gradients + time.optimizer,
            "host": time.host,
            "messages_hidden": time.hidden_messages,
            "messages": time.messages,
        },
        "images_per_second": config.training.batch / step,
        "mfu": flops / step / (layout.ranks * rehearsal.device.peak(config.training.precision)),
        "steps": config.training.steps,
        "days": config.training.steps * step / 86400,
    }


def text(record: dict[str, Any]) -> str:
    """The record for a terminal."""
    return "\n\n".join([_facts(record), *(table.text() for table in _tables(record))])


def _facts(record: dict[str, Any]) -> str:
    job, here, seconds = record["job"], record["rehearsed"], record["seconds"]
    how = "computed here, messages as planned" if job["measured"] else "planned"
    likely = "" if job["measured"] else ", planned, times the ratio below"
    return aligned(
        [
            ("job", f"{record['name']}, {record['parameters']:,} parameters, on {record['decided']}"),
            (
                "rehearsed",
                f"rank {here['rank']} of {job['ranks']} on {here['device']}: {here['precision']}, ZeRO-"
                f"{here['zero_stage']}, recomputation {here['activation_checkpointing']}, "
                f"{here['micro_batch']} x {here['accumulation']} of {here['batch']} images, "
                f"{here['tokens_per_image']} tokens an image" + (", compiled" if here["compile"] else ""),
            ),
            (
                "memory",
                f"{size_text(job['peak_bytes'])} of the {size_text(job['device_bytes'])} of one {job['device']}"
                f"{likely}: {'fits' if job['fits'] else 'DOES NOT FIT'}",
            ),
            (
                "time",
                f"{time_text(job['step_seconds'])} a step, {job['images_per_second']:.3g} images/s, {job['days']:.3g} "
                f"days for {job['steps']:,} steps, MFU {job['mfu']:.1%} ({how})",
            ),
            (
                "save",
                f"{size_text(record['save_bytes'])} of this rank in {time_text(seconds['save'])}, of which training "
                f"waits {time_text(seconds['save_pause'])}",
            ),
        ]
    )


def _tables(record: dict[str, Any]) -> list[Table]:
    found, planned, seconds = record["bytes"], record["planned_bytes"], record["seconds"]

    unit, name = (2**30, "GiB") if found["peak"] >= 2**30 else (2**20, "MiB")

    def size(count: int | None) -> str:
        return "" if count is None else f"{count / unit:.2f}"

    kinds = [
        [kind, size(found[kind]), size(planned.get(kind)), about]
        for kind, about in _STATES.items()
        if found[kind] or planned.get(kind)
    ]
    rest = found["peak"] - sum(found[kind] for kind in _STATES)
    kinds += [
        ["rest", size(rest), size(planned.get("rest")), "gradients, activations, gathered weights, buffers"],
        ["total", size(found["peak"]), size(planned["peak"]), "at the peak of a step"],
    ]
    phases = [["between steps", size(found["stays"]), ""]]
    phases += [
        [phase, size(found["stays"] + at["end"]), size(found["stays"] + at["peak"])]
        for phase, at in found["phases"].items()
    ]
    note = f"Measured / planned: {record['measured_over_planned']:.3f}."
    if found["reserved"]:
        note += (
            f" Torch's allocator held {size_text(found['reserved'])} at most, {size_text(found['build_peak'])} were in "
            "use while the engine was built. The driver and NCCL come on top."
        )
    job, measured = record["job"], counted(len(seconds["steps"]), "step")
    expected = job["planned_seconds"]
    times = [
        ["build", f"{seconds['build']:.2f}", "", "the engine, its weights drawn"],
        ["first step", f"{seconds['first_step']:.2f}", "", "with what is compiled or learnt in it"],
        ["step", f"{seconds['step']:.3f}", "", f"median of {measured}, without messages"],
        ["  computation", f"{seconds['computation']:.3f}", f"{expected['computation']:.3f}", "the device is busy"],
        ["  host", f"{seconds['host']:.3f}", "", "the device waits for Python, hooks, launches"],
        ["messages beside it", "", f"{expected['messages_hidden']:.3f}", "count where they are longer"],
        ["messages after it", "", f"{expected['messages']:.3f}", "added"],
        ["step of the job", "", f"{expected['step']:.3f}", ""],
    ]
    if job["measured"]:
        times[-1][1] = f"{job['step_seconds']:.3f}"
    headings = ("what", f"s on {record['rehearsed']['device']}", f"s planned on {job['device']}", "how it counts")
    return [
        Table("Memory of the rehearsed rank", ("kind", name, f"{name} planned", "what it is"), kinds, note),
        Table("By phase of a step", ("phase", f"{name} at its end", f"{name} at its peak"), phases),
        Table("Seconds", headings, times),
    ]
