"""Weights by our names, wherever they lie: what every reader of a format gives, and every user of weights takes.

A checkpoint of a training is such weights (checkpoint/read.py), and so is whatever `formats` reads. Nothing is in
memory until `read` asks for it, so that a rank takes its own slices, and a conversion one parameter at a time.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_ds.atomic import sha256_file
from igpt_ds.config.file import from_tree
from igpt_ds.config.schema import Config
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import UserError
from igpt_ds.model.transformer import ImageGPT

CHUNK = 1 << 22  # elements that are read or written at once: 16 MiB of float32
POSITIONS = "position_embedding"


class Weights(Protocol):
    """What a reader gives.

    Attributes:
        path: of the checkpoint, directory or file.
        step: of the training that they come from; 0 where it is not known.
        identity: facts as a checkpoint's; "palette_sha256" is None where the palette is not known.
        config: tree of the configuration; where the source does not tell the recipe, that of the paper's model of this
            shape.
        tensors: our name -> {"shape": [...]}.
        files: name -> facts that change when the content does.
        progress: what going on with a training needs; empty for weights alone.
    """

    @property
    def path(self) -> Path: ...
    @property
    def step(self) -> int: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, dict[str, Any]]: ...
    @property
    def files(self) -> dict[str, dict[str, Any]]: ...
    @property
    def progress(self) -> dict[str, Any]: ...

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Compare the hashes that the source records, if it records any."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of a flattened tensor: float32 on the CPU. The kind is "weight"."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole: name -> float32 tensor of the parameter's shape."""
        ...


