"""A rank through the real engine: built, stepped, saved; what each of them took."""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from igpt_ds.checkpoint.write import Saver
from igpt_ds.config.size import parameter_count
from igpt_ds.distributed.engine import Batch, Engine
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.rehearse.watch import Watched, storage_bytes, tensor_bytes, watch
from igpt_ds.text import size_text, time_text
from igpt_ds.train.machine import Settled

Tell = Callable[[str], None]
CPU = "CPU"

# ZeRO-3 learns the order of the modules in two steps, and compiled blocks are compiled in the first.
_WARM_UP = 2
_SAVED = 12  # bytes a parameter, on all ranks together


@dataclass(frozen=True)
class Measured:
    """What a rank took; bytes and seconds.

    Attributes:
        device: its name, as its driver gives it.
        kinds: bytes of the model's states that can be told by their names: see `igpt_ds.planner.memory.Memory`.
        stays: all that is there between two steps, `kinds` among it.
        build_peak, reserved: the most that was in use while the engine was built, and that a GPU's allocator held,
            with its gaps; 0 on a CPU.
        build, first: until the engine stands; the first step.
        steps: each of those that were timed.
        watched: one more step from within, see there.
        pause, saved: of a save, while training waits, and until the rank's part is on the disk.
        part: bytes of the rank's part of a checkpoint.
    """

    device: str
    kinds: dict[str, int]
    stays: int
    watched: Watched
    build_peak: int
    reserved: int
    build: float
    first: float
    steps: tuple[float, ...]
    pause: float
    saved: float
    part: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return self.stays + max(phase.peak for phase in self.watched.phases.values())

    @property
    def step(self) -> float:
        """Seconds a step of computation and of the host's work; what messages would take is not in it.

        To copy in place of sending is work that only a rehearsal has.
        """
        least = self.watched.busy if self.device != CPU else 0.0
        return max(least, statistics.median(self.steps) - self.watched.playing)

    @property
    def host(self) -> float:
        """Seconds of a step in which the device waits for the host: for Python, hooks, and launches.

        On a CPU it is the share that they have under the profiler, which makes all of it slower.
        """
        watched = self.watched
        if self.device != CPU:
            return self.step - watched.busy
        return self.step * (1 - watched.busy / (watched.seconds - watched.playing))


def measure(job: Settled, ranks: Ranks, steps: int, tell: Tell) -> Measured:
    """Run this rank's part of the job on random tokens.

    Args:
        steps: how many are timed; one more is watched.
        tell: is told what goes on.

    Raises:
        RunError: the device's memory does not suffice, or a gradient was not finite, so that nothing was updated.
        UserError: the disk has no room for a rank's part of a checkpoint.
    """
    _require_room(job)
    try:
        return _measure(job, ranks, steps, tell)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(f"it does not fit: {' '.join(str(error).split())[:400]}") from error


def _measure(job: Settled, ranks: Ranks, steps: int, tell: Tell) -> Measured:
    tell(f"building rank {ranks.rank} of {ranks.world} ({parameter_count(job.config):,} parameters in all)")
    before, began = tensor_bytes(), time.perf_counter()
    engine = Engine(job.config, job.ds, job.division, ranks)
    cuda = engine.device.type == "cuda"
    build = time.perf_counter() - began
    build_peak = torch.cuda.max_memory_allocated() if cuda else 0
    durations: list[float] = []
    for number in range(_WARM_UP + steps):
        past = f"; the one before took {time_text(durations[-1])}" if durations else f"; built in {time_text(build)}"
        tell(f"step {number + 1} of {_WARM_UP + steps + 1}{past}")
        began = time.perf_counter()
        _train(engine)
        if cuda:
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    tell(f"step {_WARM_UP + steps + 1} of {_WARM_UP + steps + 1}, watched")
    stays = torch.cuda.memory_allocated() if cuda else tensor_bytes() - before
    watched = watch(engine, lambda: _train(engine))
    reserved = torch.cuda.max_memory_reserved() if cuda else 0
    tell("saving this rank's part of a checkpoint")
    pause, saved, part = _save(engine)
    kinds = _kinds(engine)
    engine.close()
    return Measured(
        torch.cuda.get_device_name(engine.device) if cuda else CPU,
        kinds,
        stays,
        watched,
        build_peak,
        reserved,
        build,
        durations[0],
        tuple(durations[_WARM_UP:]),
        pause,
        saved,
        part,
    )


def _train(engine: Engine) -> None:
    """A step at the highest learning rate, so that gradients soon reach all weights, as in a training."""
    batches = [_batch(engine) for _ in range(engine.division.accumulation)]
    _, norm = engine.train_step(batches, engine.config.training.learning_rate)
    if not (math.isfinite(norm) and engine.deepspeed.was_step_applied()):
        raise RunError("a gradient was not finite, so the update was skipped: nothing of it can be measured")


def _batch(engine: Engine) -> Batch:
    """A micro-batch of random tokens."""
    config, images = engine.config, engine.division.micro_batch
    batch = {
        "tokens": torch.randint(config.palette_size, (images, config.sequence_length)),
        "positions": torch.arange(images),
    }
    if config.finetune is not None:
        batch["labels"] = torch.randint(config.classes, (images,))
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if engine.device.type == "cuda" else batch


def _kinds(engine: Engine) -> dict[str, int]:
    """Bytes of the model's states by kind, in the device's memory: what is offloaded is not there."""
    parameters = list(engine.module.parameters())
    # A parameter that ZeRO-3 has divided is empty, and holds its part beside it.
    held: list[Tensor] = [getattr(p, "ds_tensor", p.data) for p in parameters]
    states = engine.optimizer.state
    masters = [tensor for tensor in states if not any(tensor is p for p in parameters)]
    moments = [value for state in states.values() for value in state.values() if value.numel() > 1]
    kinds = {"parameters": held, "master": masters, "moments": moments}
    here = engine.device.type
    return {kind: storage_bytes(t for t in tensors if t.device.type == here) for kind, tensors in kinds.items()}


def _save(engine: Engine) -> tuple[float, float, int]:
    """Write this rank's part of a checkpoint, and delete it: seconds of pause and in all, bytes."""
    with tempfile.TemporaryDirectory(prefix="igpt-rehearse-") as folder:
        saver = Saver(Path(folder), 0, engine.ranks.world, engine.ranks.any)  # 0: which makes the directory
        began = time.perf_counter()
        try:
            saver.begin(1, engine.state.shards(), {"identity": {}, "config": {}})
            pause = time.perf_counter() - began
            _wait_for(saver)
        finally:
            # Whoever interrupts waits, too: nothing must be written into a folder that is being removed.
            _wait_for(saver)
        saved = time.perf_counter() - began
        written = list(Path(folder).rglob("*.safetensors"))
        if not list(Path(folder).rglob("*.json")):  # written last, beside the part that it describes
            raise RunError(f"{folder}: this rank's part of a checkpoint could not be written: look at the file system")
        return pause, saved, sum(path.stat().st_size for path in written)


def _wait_for(saver: Saver) -> None:
    while saver.busy:
        time.sleep(0.01)


def _require_room(job: Settled) -> None:
    """Refuse what the disk could not take at the end."""
    needed = _SAVED * parameter_count(job.config) // job.division.world
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise UserError(
            f"{folder}: {size_text(free)} are free, and a rank's part of a checkpoint takes {size_text(needed)}: set "
            "TMPDIR to a folder with room"
        )
