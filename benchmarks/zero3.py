"""What the harness costs on top of DeepSpeed: `python -m benchmarks.zero3` (one rank), or under a launcher.

The whole training loop (`igpt_ds.train.trainer`: loader, ZeRO-3 engine, judging, metrics, watchdog) against a
bare DeepSpeed loop over the same network, configuration and batch size, its batches in memory. They take turns, a
stretch of steps each; the harness's time is what its own metrics record, the bare loop's is the clock's. Target: at
least 0.98 of the bare loop's speed. Beside it: the share of a step that the loop waits for data (target under 0.5 %)
and that logging takes (under 1 %).
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.loader import K, build
from igpt_ds.config.deepspeed import load_ds_config
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import replace
from igpt_ds.distributed.device import at_hand
from igpt_ds.distributed.ranks import launched
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import Metrics, read_metrics
from igpt_ds.train.job import Job, prepare
from igpt_ds.train.machine import Asked


class Bare:
    """DeepSpeed as its documentation shows it, around the same network."""

    def __init__(self, job: Job) -> None:
        import deepspeed

        from igpt_ds.model.transformer import ImageGPT, initialise

        with deepspeed.zero.Init(config_dict_or_path=job.ds):
            model = ImageGPT(job.config)
        initialise(model, 0, lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=adam, config=job.ds)[0]
        shape = (job.division.micro_batch, job.config.sequence_length)
        self.tokens_BT = torch.randint(0, K, shape)

    def run(self, steps: int) -> float:
        """Seconds a step."""
        begin = time.perf_counter()
        for _ in range(steps):
            logits_BTK = self.engine(self.tokens_BT).logits_BTK
            loss = F.cross_entropy(logits_BTK.flatten(0, 1), self.tokens_BT.flatten())
            self.engine.backward(loss)
            self.engine.step()
        return (time.perf_counter() - begin) / steps


def main() -> None:
    """Alternate; print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    ranks = launched()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"data-{ranks.rank}"
        data.mkdir()
        build(data / "train", 32, "uint16", shards=1, rows=512)
        facts = {
            "model.layers": arguments.layers,
            "training.batch": arguments.micro_batch * ranks.world,
            "training.activation_checkpointing": "full",
            "training.log_every": arguments.steps,
            "training.validate_every": 0,
            "checkpoint.every": 10**9,
            "checkpoint.milestones": [],
            "health.spike_sigma": 0,
            "data.workers": 2,
        }
        config = load_config("s", [f"{key}={value}" for key, value in facts.items()])
        asked = Asked(replace(config, "data", sources=(str(data),)), load_ds_config("zero3"))
        job = prepare(asked, at_hand(ranks))
        measure(job, Run(Path(folder) / "run"), arguments.steps, arguments.rounds)


def measure(job: Job, run: Run, steps: int, rounds: int) -> None:
    """The rounds, in this process group."""
    import dataclasses

    from igpt_ds.distributed.engine import Engine
    from igpt_ds.loading.loader import train_batches
    from igpt_ds.loading.order import NOTHING_LEFT_OUT
    from igpt_ds.train.resume import Progress
    from igpt_ds.train.signals import StopRequest
    from igpt_ds.train.stability import Stability
    from igpt_ds.train.trainer import Trainer
    from igpt_ds.train.watchdog import Watchdog

    ranks = launched()
    engine = Engine(job.config, job.ds, job.division, ranks)
    bare = Bare(job)
    run.create()
    metrics = Metrics(run.path, 0, {}, None) if ranks.rank == 0 else None
    progress = Progress(0, NOTHING_LEFT_OUT, Stability(job.config.health, {}))

    def batches_after(progress: Progress) -> Any:
        return train_batches(
            job.train_sets,
            job.order,
            batch=job.config.training.batch,
            micro_batch=job.division.micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            start_step=progress.step,
            workers=job.config.data.workers,
        )

    ratios, waits, theirs = [], [], []
    bare.run(2)
    for _ in range(rounds + 1):
        stretch = dataclasses.replace(job, config=replace(job.config, "training", stop_at=progress.step + steps))
        watchdog = Watchdog(run.path, ranks.rank, ranks.world, 900.0, open(os.devnull, "w"))  # noqa: SIM115
        trainer = Trainer(stretch, run, engine, progress, batches_after, metrics, StopRequest(), watchdog)
        trainer.loop()
        progress = trainer.progress
        theirs.append(bare.run(steps))
        line = [each for each in read_metrics(run.metrics) if "loss" in each][-1]
        ratios.append(theirs[-1] * line["images_per_s"] / job.config.training.batch)
        waits.append(line["data_wait"])
    if metrics is not None:
        begin = time.perf_counter()
        for _ in range(200):
            metrics.write({"step": 1, "loss": 1.0, "bits": 1.0, "lr": 1.0, "grad_norm": 1.0, "mfu": None})
        logging_seconds = (time.perf_counter() - begin) / 200
        step = statistics.median(theirs[1:])
        print(f"bare loop {step:.3f} s a step, {ranks.world} rank(s), load {os.getloadavg()[0]:.1f}")
        print(f"harness / bare, speed  {statistics.median(ratios[1:]):.3f}    target at least 0.98")
        print(f"waiting for data       {statistics.median(waits[1:]):.3%}    target under 0.5 %")
        print(f"a line of metrics      {logging_seconds / step:.3%}    target under 1 %", flush=True)
    ranks.leave()
    os._exit(0)  # DeepSpeed's threads need seconds to wind up


if __name__ == "__main__":
    main()
