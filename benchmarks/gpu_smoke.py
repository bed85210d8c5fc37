"""What `benchmarks/gpu_smoke.sh` runs: is the GPU path right on this machine? Meant to take three minutes.

1. Parity: 20 steps of a small network in float32 (TF32 off), the harness under ZeRO-3 on the GPU against a plain loop
   on the CPU: losses within 1e-4.
2. Sampling: 8 images drawn by that network, through CUDA graphs, against the same drawn on the CPU.
3. iGPT-S as the machine decides (in bfloat16, its blocks compiled), 50 steps on images that can be learned: the loss
   halves.
4. In the steps of 1 and 3 attention and Adam ran as fused kernels, attention as the one that was chosen.

A GPU without bfloat16 gets a quarter of iGPT-S's blocks in part 3, which it computes in float32. Without a GPU all is
rehearsed on the CPU, with a smaller network there.
"""

import copy
import os
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from igpt_ds.config.batch import divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.model.sampling import Drawing, sample
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.planner.choose import decide
from igpt_ds.train.schedule import learning_rate

# What the comparison leaves nothing open of.
PLAINLY = ["training.precision=float32", "training.activation_checkpointing=full", "training.compile=false"]


def images(config: Config, step: int) -> dict[str, Tensor]:
    """A batch that counts up through the colours, from a start and by a stride of each image."""
    positions_B = torch.arange(step * config.training.batch, (step + 1) * config.training.batch)
    starts_B, strides_B = positions_B * 7919 % config.palette_size, 1 + positions_B % 3
    ramps_BT = starts_B[:, None] + strides_B[:, None] * torch.arange(config.sequence_length)
    return {"tokens": ramps_BT % config.palette_size, "positions": positions_B}


def harness(config: Config, ds: dict[str, Any], steps: int) -> list[float]:
    """Losses of the harness's steps; one more tells the fused kernels."""
    from igpt_ds.distributed.engine import Engine

    division = divide_batch(config.training.batch, config.training.batch, 1)
    engine = Engine(config, resolve(ds, config, division), division, Ranks())
    losses = []
    for step in range(steps):
        loss, _ = engine.train_step([images(config, step)], learning_rate(step, config.training))
        losses.append(float(loss))
    print(gpu.require_fused(lambda: engine.train_step([images(config, steps)], 0.0), engine))
    engine.close()
    return losses


def plain(config: Config, steps: int) -> tuple[list[float], ImageGPT]:
    """The same by torch alone, on the CPU in float32; and the network."""
    model = ImageGPT(config)
    initialise(model, config.seed)
    recipe = config.training
    adam = torch.optim.AdamW(model.parameters(), betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, weight_decay=0)
    losses = []
    for step in range(steps):
        tokens_BT = images(config, step)["tokens"]
        logits_BTK = model(tokens_BT).logits_BTK
        assert logits_BTK is not None
        loss = F.cross_entropy(logits_BTK.flatten(0, 1), tokens_BT.flatten())
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, recipe)
        adam.step()
        losses.append(loss.item())
    return losses, model.eval()


def images_drawn_alike(model: ImageGPT) -> float:
    """Share of images that the GPU draws exactly as the CPU; a rounding may turn one token, and all after it."""
    nothing = torch.empty(8, 0, dtype=torch.int64)
    here = sample(model, nothing, Drawing(), title=None)
    there = sample(copy.deepcopy(model).to("cuda" if gpu.CUDA else "cpu"), nothing, Drawing(), title=None)
    return (here == there).all(dim=1).float().mean().item()


def main() -> None:
    """The checks; an assertion ends with status 1."""
    if not gpu.CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    begin = time.perf_counter()
    print(f"torch {torch.__version__}, {gpu.name_of_device()}")
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    machine = gpu.here()
    small = ["data.resolution=16", "data.palette_size=64", "model.width=64", "model.heads=4", "training.steps=20"]
    config = load_config("tiny", [*small, *PLAINLY])
    found, (expected, model) = harness(config, load_ds_config("zero3"), 20), plain(config, 20)
    apart = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f"float32: loss {expected[0]:.4f} to {expected[-1]:.4f}, at most {apart:.1e} from the CPU's")
    assert apart < 1e-4, "the GPU computes something else than the CPU"
    alike = images_drawn_alike(model)
    print(f"sampling: {alike:.0%} of 8 images are the CPU's to the last token")
    assert alike >= 0.75, "the GPU draws other images than the CPU"
    large = ["data.resolution=32", "data.palette_size=512", "training.batch=32", "training.warmup_steps=10"]
    large += ["training.micro_batch=32", "training.steps=50", "training.learning_rate=0.001"]
    if gpu.CUDA and not machine.bf16:
        large += ["model.layers=6"]
    if not gpu.CUDA:
        large += ["model.layers=2", "model.width=64", "model.heads=2", "data.resolution=8"]
    decision = decide(load_config("s", large), None, machine)
    print(decision.line)
    losses = harness(decision.config, decision.ds, 50)
    shape = decision.config.model
    print(f"{shape.layers} layers of {shape.width}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
    assert losses[-1] < losses[0] / (2 if gpu.CUDA else 1), "the loss does not fall as it should"
    print(f"all is well, {time.perf_counter() - begin:.0f} s", flush=True)
    os._exit(0)  # DeepSpeed's threads need seconds to wind up


if __name__ == "__main__":
    main()
