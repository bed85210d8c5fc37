"""The whole examination: what each rank reads, how the ranks go through it together, and rank 0's judgement."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from igpt_ds.distributed.ranks import Ranks, limit_threads
from igpt_ds.doctor import devices, disk, inputs, machine, ranks, speed
from igpt_ds.doctor.inputs import Plan, Request
from igpt_ds.doctor.report import Check, Report, attempt, judged, judged_together, merged, named
from igpt_ds.text import counted

_DISK_REMEDY = "choose a run directory that every node can write, on a file system with space left"
_SPARE_CHECKPOINTS = 2  # beside those kept: the one being written, and one set aside


@dataclass(frozen=True)
class Outcome:
    """Rank 0's report (None on the others), and whether a thread hangs in a collective for ever."""

    report: Report | None
    hangs: bool = False


@dataclass
class Reading:
    """What one rank read: name of a check -> fact, or {"error": text}."""

    host: str
    rank: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.host} rank {self.rank}"


def examine(request: Request, where: Ranks, planned_ranks: int | None, limit: float) -> Outcome:
    """Look at everything; every rank calls this.

    Args:
        planned_ranks: ranks of the run; None: as many as were started or, of one, as there are GPUs.
        limit: seconds that the ranks wait for one another at each stage.

    Raises:
        RunError: this rank cannot reach rank 0.
    """
    if where.world > 1:
        return _together(request, where, planned_ranks or where.world, limit)
    count = devices.visible()
    planned = _plan(request, planned_ranks or max(1, count))
    reading = Reading(socket.gethostname(), 0)
    reading.facts = local_facts(request, planned, range(count), 0, leads=True)
    gpus: list[int | None] = list(range(count))
    products = [(f"GPU {gpu}", attempt(partial(speed.matmul, gpu))) for gpu in gpus or [None]]
    here = min(planned.ranks, max(1, count))
    checks = judge([reading], planned, products, [reading.host] * here)
    return Outcome(Report(checks, _unchecked(request, planned, 1), 1, [reading.host]))


def _together(request: Request, where: Ranks, planned_ranks: int, limit: float) -> Outcome:
    """The same on many ranks, and what only many can show. Whatever fails, all reach the same collectives."""
    group = ranks.Group(where, limit)
    planned, mine, hangs = Plan(), Reading(socket.gethostname(), where.rank), False
    device = devices.own(where)
    own = [] if device is None else [device]
    absent: ranks.AbsentError | None = None
    readings: list[Reading] = []
    try:
        group.start()
        planned = _plan(request, planned_ranks, where) if where.rank == 0 else planned
        sources, validated = group.tell("data", [planned.sources or request.data, _validated(planned)])
        mine.facts = local_facts(request, planned, own, where.rank, group.leads, sources, validated)
        group.gather("the end of each node's checks", None)
        limit_threads(group.neighbours)
        mine.facts["matmul"] = attempt(lambda: speed.matmul(device))
        collective, hangs = _collectives(group, device)
        mine.facts |= collective
        everything = group.gather("the report", mine.facts, last=True)
        readings = [Reading(group.hosts[rank], rank, facts) for rank, facts in enumerate(everything)]
    except ranks.AbsentError as error:
        absent = error
    if where.rank != 0:
        return Outcome(None, hangs)
    if absent is not None:
        if not mine.facts:
            planned = _plan(request, planned_ranks, where)
            mine.facts = local_facts(request, planned, own, where.rank, leads=True)
        readings = [mine]
    products = [(r.label, r.facts["matmul"]) for r in readings if "matmul" in r.facts] if absent is None else []
    hosts = group.hosts or [mine.host]
    checks = [judge_presence(group, absent), *judge(readings, planned, products, hosts)]
    return Outcome(Report(checks, _unchecked(request, planned, where.world), where.world, hosts), hangs)


