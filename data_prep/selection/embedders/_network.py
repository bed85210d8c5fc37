"""What the embedders made of a neural network have in common: safe weights, pixels, the device.

Torch is loaded when the first image is embedded, never by an import of this file. A worker process uses the GPU of
its number, where there are any, in half precision; on a CPU one thread, as there are many workers.
"""

import multiprocessing
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from data_prep.selection.embedders import Arrays
from igpt_ds.atomic import sha256_file
from igpt_ds.errors import UserError

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


class Loaded(NamedTuple):
    """A network in memory, and the pixels that it was trained on.

    Attributes:
        features: torch float32 [n, 3, size, size], normalised -> torch [n, dimension].
        module: the torch module that is moved to the device.
        size: side of the square of pixels.
        crop: side of the square that is cut out, as a share of the image's shorter side; None squeezes the image.
        filter: name of the resizing filter.
        mean, std: per channel, of pixels in [0, 1].
    """

    features: Callable[[Any], Any]
    module: Any
    size: int
    crop: float | None
    filter: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Network:
    """An embedder with weights; see `data_prep.selection.embedders.Embedder`. Subclasses say how theirs is loaded."""

    model: str
    weights: Path
    name: ClassVar[str]
    fit_images: ClassVar[int] = 0

    def load(self) -> Loaded:
        """Create the network on the CPU and load its weights."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """The model, and the sha256 of its weights."""
        if find_spec(self.name) is None:
            raise UserError(f'--embedder {self.name}: not installed: pip install "igpt-ds[select]"')
        try:
            return {"name": self.name, "model": self.model, "weights": sha256_file(self.weights)}
        except OSError as error:
            raise UserError(f"--weights {self.weights}: cannot be read ({error.strerror}): give a file") from error

    def fit(self, images: Iterator[Image.Image]) -> Arrays:
        """Nothing is fitted."""
        return {}

    def fitted(self, learnt: Arrays) -> "Network":
        """Itself."""
        return self

    def prepare(self, image: Image.Image) -> np.ndarray:
        """uint8 [size, size, 3]; only the cut is ever computed, so that a very long image costs no memory."""
        loaded = _on_device(self).loaded
        box = (0.0, 0.0, float(image.width), float(image.height))
        if loaded.crop is not None:
            side = min(image.size) * loaded.crop
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
        return np.asarray(image.resize((loaded.size, loaded.size), _FILTERS[loaded.filter], box=box))

    def embed(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] -> float32 [n, dimension]."""
        import torch

        placed = _on_device(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode(), torch.autocast(placed.device, torch.float16, enabled=placed.device != "cpu"):
                pixels = torch.from_numpy(np.ascontiguousarray(images)).to(placed.device).permute(0, 3, 1, 2)
                mean, std = (
                    torch.tensor(each, device=placed.device).view(3, 1, 1)
                    for each in (placed.loaded.mean, placed.loaded.std)
                )
                vectors = placed.loaded.features((pixels.float() / 255 - mean) / std)
                result: np.ndarray = vectors.float().cpu().numpy()
                return result
        finally:
            torch.set_num_threads(threads)


class _Placed(NamedTuple):
    loaded: Loaded
    device: str


@lru_cache(maxsize=1)
def _on_device(network: Network) -> _Placed:
    import torch

    loaded = network.load()
    if loaded.filter not in _FILTERS:
        raise UserError(f"--model {network.model}: resizes by {loaded.filter}: choose a model of {', '.join(_FILTERS)}")
    device = "cpu"
    if torch.cuda.is_available():
        # Workers are called SpawnProcess-1, -2 and so on; this process has no number.
        number = re.search(r"\d+$", multiprocessing.current_process().name)
        torch.cuda.set_device((int(number[0]) - 1 if number else 0) % torch.cuda.device_count())
        device = "cuda"
    loaded.module.to(device).eval()
    return _Placed(loaded, device)


def given(embedder: str, model: str | None, weights: Path | None, example: str) -> tuple[str, Path]:
    """The model and the weights, both given."""
    if model is None or weights is None:
        missing = "--model" if model is None else "--weights"
        raise UserError(
            f"--embedder {embedder}: needs {missing}: give the model's name and its weights, as in {example}"
        )
    if ":" in model:
        raise UserError(f"--model {model}: is fetched from elsewhere: give a plain name, and its file with --weights")
    if not weights.is_file():
        raise UserError(f"--weights {weights}: no such file: download the weights of {model} first")
    return model, weights


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors by name from a .safetensors file, or from a torch checkpoint without unpickling anything else."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Both loaders raise anything on damaged files.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--weights {path}: cannot be loaded safely ({reason}): give a .safetensors file") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--weights {path}: holds no tensors by name: give a .safetensors file")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def put(network: Network, module: Any, state: dict[str, Any], spare: tuple[str, ...]) -> None:
    """Load weights into a module; those that begin with a name of `spare` may be left over, nothing may be missing."""
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"--weights {network.weights}: not those of {network.model} ({reason}): give its own"
        ) from error
    left = [name for name in result.unexpected_keys if not name.startswith(spare)]
    for what, keys in (("lack", result.missing_keys), ("have an unknown", left)):
        if keys:
            raise UserError(
                f"--weights {network.weights}: not those of {network.model} (they {what} {keys[0]}): give its own"
            )
