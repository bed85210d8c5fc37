"""Networks larger than the device: blocks on the GPU, in the processor's memory and on the disk, by accelerate.

A block that does not lie on the GPU comes there when it is its turn, and goes again. Everything else (embeddings, the
final norm, the heads) stays. Weights are read one tensor at a time, from any format.
"""

import logging
import os
import shutil
import tempfile
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from igpt_ds.atomic import writing
from igpt_ds.config.schema import Config
from igpt_ds.errors import UserError
from igpt_ds.memory import available_bytes, free_bytes, return_freed_memory
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.weights.base import Weights, whole

_TAKEN = 0.8  # of what is free, where it is not said how much: batches need room as well


@dataclass(frozen=True)
class Placement:
    """How much memory the network may take, bytes; None: four fifths of what is free. The rest lies on the disk."""

    gpu: int | None = None
    cpu: int | None = None


def parse_placement(device_map: str | None, max_memory: str | None) -> Placement | None:
    """--device-map and --max-memory: "gpu=20GiB,cpu=8GiB"; None: the network stands whole on its device."""
    if device_map is None:
        if max_memory is not None:
            raise UserError(f"--max-memory {max_memory}: belongs to --device-map auto: add it, or leave this out")
        return None
    from accelerate.utils import convert_file_size_to_int

    sizes: dict[str, int] = {}
    for part in max_memory.split(",") if max_memory else ():
        name, _, size = part.strip().partition("=")
        try:
            sizes[name] = int(size) if size.isdecimal() else int(convert_file_size_to_int(size))
        except (ValueError, TypeError):
            name = ""
        if name not in ("gpu", "cpu"):
            raise UserError(f"--max-memory {max_memory}: not of the form gpu=20GiB,cpu=8GiB: mend it")
    return Placement(**sizes)


def place(config: Config, weights: Weights, precision: str, placement: Placement) -> ImageGPT:
    """The network in evaluation mode, its blocks where they fit.

    Raises:
        UserError: not even what stays on the device fits it, or the disk is full.
    """
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import offload_weight, save_offload_index, set_module_tensor_to_device

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return_freed_memory()  # a block that has gone
    with init_empty_weights():
        model = ImageGPT(config).eval().to(dtype)
    where = _device_map(model, dtype, placement)
    folder = tempfile.mkdtemp(prefix="igpt-ds-")
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    index: dict[str, dict[str, object]] = {}
    with writing(Path(folder)):
        for name in weights.tensors:
            part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.partition(".")[0]
            value = whole(weights, name).to(dtype)
            if where[part] == "disk":
                index = offload_weight(value, name, folder, index)
            else:
                set_module_tensor_to_device(model, name, where[part], value=value)
        save_offload_index(index, folder)
    # That some parameters lie elsewhere is what was asked for.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match")  # parameters of no module
        placed: ImageGPT = dispatch_model(model, where, main_device=where["token_embedding"], offload_dir=folder)
    return placed


def _device_map(model: ImageGPT, dtype: torch.dtype, placement: Placement) -> dict[str, int | str]:
    """Part of the network -> GPU number, "cpu" or "disk"."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    left: dict[int | str, int] = {}
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        free = free_bytes(torch.device("cuda", device), 1)
        left[device] = int(_TAKEN * free) if placement.gpu is None else placement.gpu
    left["cpu"] = int(_TAKEN * available_bytes()) // neighbours if placement.cpu is None else placement.cpu
    main = next(iter(left))
    sizes = {
        **{name: parameter.numel() for name, parameter in model.named_parameters() if "." not in name},
        **{name: _elements(module) for name, module in model.named_children() if name != "blocks"},
    }
    blocks = [_elements(block) for block in model.blocks]
    # A block that is elsewhere needs room on the device while it works.
    needed = dtype.itemsize * (sum(sizes.values()) + max(blocks, default=0))
    if needed > left[main]:
        raise UserError(
            f"--max-memory: what stays on the device, and a block, take {needed:,} bytes, of which it may take "
            f"{left[main]:,}: allow more, or --precision bfloat16"
        )
    left[main] -= needed
    where: dict[str, int | str] = dict.fromkeys(sizes, main)
    for number, elements in enumerate(blocks):
        size = dtype.itemsize * elements
        place = next((place for place, free in left.items() if free >= size), None)
        where[f"blocks.{number}"] = "disk" if place is None else place
        if place is not None:
            left[place] -= size
    return where


def _elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
