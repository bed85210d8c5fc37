"""What becomes of gradients in bfloat16, and what it costs: `python -m benchmarks.gradients`, a minute on one core.

Two tables. How far a gradient is from the exact one when the ranks' parts are added in bfloat16 as a ring adds them,
each sum rounded, beside how far the bfloat16 pass itself is from the float32 one. And how many bytes a parameter a
single rank moves in a step beside the network's own passes and Adam's update, by ZeRO stage (what torch's operations
read and write): gradients are copied, added and cleared, their norm is taken, and new weights are copied.

Under a launcher, such as `torchrun --nproc-per-node 4 -m benchmarks.gradients`: the losses of a small training in
float32, and in bfloat16 with gradients summed in bfloat16 and in float32.
"""

import logging
import os
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.distributed.ranks import Ranks, launched
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import next_pixel

IMAGES, STEPS, BATCH = 1500, 200, 32
RANKS = (2, 4, 8, 16, 64, 256, 512)
# Operations that move nothing.
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "expand",
        "narrow",
        "permute",
        "reshape",
        "select",
        "set_",
    ),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "item", "_local_scalar_dense"),
}


class Trained:
    """A small network on 8 x 8 digits, under DeepSpeed."""

    def __init__(self, ranks: Ranks, stage: int, precision: str, summed_in: str = "", **shape: int) -> None:
        from igpt_ds.distributed.engine import Engine

        shape = {"layers": 3, "width": 64, "batch": BATCH, "micro_batch": BATCH // ranks.world} | shape
        self.division = divide_batch(shape["batch"], shape["micro_batch"], ranks.world)
        config = load_config(
            "tiny",
            [
                *(f"model.{key}={shape[key]}" for key in ("layers", "width")),
                *(f"training.{key}={shape[key]}" for key in ("batch", "micro_batch")),
                *("model.heads=4", "data.resolution=8", "data.palette_size=17", f"training.precision={precision}"),
                *("training.activation_checkpointing=none", "training.compile=false"),
            ],
        )
        tree = load_ds_config(f"zero{stage}") | ({"communication_data_type": summed_in} if summed_in else {})
        self.ranks, self.engine = ranks, Engine(config, resolve(tree, config, self.division), self.division, ranks)
        self.images = torch.from_numpy(load_digits().images.reshape(-1, 64).astype(np.int64))[:IMAGES]

    def batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches."""
        drawn = torch.from_numpy(np.random.default_rng(step).integers(0, IMAGES, self.division.batch))
        each = drawn.view(self.division.accumulation, self.division.world, -1)[:, self.ranks.rank]
        return [{"tokens": self.images[positions], "positions": positions} for positions in each]

    def step(self, step: int) -> float:
        """One update; the mean loss over all ranks."""
        rate = 0.003 * min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        means, _ = self.engine.train_step(self.batches(step), rate)
        return self.ranks.sum(means.tolist())[0] / self.ranks.world


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, counted while this is the mode."""

    bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count the tensors that it is given and gives back; those written in place twice."""
        out, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__
        if name not in VIEWS:
            tensors = tree_leaves((args, kwargs, out))
            if name in ("copy_", "zero_", "fill_"):
                tensors = list(args[:2])  # what was there is not read
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return out


def moved(ranks: Ranks, stage: int, precision: str, accumulation: int) -> float:
    """Bytes a parameter of one step beside the same passes by torch alone, and Adam's update."""
    trained = Trained(ranks, stage, precision, layers=4, width=256, batch=2 * accumulation, micro_batch=2)
    engine, adam = trained.engine, trained.engine.optimizer.step

    def unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return adam(*args)

    engine.optimizer.step = unseen  # type: ignore[assignment, method-assign]
    for step in range(2):
        trained.step(step)
    with Moved() as here:
        trained.step(2)
    network = ImageGPT(engine.config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with Moved() as alone:
        for batch in trained.batches(2):
            passes(network, batch["tokens"])
    engine.close()
    return (here.bytes - alone.bytes) / sum(p.numel() for p in network.parameters())


def passes(network: ImageGPT, tokens_BT: torch.Tensor) -> None:
    """Forward and backward, by torch alone."""
    network.zero_grad()
    logits_BTK = network(tokens_BT, None).logits_BTK
    assert logits_BTK is not None
    next_pixel.image_losses(logits_BTK, tokens_BT, None, slice(None)).mean().backward()


def gradient(network: ImageGPT, tokens_BT: torch.Tensor) -> torch.Tensor:
    """All of it, flat."""
    passes(network, tokens_BT)
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def errors(trained: Trained) -> Iterator[tuple[int, float, float]]:
    """(ranks, relative error of the sum in bfloat16, that of the bfloat16 pass), a rank having one image."""
    network = trained.engine.module
    rounded = ImageGPT(trained.engine.config).to(torch.bfloat16)
    rounded.load_state_dict(network.state_dict())
    for ranks in RANKS:
        total: Any = 0.0
        exact: Any = 0.0
        exact_pass: Any = 0.0
        for image in trained.images[:ranks].split(1):
            part = gradient(rounded, image) / ranks  # as DeepSpeed does, before it is sent
            total, exact = total + part, exact + part.double()
            exact_pass = exact_pass + gradient(network, image).double() / ranks
        yield ranks, distance(total, exact), distance(exact, exact_pass)


def distance(found: Any, expected: Any) -> float:
    """Of two flat gradients."""
    return float((found.double() - expected).norm() / expected.norm())


def main() -> None:
    """The tables, or the losses."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    ranks = launched()
    if ranks.world > 1:
        for precision, summed_in in (("float32", "fp32"), ("bfloat16", "bf16"), ("bfloat16", "fp32")):
            trained = Trained(ranks, 3, precision, summed_in)
            losses = [trained.step(step) for step in range(STEPS)]
            trained.engine.close()
            if ranks.rank == 0:
                print(
                    f"{precision:8} passes, gradients summed in {summed_in}: {statistics.fmean(losses[-30:]):.4f} nats"
                )
        ranks.leave()
        return
    trained = Trained(ranks, 0, "float32")
    for step in range(60):
        trained.step(step)
    print("ranks   summed in bfloat16   the bfloat16 pass")
    for count, summed, rounded in errors(trained):
        print(f"{count:5}   {summed:18.2e}   {rounded:17.2e}")
    trained.engine.close()
    print("\nbytes a parameter   one micro-batch   each further one")
    for stage, precision in ((0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")):
        one, two = (moved(ranks, stage, precision, count) for count in (1, 2))
        print(f"zero{stage} {precision:11}   {one:15.0f}   {two - one:16.0f}")


if __name__ == "__main__":
    main()
