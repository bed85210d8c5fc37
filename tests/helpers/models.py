"""Small networks with weights that matter (a fresh one has a zero head), and checkpoints of them without DeepSpeed."""

import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from igpt_ds.checkpoint.read import MOMENTS, Shard
from igpt_ds.config.file import load_config, to_tree
from igpt_ds.config.schema import Config
from igpt_ds.model.transformer import ImageGPT, initialise
from tests.helpers.checkpoints import save

# What torch.compile needs on any device beside a C++ compiler (python3-dev on Debian).
_HEADERS = Path(sysconfig.get_path("include"), "Python.h")
CAN_COMPILE = shutil.which("g++") is not None and _HEADERS.is_file()


def small_config(*overrides: str, resolution: int = 4, palette_size: int = 8) -> Config:
    """The tiny preset on images of 4 x 4 pixels in 8 colours."""
    facts = (f"data.resolution={resolution}", f"data.palette_size={palette_size}")
    return load_config("tiny", [*facts, *overrides])


def random_model(config: Config, seed: int = 0) -> ImageGPT:
    """A network whose head is random as well."""
    model = ImageGPT(config)
    initialise(model, seed)
    if model.head is not None:
        torch.nn.init.normal_(model.head.weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def save_model(
    model: ImageGPT, config: Config, run: Path, palette_sha256: str, step: int = 7, sources: Sequence[str] = ()
) -> Path:
    """Publish a checkpoint of a network in RUN, as a training of one rank would."""
    shards = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        values = {"weight": flat, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
        shards.append(Shard(name, tuple(parameter.shape), 0, flat.numel(), values.__getitem__))
    tree = to_tree(config)
    tree["data"]["sources"] = list(sources)
    facts = {"identity": {"palette_sha256": palette_sha256}, "config": tree}
    return save(run / "checkpoints", step, shards, facts, 0, 1, lambda fault: fault)
