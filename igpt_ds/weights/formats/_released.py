"""The variables of the released code by their names, as .npz arrays and TensorFlow checkpoints hold them.

    model/wpe [n, d]   model/wte [k, d]   model/sos [d] (not of a BERT model)   model/wtet [k, d]
    model/h{i}/ln_1/g, model/h{i}/ln_2/g, model/ln_f/g [d]
    model/h{i}/attn/q_proj, k_proj, v_proj, c_proj [heads, d / heads, d]
    model/h{i}/mlp/c_fc/w [d, 4 d], model/h{i}/mlp/c_proj/w [4 d, d]

Reshaped to [d, d], the rows of q_proj are those of our projection, and c_proj is the transpose of ours. The number of
heads is told by q_proj's shape, the objective by the start vector, and there are no biases.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_ds.config.schema import ModelConfig
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.weights.base import Imported
from igpt_ds.weights.formats._facts import imported, side

Shapes = Mapping[str, tuple[int, ...]]

TOP = {
    "token_embedding": "wte",
    "start": "sos",
    "position_embedding": "wpe",
    "norm.gain": "ln_f/g",
    "head.weight": "wtet",
}
GAINS = {"norm_attention.gain": "ln_1/g", "norm_mlp.gain": "ln_2/g"}
TRANSPOSED = {"attention.out.weight": "attn/c_proj", "mlp.up.weight": "mlp/c_fc/w", "mlp.down.weight": "mlp/c_proj/w"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Of the optimiser, its averages, and the classifier on top: no part of the network's generative weights.
_OTHERS = re.compile(r".*(adam|beta\d_power|global_step|moving_average|/_step$|clf/).*", re.IGNORECASE)


def plain_name(name: str) -> str:
    """The variable's name without its scope and output number: "model/h0/ln_1/g:0" is "h0/ln_1/g"."""
    return name.removesuffix(":0").removeprefix("model/")


def shapes_of(layers: int, width: int, heads: int, positions: int, colours: int, start: bool) -> dict[str, Any]:
    """Name (without its scope) and shape of every variable."""
    shapes: dict[str, tuple[int, ...]] = {"wpe": (positions, width), "wte": (colours, width), "ln_f/g": (width,)}
    shapes["wtet"] = (colours, width)
    if start:
        shapes["sos"] = (width,)
    for layer in range(layers):
        for name in (*PROJECTIONS, "c_proj"):
            shapes[f"h{layer}/attn/{name}"] = (heads, width // heads, width)
        shapes |= {f"h{layer}/{gain}": (width,) for gain in GAINS.values()}
        shapes |= {f"h{layer}/mlp/c_fc/w": (width, 4 * width), f"h{layer}/mlp/c_proj/w": (4 * width, width)}
    return shapes


def from_variables(
    path: Path,
    origin: str,
    found: Shapes,
    array: Callable[[str], np.ndarray],
    told: Mapping[str, Any] | None,
    palette: Palette | None,
    files: dict[str, dict[str, Any]],
) -> Imported:
    """Weights of released variables.

    Args:
        found: names without scope and shapes; others' variables (an optimiser's) may be among them.
        array: a variable, whole.
    """
    first = found.get("h0/attn/q_proj", ())
    tables = [found.get(name, ()) for name in ("wpe", "wte")]
    if len(first) != 3 or any(len(shape) != 2 for shape in tables):
        raise UserError(f"{path}: has no wpe, wte and h0/attn/q_proj as the released code names them: get it anew")
    heads, width = first[0], first[2]
    layers = 1 + max(int(name[1:].partition("/")[0]) for name in found if re.match(r"h\d{1,6}/", name))
    (positions, _), (colours, _) = tables
    if layers > len(found) or width % max(heads, 1):
        raise UserError(f"{path}: {layers} layers of {width} in {heads} heads: it is no whole Image GPT")
    expected = shapes_of(layers, width, heads, positions, colours, "sos" in found)
    # Some exports keep the 1 of a convolution of width 1 in front: [1, d, 4 d].
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}" if name in found else f"{name} is missing"
        for name, shape in expected.items()
        if found.get(name) not in (shape, (1, *shape))
    ]
    wrong += [f"{name} is unknown" for name in found if name not in expected and not _OTHERS.match(name)]
    if wrong:
        more = f" (and {len(wrong) - 1} more faults)" if len(wrong) > 1 else ""
        raise UserError(f"{path}: {wrong[0]}{more}: it is no whole Image GPT as the released code names it")
    objective = "next_pixel" if "sos" in found else "masked_pixel"
    model = ModelConfig(layers, width, heads)
    network = (model, side(path, positions), colours, objective)
    return imported(path, origin, told, network, _rows(path, array, expected), palette, files)


def _rows(path: Path, array: Callable[[str], np.ndarray], shapes: Shapes) -> Callable[[str, int, int], Tensor]:
    @functools.lru_cache(maxsize=1)  # a tensor is mostly read in several parts, one after another
    def values(name: str) -> Tensor:
        stored = array(name)
        if stored.dtype.kind in "OSUcmM" or stored.dtype.names:
            raise UserError(f"{path}: {name} is of type {stored.dtype}, no real numbers: get it anew")
        found = np.ascontiguousarray(stored, dtype=np.float32).reshape(shapes[name])
        return torch.from_numpy(found if found.flags.writeable else found.copy())

    def rows(name: str, first: int, last: int) -> Tensor:
        if name in TOP:
            return values(TOP[name])[first:last]
        _, layer, rest = name.split(".", 2)
        prefix = f"h{layer}/"
        if rest in GAINS:
            return values(prefix + GAINS[rest])[first:last]
        if rest in TRANSPOSED:
            matrix_IO = values(prefix + TRANSPOSED[rest])
            return matrix_IO.reshape(-1, matrix_IO.shape[-1])[:, first:last].T.contiguous()
        assert rest == "attention.qkv.weight", rest
        width = shapes["ln_f/g"][0]
        parts = []
        for number, projection in enumerate(PROJECTIONS):
            low, high = max(first - number * width, 0), min(last - number * width, width)
            if low < high:
                parts.append(values(f"{prefix}attn/{projection}").reshape(width, width)[low:high])
        return torch.cat(parts)

    return rows
