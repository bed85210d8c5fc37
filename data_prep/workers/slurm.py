"""A job's tasks on a Slurm cluster, through submitit: an array of jobs, and one job after it that finishes.

    FOLDER/submitted.json     the ids of the jobs that were submitted last
    FOLDER/failed-*.txt       one line of each job that failed for a reason that one line tells
    FOLDER/<job id>_*         submitit's: each job's pickled arguments, script and logs

FOLDER must lie where all nodes see it. Tasks are idempotent, so jobs may be requeued, stopped at their time limit
(submitit then requeues them, a few times) and submitted again at will.
"""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from igpt_ds.atomic import publish_text, writing
from igpt_ds.errors import RunError, UserError
from igpt_ds.reading import read_json

MAX_ARRAY = 1000  # Slurm's own limit, MaxArraySize, is 1001 unless a site raises it
_POLL = {"slurm": 10.0, "local": 0.2}  # seconds between two looks at the jobs

Task = TypeVar("Task")


@dataclass
class Cluster:
    """Where and how jobs are submitted.

    Attributes:
        folder: for scripts, logs and pickled tasks.
        workers: processes, and CPUs, of each job of the array.
        minutes: the time limit of each job.
        options: of sbatch, by their long names, such as partition, account, mem.
        parallelism: how many jobs of the array may run at a time.
        kind: "local" runs the jobs as processes of this machine, for tests.
    """

    folder: Path
    workers: int = 1
    minutes: int = 720
    options: dict[str, str] = field(default_factory=dict)
    parallelism: int = 256
    kind: Literal["slurm", "local"] = "slurm"
    _jobs: list[Any] = field(default_factory=list, init=False, repr=False)

    def submit(
        self,
        function: Callable[[Sequence[Task], int], object],
        pieces: Sequence[Sequence[Task]],
        finish: Callable[[], object],
    ) -> None:
        """Submit a job for each piece, `function(piece, workers)`, and one that calls `finish` if all end well."""
        self.folder = self.folder.resolve()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("failed-*.txt"):
                path.unlink()
        widths = [self.workers] * len(pieces)
        array = self._submit(lambda executor: executor.map_array(_Job(function, self.folder), pieces, widths))
        first = array[0].job_id.split("_")[0]
        self._jobs = list(array)
        if self.kind == "slurm":
            after = {"dependency": f"afterok:{first}", "kill-on-invalid-dep": "yes"}
            self._jobs += self._submit(lambda executor: [executor.submit(_Job(finish, self.folder))], after)
        publish_text(self.folder / "submitted.json", json.dumps({"jobs": self._ids()}) + "\n")

    def jobs(self) -> list[str]:
        """Ids of the jobs that were submitted last, here or by an earlier call."""
        try:
            return [str(each) for each in read_json(self.folder / "submitted.json")["jobs"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def running(self) -> bool:
        """Are any of them waiting or running?"""
        if self.kind == "local":
            return any(not job.done() for job in self._jobs)
        mine = set(self.jobs())
        return bool(mine) and not mine.isdisjoint(_queued())

    def wait(self, look: Callable[[], None]) -> None:
        """Wait for the jobs to end, calling `look` now and then."""
        while self.running():
            look()
            time.sleep(_POLL[self.kind])

    def failure(self, what: str) -> UserError:
        """An error that says `what` and, where a job has told it, why."""
        told = sorted(self.folder.glob("failed-*.txt"))
        if told:
            return UserError(f"{what}: {told[0].read_text(encoding='utf-8').strip()}")
        return UserError(
            f"{what}: jobs {', '.join(self.jobs())} ended early: see their logs in {self.folder}; "
            "the same command again continues"
        )

    def _ids(self) -> list[str]:
        return list(dict.fromkeys(job.job_id.split("_")[0] for job in self._jobs))

    def _submit(self, call: Callable[[Any], list[Any]], after: dict[str, str] | None = None) -> list[Any]:
        try:
            import submitit
        except ImportError:
            raise UserError('--executor slurm: submitit is not installed: run pip install "igpt-ds[slurm]"') from None
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.kind)
            executor.update_parameters(
                timeout_min=self.minutes,
                cpus_per_task=1 if after else self.workers,
                name="igpt-data",
                slurm_array_parallelism=self.parallelism,
                # srun does not take the job's --cpus-per-task over by itself.
                slurm_srun_args=[f"--cpus-per-task={1 if after else self.workers}"],
                slurm_additional_parameters={**self.options, **(after or {})},
            )
            return list(call(executor))
        except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"--executor slurm: cannot submit: {lines[-1] if lines else error}") from error


def refuse_pending(folder: Path, out: Path) -> None:
    """Refuse to make here what jobs that an earlier call has submitted are still making, where Slurm can be asked.

    Args:
        folder: of their scripts.
        out: what they make.
    """
    jobs = Cluster(folder)
    if shutil.which("squeue") and jobs.running():
        raise UserError(f"{out}: jobs {', '.join(jobs.jobs())} are at work there: wait, or end them with scancel")


class _Job:
    """What a job runs. submitit asks `checkpoint` what is to be run after a time limit or a preemption."""

    def __init__(self, function: Callable[..., object], folder: Path) -> None:
        self.function, self.folder = function, folder

    def __call__(self, *arguments: object) -> None:
        try:
            self.function(*arguments)
        except (UserError, RunError) as error:
            publish_text(self.folder / f"failed-{uuid.uuid4().hex}.txt", f"{error}\n")
            raise

    def checkpoint(self, *arguments: object) -> object:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def batches(tasks: Sequence[Task], most: int) -> list[Sequence[Task]]:
    """The tasks in at most so many pieces, each of neighbours."""
    size = -(-len(tasks) // most)
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]


def _queued() -> set[str]:
    """Ids of this user's jobs that wait or run; an array has one id."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%F"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split())
    except (OSError, subprocess.SubprocessError) as error:
        complaint = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise UserError(
            f"squeue: Slurm does not answer ({complaint[-1] if complaint else error}): try again"
        ) from error


def minutes(text: str) -> int:
    """A time limit as Slurm writes it (MINUTES, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS) in minutes, rounded up."""
    days, dash, rest = text.rpartition("-")
    try:
        fields = [int(each) for each in rest.split(":")]
        if min(fields) < 0 or len(fields) > 3:
            raise ValueError(text)
        if dash:
            hours, mins, seconds = [*fields, 0, 0][:3]
            seconds += 86_400 * int(days)
        elif len(fields) == 3:
            hours, mins, seconds = fields
        else:
            hours, (mins, seconds) = 0, [*fields, 0][:2]
        total = -(-(hours * 3600 + mins * 60 + seconds) // 60)
    except ValueError:
        raise UserError(f"--slurm-time {text}: no time: give minutes, or 12:00:00, or 2-00:00:00") from None
    if total < 1:
        raise UserError(f"--slurm-time {text}: no time at all: give minutes, or 12:00:00, or 2-00:00:00")
    return total