def _collectives(group: ranks.Group, device: int | None) -> tuple[dict[str, Any], bool]:
    """Clocks and all-reduce. Each begins only when every rank can; True as well if it hangs still."""
    import torch.distributed as dist

    where = group.where
    on_gpus = group.gather("the end of the matrix multiplication", device is not None)
    backend = group.tell("backend", "nccl" if all(on_gpus) else "gloo")
    facts: dict[str, Any] = {"backend": backend}
    if fault := _all_can(group, "the process group", group.join):
        return facts | {"all_reduce": fault}, False
    facts["clock"] = attempt(group.clock_differences)
    if fault := _all_can(group, "the clocks", lambda: facts["clock"]):
        return facts | {"all_reduce": fault}, False

    def add_up() -> dict[str, Any]:
        # NCCL's own watchdog would kill the process at its time-out, and with it the report.
        longer = timedelta(seconds=4 * group.limit)
        over = dist.new_group(backend="nccl", timeout=longer) if backend == "nccl" else None
        return speed.all_reduce(where.rank, where.world, device if backend == "nccl" else None, over)

    facts["all_reduce"], hangs = ranks.within(0.75 * group.limit, add_up)
    if not hangs:
        attempt(dist.destroy_process_group)
    return facts, hangs


def _all_can(group: ranks.Group, stage: str, action: Callable[[], Any]) -> dict[str, str] | None:
    """Do it; None if it went well on every rank, else this rank's fault, or that another has one."""
    result = attempt(action)
    fault = result if isinstance(result, dict) and "error" in result else None
    faulty = group.tell(f"{stage}, faults", [rank for rank, bad in enumerate(group.gather(stage, fault)) if bad])
    if not faulty:
        return None
    return fault or {"error": f"{named([group.label(rank) for rank in faulty])} failed before"}


def local_facts(
    request: Request,
    planned: Plan,
    gpus: Sequence[int],
    rank: int,
    leads: bool,
    sources: Sequence[str] | None = None,
    validated: bool | None = None,
) -> dict[str, Any]:
    """What one rank can read without the others.

    Args:
        gpus: those of this rank.
        leads: also what all ranks of the node share.
        sources, validated: rank 0's word on the data; without it, as `planned` says.
    """
    run = request.run
    sources = sources if sources is not None else (planned.sources or request.data)
    validated = validated if validated is not None else _validated(planned)
    facts = {"threads": attempt(machine.read_cores)}
    if gpus:
        facts["gpu_memory"] = attempt(lambda: devices.read_gpu_memory(list(gpus)))
        facts["only_gpu"] = attempt(devices.only)
    if leads:
        facts["versions"] = attempt(machine.read_versions)
        facts["compile_locks"] = attempt(machine.read_locks)
        facts["gpus"] = attempt(devices.read_gpus)
        facts["memory"] = attempt(machine.read_memory)
        facts["shared_memory"] = attempt(machine.read_shared_memory)
        facts["open_files"] = attempt(machine.read_open_files)
        if run is not None:
            facts["disk"] = attempt(lambda: disk.read_disk(run))
        if sources:
            facts["data"] = attempt(lambda: inputs.read_data(sources, validated))
    if rank == 0 and run is not None:
        facts["run"] = attempt(lambda: inputs.read_run(run, planned))
    return facts


