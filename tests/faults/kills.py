"""Kill a run again and again, and damage what it saved: `python -m tests.faults.kills [COUNT] [SEED]`.

Each life of the run ends by SIGKILL of one rank or of all, at a random moment: while it starts, trains, or saves.
Between lives the newest checkpoint is sometimes cut short or loses a bit. What must hold: every life goes on from the
newest checkpoint that is whole; no whole checkpoint vanishes but by the rule (the newest are kept); and the losses of
all lives together are, to the bit, those of a run that nobody touched.
"""

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.conftest import build_digits
from tests.faults.ranks import Ranks, kill, losses, ranks, run_to_its_end, whole_steps
from tests.helpers.commands import pretrain

WORLD, KEEP = 2, 3
STEPS = 100_000  # never reached: the run is ended by `stop_at`


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """A run that saves so often that a kill at any moment is likely to strike a save."""
    sets = [f"training.steps={STEPS}", "training.validate_every=0", "checkpoint.every=3", f"checkpoint.keep={KEEP}"]
    return pretrain(data, run, "--ds", "zero3", *(word for each in [*sets, *more] for word in ("--set", each)))


def kill_at_random(data: Path, folder: Path, count: int, seed: int = 0, tell: bool = False) -> dict[str, int]:
    """Kill a run `count` times, then let it end; what was seen, counted.

    Raises:
        AssertionError: a promise was broken.
    """
    rng = random.Random(seed)
    run = folder / "run"
    seen: Counter[str] = Counter()
    for life in range(count):
        before = whole_steps(run)
        with ranks(arguments(data, run), WORLD, folder) as running:
            seen[one_life(running, run, rng)] += 1
            if before:
                resumed(running, before, seen)
        if rng.random() < 0.3:
            seen[damage(run, rng)] += 1
        survived = whole_steps(run)
        assert not before or survived or seen["damaged"], "all whole checkpoints are gone"
        if tell:
            print(f"life {life + 1:>4}: whole checkpoints {survived}; {dict(seen)}", flush=True)
    end = max(losses(run), default=0) + 20
    text = run_to_its_end(arguments(data, run, f"training.stop_at={end}"), WORLD, folder)
    assert f"/{end}" in text or str(end) in text
    run_to_its_end(arguments(data, folder / "unbroken", f"training.stop_at={end}"), WORLD, folder)
    assert losses(run) == losses(folder / "unbroken"), "the losses are not those of the unbroken run"
    assert sorted(losses(run)) == list(range(1, end + 1))
    seen["steps"] = end
    return dict(seen)


def one_life(running: Ranks, run: Path, rng: random.Random) -> str:
    """Let the run live for a while and kill it; in which phase that was."""
    phase = "killed while starting"
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 5))
    else:
        recorded = max(losses(run), default=0)
        running.until(lambda: max(losses_now(run), default=0) != recorded and has_begun(running))
        time.sleep(rng.uniform(0, 1.0))
        saving = any((run / "checkpoints").glob(".step-*.tmp"))
        phase = "killed while saving" if saving else "killed while training"
    if rng.random() < 0.5:
        kill(rng.choice(running.processes), signal.SIGKILL)
        # The others lose their connection: they must end by themselves, and soon. Before they have met, the launcher
        # would end them.
        if phase != "killed while starting":
            running.wait(limit=30)
    running.kill()
    return phase


def losses_now(run: Path) -> dict[int, float]:
    """The losses of a run that is writing them."""
    return losses(run) if (run / "metrics.jsonl").exists() else {}


def has_begun(running: Ranks) -> bool:
    """Whether a training line was printed in this life."""
    return "  loss " in running.text()


def resumed(running: Ranks, before: list[int], seen: "Counter[str]") -> None:
    """The life that just ended must have gone on from the newest whole checkpoint, if it came that far."""
    text = running.text()
    if "resumed from" not in text:
        assert "  loss " not in text, f"it began anew though {before} were whole\n{text}"
        return
    assert f"at step {max(before)}\n" in text.split("resumed from", 1)[1][:400], f"{before}\n{text}"
    seen["resumed"] += 1


def damage(run: Path, rng: random.Random) -> str:
    """Cut a file of the newest checkpoint short, or flip one bit in it; another whole one must be left."""
    whole = whole_steps(run)
    if len(whole) < 2:
        return "left alone"
    folder = run / "checkpoints" / f"step-{whole[-1]:08d}"
    path = rng.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return "damaged"


def main() -> None:
    """The long version, with a line a life."""
    count, seed = (int(word) for word in [*sys.argv[1:], "100", "0"][:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        seen = kill_at_random(build_digits(folder / "digits"), folder, count, seed, tell=True)
        print(f"{count} lives in {time.monotonic() - began:.0f} s: {seen}")


if __name__ == "__main__":
    main()
