"""One Slurm for all tests here, and what they ask of it.

Without Slurm, root or the permission to simulate nodes the tests are skipped; with IGPT_REQUIRE_SLURM set they fail.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igpt_ds.run.metrics import read_metrics
from tests.faults.ranks import losses, run_to_its_end
from tests.helpers.ranks import ROOT, quick_start

CLUSTER_SCRIPT = Path(__file__).with_name("cluster.sh")
LIMIT = 240.0  # seconds for anything to happen: a machine may be loaded
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}

STEPS = 60  # with checkpoints at every tenth, so that there is time to strike in between
SETTINGS = ["seed=1", f"training.steps={STEPS}", "training.validate_every=0", "checkpoint.every=10"]
TRAINING = [word for setting in SETTINGS for word in ("--set", setting)]


class Job:
    """A job that was submitted; `log` is what its script wrote."""

    def __init__(self, slurm: "Slurm", number: str, log: Path) -> None:
        self.slurm, self.number, self._log = slurm, number, log
        self._hastened = 0  # the restart that was hastened last

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def facts(self) -> dict[str, str]:
        """What Slurm knows about it."""
        words = self.slurm.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    @property
    def nodes(self) -> list[str]:
        return self.slurm.call("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something to happen before the job ends; a requeued job need not wait its whole time.

        Raises:
            AssertionError: it ended first, or the time was up.
        """
        deadline = time.monotonic() + LIMIT
        while True:
            facts = self.facts()  # before looking, so that what happens last is not missed
            if happened():
                return
            assert facts["JobState"] not in ENDS and time.monotonic() < deadline, f"{facts}\n{self.log}"
            if facts["Reason"] == "BeginTime" and int(facts["Restarts"]) > self._hastened:
                self._hastened = int(facts["Restarts"])
                # Not in the second in which the job was requeued: its node would take it for the one before.
                self.slurm.call("scontrol", "update", f"JobId={self.number}", "StartTime=now+2")
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for its end; the last state."""
        self.until(lambda: self.state in ENDS)
        return self.state

    def notify(self) -> None:
        """Send the notice that Slurm sends before the time is up."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", self.number)


class Slurm:
    """The cluster's commands; `submit` takes scripts as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = quick_start() | {
            "CLUSTER": str(folder),
            "OWNER": str(os.getpid()),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PRESET": "tiny",
        }
        self._jobs: list[Job] = []

    def call(self, *command: str, **environment: str) -> str:
        """Run a command of Slurm from the repository's root; what it wrote.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def cluster(self, *command: str) -> None:
        """Call cluster.sh."""
        self.call(str(CLUSTER_SCRIPT), *command)

    def submit(self, log: Path, command: list[str], environment: dict[str, str] | None = None, nodes: int = 2) -> Job:
        """Submit a script with one rank a node.

        Args:
            log: `%a` in its name stands for the number of a task of an array.
            command: options of sbatch, the script, its arguments.
        """
        size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=2G"]
        # Two hours: the end of a short time would be announced at once.
        words = ["sbatch", "--parsable", "--export=ALL", *size, "--time=120", f"--output={log}", *command]
        job = Job(self, self.call(*words, **(environment or {})).strip(), log)
        self._jobs.append(job)
        return job

    def tidy(self) -> None:
        """End all jobs, switch all nodes on, and wait until they are idle."""
        for job in self._jobs:
            with contextlib.suppress(AssertionError):
                self.call("scancel", job.number)
        self._jobs.clear()
        for number in "123":
            self.cluster("start_node", number)
        deadline = time.monotonic() + LIMIT
        while self.call("sinfo", "--noheader", "-p", "main", "-N", "-t", "idle", "-o", "%N").split() != [
            "node1",
            "node2",
            "node3",
        ]:
            assert time.monotonic() < deadline, self.call("sinfo") + self.call("squeue")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster while the tests here run."""
    if reason := _missing():
        if os.environ.get("IGPT_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm, though IGPT_REQUIRE_SLURM is set: {reason}")
        pytest.skip(f"no Slurm: {reason}")
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        slurm.cluster("up")
        yield slurm
    finally:
        slurm.cluster("down")


@pytest.fixture
def slurm(running_cluster: Slurm) -> Iterator[Slurm]:
    """The cluster with all nodes idle; what a test leaves running is ended."""
    yield running_cluster
    running_cluster.tidy()


@pytest.fixture(scope="session")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of the same training in two plain processes."""
    folder = tmp_path_factory.mktemp("unbroken")
    arguments = ["pretrain", str(folder / "run"), "--preset", "tiny", "--data", str(digits), *TRAINING]
    run_to_its_end(arguments, 2, folder, limit=LIMIT)
    return losses(folder / "run")


def reached(run: Path) -> int:
    """The last step that is recorded."""
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line), default=0)


@contextlib.contextmanager
def held(job: Job, run: Path, beyond: int = 0) -> Iterator[dict[str, int]]:
    """Rank -> process id, while the ranks are stopped: time stands still for them.

    Args:
        beyond: they are stopped when they have done more steps than these, and have a checkpoint.
    """
    job.until(lambda: any((run / "checkpoints").glob("step-*")) and reached(run) > beyond)
    processes = rank_processes(run)
    assert sorted(processes) == ["0", "1"], processes
    for pid in processes.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        assert 0 < reached(run) < STEPS
        yield processes
    finally:
        for pid in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def noticed(pid: int) -> bool:
    """Whether a stopped process has a SIGUSR1 to find when it goes on."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)) >> (signal.SIGUSR1 - 1) & 1)


def rank_processes(run: Path) -> dict[str, int]:
    """Rank -> process id of the Python processes that train in this run directory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if words[:1] == [b"python"] and os.fsencode(run) in words:
                found[environment_of(int(path.name))["RANK"]] = int(path.name)
    return found


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries if entry)}


def _missing() -> str:
    """Why there can be no cluster here, or nothing."""
    if os.geteuid() != 0:
        return "simulated nodes need root"
    tools = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "unshare") if shutil.which(name) is None]
    if tools:
        return f"{', '.join(tools)} not installed (apt-get install slurm-wlm)"
    spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(spaces, capture_output=True, check=False).returncode:
        return "name spaces are not permitted here"
    return ""