@dataclass(frozen=True)
class Imported:
    """Weights of a format that is not a training's own. See `Weights` for what it has in common with a checkpoint.

    Attributes:
        rows: (name, first, last) -> those rows of the tensor by our name (elements of a vector), float32.
        colours: the palette, where the source has one.
        hashes: file -> sha256, where the source records them.
        origin: the format, for people.
    """

    path: Path
    origin: str
    step: int
    identity: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    rows: Callable[[str, int, int], Tensor]
    colours: Palette | None = None
    hashes: Mapping[Path, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    def verify(self, rank: int = 0, world: int = 1) -> None:
        for path in sorted(self.hashes)[rank::world]:
            if sha256_file(path) != self.hashes[path]:
                raise UserError(f"{path}: damaged: its sha256 is not the one recorded: convert it anew")

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        assert kind == "weight", "there are no moments"
        width = math.prod(self.tensors[name]["shape"][1:])
        first, last = start // width, -(-stop // width)
        flat = self.rows(name, first, last).reshape(-1)
        return flat[start - first * width : stop - first * width]

    def weights(self) -> dict[str, Tensor]:
        return {
            name: self.rows(name, 0, facts["shape"][0]).view(facts["shape"]) for name, facts in self.tensors.items()
        }


@dataclass(frozen=True)
class Resized:
    """The same weights for images of another resolution: the position table is interpolated, see `resize_positions`."""

    source: Weights
    table_TD: Tensor
    config: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def step(self) -> int:
        return self.source.step

    @property
    def identity(self) -> dict[str, Any]:
        return self.source.identity

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.source.files

    @property
    def progress(self) -> dict[str, Any]:
        return {}

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        return {**self.source.tensors, POSITIONS: {"shape": list(self.table_TD.shape)}}

    def verify(self, rank: int = 0, world: int = 1) -> None:
        self.source.verify(rank, world)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        if name == POSITIONS:
            return self.table_TD.reshape(-1)[start:stop]
        return self.source.read(name, kind, start, stop)

    def weights(self) -> dict[str, Tensor]:
        return {**self.source.weights(), POSITIONS: self.table_TD}


def at_resolution(weights: Weights, resolution: int, say: Callable[[str], None]) -> Weights:
    """The weights for images of `resolution` pixels a side; what is changed for it is told through `say`."""
    trained = config_of(weights).data.resolution
    if trained == resolution:
        return weights
    shape = weights.tensors[POSITIONS]["shape"]
    table_TD = weights.read(POSITIONS, "weight", 0, math.prod(shape)).view(*shape)
    tree = {**weights.config, "data": {**weights.config["data"], "resolution": resolution}}
    say(
        f"{weights.path}: trained at {trained} x {trained} pixels: its position table is interpolated (bicubic) to "
        f"{resolution} x {resolution}"
    )
    return Resized(weights, resize_positions(table_TD, resolution), tree)


def resize_positions(table_TD: Tensor, side: int) -> Tensor:
    """A position table [s², D] as the grid of s x s vectors that it is, interpolated to [side², D] (bicubic).

    Positions are a learned vector each (paper section 2.2), so the paper has no rule for another resolution; this is
    the common one of vision transformers. Corners are not aligned; a smaller grid is smoothed first.
    """
    old = math.isqrt(len(table_TD))
    grid_1Dss = table_TD.T.reshape(1, -1, old, old)
    resized = F.interpolate(grid_1Dss, (side, side), mode="bicubic", align_corners=False, antialias=side < old)
    return resized.reshape(table_TD.shape[1], -1).T.contiguous()


def config_of(weights: Weights) -> Config:
    """The configuration that the weights were trained with."""
    return from_tree(weights.config, str(weights.path))


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the network, which is not built."""
    try:
        with torch.device("meta"):
            model = ImageGPT(config)
    except RuntimeError as error:
        raise UserError(f"configuration {config.name}: {error}: mend model and data") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(weights: Weights) -> None:
    """Hold the tensors against the configuration."""
    expected = shapes_of(config_of(weights))
    found = {name: tuple(facts["shape"]) for name, facts in weights.tensors.items()}
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in expected]
    faults += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(f"{weights.path}: its tensors do not fit its configuration ({faults[0]}{more}): get it anew")


def require_head(weights: Weights) -> None:
    """Refuse weights without the head over the colours, of which there are features alone."""
    if "head.weight" not in weights.tensors:
        return  # it is the token embedding
    if torch.isnan(weights.read("head.weight", "weight", 0, 1)).any():
        raise UserError(
            f"{weights.path}: has no head over the colours, as Hugging Face's ImageGPTModel and most classifiers, or a "
            "damaged one: probe it, or get the ImageGPTForCausalImageModeling that it comes from"
        )


def palette_of(weights: Weights) -> Palette | None:
    """The colours of the tokens, or None where the source does not tell them."""
    while isinstance(weights, Resized):
        weights = weights.source
    if isinstance(weights, Imported):
        return weights.colours
    path = weights.path.parent.parent / "palette.npy"  # RUN/checkpoints/step-N
    if not path.exists():
        return None
    palette = Palette.load(path)
    known = weights.identity.get("palette_sha256")
    if known not in (None, palette.sha256):
        raise UserError(f"{path}: not the palette of {weights.path}: restore it from the training data")
    return palette


def check_palette(weights: Weights, sha256: str, data: Path | str, warn: Callable[[str], None]) -> None:
    """Hold the palette of data against the weights'. Where theirs is not known, the user is told through `warn`."""
    known = weights.identity.get("palette_sha256")
    if known is None:
        warn(f"{weights.path}: its palette is not known: that of {data} is taken to be the same")
    elif known != sha256:
        raise UserError(
            f"{data}: another palette than the one {weights.path} was trained with: "
            f"build the data with the run's palette.npy"
        )


def chunks(weights: Weights, name: str) -> Iterator[Tensor]:
    """A tensor, flat, a few rows at a time."""
    shape = weights.tensors[name]["shape"]
    total, width = math.prod(shape), math.prod(shape[1:])
    size = max(1, CHUNK // width) * width
    for start in range(0, total, size):
        yield weights.read(name, "weight", start, min(start + size, total))


def whole(weights: Weights, name: str) -> Tensor:
    """A tensor in its shape."""
    shape = weights.tensors[name]["shape"]
    return weights.read(name, "weight", 0, math.prod(shape)).view(shape)


def transposed(matrix_OI: Tensor) -> Iterator[Tensor]:
    """Rows of the transpose, a few at a time: the matrix itself is the only whole copy."""
    step = max(1, CHUNK // len(matrix_OI))
    for first in range(0, matrix_OI.shape[1], step):
        yield matrix_OI[:, first : first + step].T.contiguous()


def values_sha256(weights: Weights, names: list[str], tick: Callable[[int], object]) -> str:
    """Hex sha256 of the values of some tensors, float32 in our order: the same in every format.

    Args:
        tick: told the elements as they are read.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {list(weights.tensors[name]['shape'])}\n".encode())
        for part in chunks(weights, name):
            digest.update(part.contiguous().numpy().data)
            tick(part.numel())
    return digest.hexdigest()