def judge(
    readings: Sequence[Reading], planned: Plan, products: Sequence[tuple[str, dict[str, Any]]], hosts: Sequence[str]
) -> list[Check]:
    """All checks of what the ranks read, in the table's order.

    Args:
        readings: of every rank; of rank 0 alone where others are absent.
        products: (label, `speed.matmul`) of each rank or GPU.
        hosts: of each rank that the run is to have where it was looked at.
    """
    need, first = planned.need, readings[0]
    bfloat16, per_rank = (need.bfloat16, need.rank) if need else (None, None)
    in_ram: float | None = per_rank
    if need and "gpu_memory" in first.facts:
        in_ram = need.checkpoint / planned.ranks  # a rank's part on its way to the disk
    checks: list[Check] = []

    def each(name: str, judge_one: Callable[[Reading, Any], Check], alike: bool = False) -> None:
        """Every reading of one name by itself, then all in one line."""
        found = [r for r in readings if name in r.facts]
        if found:
            verdicts = [judged(name, r.facts[name], partial(judge_one, r)) for r in found]
            labels = [r.label if name == "gpu_memory" else r.host for r in found]
            checks.append(merged(list(zip(labels, verdicts, strict=True)), alike))

    each("versions", lambda r, fact: machine.judge_versions(fact), alike=True)
    each("compile_locks", lambda r, fact: machine.judge_locks(fact))
    # A rank to which its scheduler shows its own GPU alone sees none of its neighbours'.
    alone = {(r.host, r.facts["only_gpu"]) for r in readings if isinstance(r.facts.get("only_gpu"), str)}
    each_its_own = {host for host in hosts if sum(place == host for place, _ in alone) == hosts.count(host)}
    sharers = {host: 1 if host in each_its_own else hosts.count(host) for host in hosts}
    each("gpus", lambda r, fact: devices.judge_gpus(fact, sharers[r.host], bfloat16), alike=True)
    each("gpu_memory", lambda r, fact: devices.judge_gpu_memory(fact, per_rank))
    if products:
        checks.append(judged_together("matmul", products, speed.judge_matmul))
    if "all_reduce" in first.facts:
        added = [(r.label, r.facts["all_reduce"]) for r in readings]
        backend = first.facts["backend"]
        judge_sum = partial(speed.judge_all_reduce, backend=backend)
        checks.append(judged_together("all_reduce", added, judge_sum, f"mend the network: {speed.NETWORK[backend]}"))
    each("memory", lambda r, fact: machine.judge_memory(fact, in_ram, hosts.count(r.host)))
    each("shared_memory", lambda r, fact: machine.judge_shared_memory(fact))
    each("open_files", lambda r, fact: machine.judge_open_files(fact))
    cores = [(r.host, r.facts["threads"]) for r in readings]
    checks.append(judged_together("threads", cores, machine.judge_threads))
    checks += _judge_disk(readings, planned)
    if "clock" in first.facts:
        checks.append(judged("clock_ranks", first.facts["clock"], lambda ahead: _judge_clocks(readings, ahead)))
    each("data", lambda r, fact: inputs.judge_data(fact))
    if planned.config or planned.fault:
        checks.append(judged("job", planned, inputs.judge_job))
    each("run", lambda r, fact: inputs.judge_run(fact))
    return checks


def _judge_disk(readings: Sequence[Reading], planned: Plan) -> list[Check]:
    found = [(r.host, r.facts["disk"]) for r in readings if "disk" in r.facts]
    if not found:
        return []
    need, run = planned.need, readings[0].facts.get("run", {})
    size = need.checkpoint if need else None
    wanted = (need.kept if need else 1) + _SPARE_CHECKPOINTS
    # Space is the file system's: rank 0's reading stands for all.
    space, present = found[0][1], run.get("present", 0)
    return [
        judged_together("disk_speed", found, partial(disk.judge_disk_speed, checkpoint=size), _DISK_REMEDY),
        judged("disk_space", space, lambda fact: disk.judge_disk_space(fact, size, present, wanted)),
        judged("inodes", space, lambda fact: disk.judge_inodes(fact, planned.ranks, wanted)),
        merged([(host, judged("clock_disk", fact, disk.judge_disk_clock)) for host, fact in found]),
    ]


def _judge_clocks(readings: Sequence[Reading], ahead: Sequence[float]) -> Check:
    furthest, reading = max(zip(ahead, readings, strict=True), key=lambda pair: abs(pair[0]))
    return disk.judge_clock("clock_ranks", furthest, f"the clock of {reading.label}")


def judge_presence(group: ranks.Group, absent: ranks.AbsentError | None) -> Check:
    """Whether every rank came through to the end."""
    world = group.where.world
    if absent is None:
        return Check("ranks", "OK", f"{world} on {counted(len(set(group.hosts)), 'host')}, all there")
    who = named([group.label(rank) for rank in absent.ranks])
    value = f"{who} of {world} missing at {absent.stage} after {group.limit:.0f} s"
    return Check("ranks", "FAIL", value, "look at what they printed; leave their nodes out (sbatch --exclude)")


def _plan(request: Request, count: int, where: Ranks | None = None) -> Plan:
    seat = (where.neighbours, where.local_rank) if where else ()
    planned = attempt(lambda: inputs.make_plan(request, count, *seat))
    return planned if isinstance(planned, Plan) else Plan(ranks=count, fault=planned["error"])


def _validated(planned: Plan) -> bool | None:
    config = planned.config
    return config.training.validate_every > 0 and not config.folded if config else None


def _unchecked(request: Request, planned: Plan, world: int) -> list[str]:
    found = []
    if request.run is None:
        found.append("disk and run directory (no RUN)")
    if not (request.data or planned.sources):
        found.append("data (no --data)")
    if planned.need is None and not planned.fault:
        found.append("memory and disk space against the model's need (no --preset, or its data are not known)")
    if world == 1:
        found.append("all-reduce and clocks between ranks (started as one rank)")
    return found
