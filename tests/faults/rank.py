"""One rank of a run with a fault in it: `python -m tests.faults.rank FAULT RANK STEP pretrain ...`.

The faults are put in from outside, so that the program under test has no code for them. What hangs does so once in the
life of a run directory, so that the run that is started again is sound. Bad batches stay bad: `nan:5` and `spike:5` are
five of them in a row, by their number in the data order.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def strike(fault: str, run: Path) -> bool:
    """Whether the fault is due: once in the life of the run directory."""
    memory = run / f"struck-{fault}"
    if memory.exists():
        return False
    memory.touch()
    return True


def hang() -> None:
    """What a stack must show."""
    while True:
        time.sleep(0.1)


def with_bad_batches(kind: str, bad: range) -> Callable[..., Any]:
    """`Engine.train_step` whose loss is not finite, or a hundred times too high, on some batches of the data order."""
    from igpt_ds.distributed.engine import Engine

    factor = float("nan") if kind == "nan" else 100.0
    train_step = Engine.train_step

    def train_step_with_fault(self: Engine, batches: Iterable[Any], rate: float) -> tuple[torch.Tensor, float]:
        held = list(batches)
        objective = self.objective
        if int(held[0]["positions"][0]) // self.division.batch in bad:
            losses = objective.image_losses
            self.objective = SimpleNamespace(mask=objective.mask, image_losses=lambda *t: losses(*t) * factor)
        try:
            return train_step(self, held, rate)
        finally:
            self.objective = objective

    return train_step_with_fault


def install(fault: str, on_rank: int, at_step: int, run: Path) -> None:
    """Put a fault into the program."""
    from igpt_ds.distributed.engine import Engine
    from igpt_ds.distributed.ranks import launched
    from igpt_ds.loading import loader

    rank = launched().rank
    if rank != on_rank:
        return
    kind, _, count = fault.partition(":")
    if kind == "stuck-loader":
        batches = loader.train_batches

        def stuck(*arguments: Any, start_step: int, **options: Any) -> Iterator[Any]:
            for step, batch in enumerate(batches(*arguments, start_step=start_step, **options), start_step):
                if step == at_step and strike(fault, run):
                    hang()
                yield batch

        loader.train_batches = stuck
    elif kind == "stuck-evaluation":
        evaluations = loader.evaluation_batches

        def stuck_evaluation(*arguments: Any) -> Iterator[Any]:
            for batch in evaluations(*arguments):
                if strike(fault, run):
                    hang()
                yield batch

        loader.evaluation_batches = stuck_evaluation
    elif kind in ("nan", "spike"):
        Engine.train_step = with_bad_batches(kind, range(at_step, at_step + int(count or 1)))
    else:
        assert fault == "none", fault


def main() -> None:
    """Install the fault, then be igpt-ds."""
    fault, rank, step, *arguments = sys.argv[1:]
    run = Path(arguments[1])
    install(fault, int(rank), int(step), run)
    sys.argv = ["igpt-ds", *arguments]
    from igpt_ds.cli import main as igpt_ds

    igpt_ds()


if __name__ == "__main__":
    main()
