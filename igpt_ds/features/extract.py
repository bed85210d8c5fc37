"""Pooled features of many layers from one forward pass: f^l = mean over positions of n^l (paper section 2.4).

The ranks of a launch share the images. A network that fits a device stands whole on every rank; a larger one is
divided over the ranks by DeepSpeed (ZeRO-3). Rank 0 receives all features and writes them into a memory map, so that
no process holds more than a few batches; see cache.py for where they lie. While the network is at work, the next batch
is read and the last one's features are written.

Suffixes: L layers asked for, I images, B images of a batch, T positions, D width.
"""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from igpt_ds.config.batch import Division
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.schema import Config, replace
from igpt_ds.dataset.shards import Dataset
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.loading.loader import evaluation_batches
from igpt_ds.model.transformer import ImageGPT, initialise
from igpt_ds.objectives import load_objective
from igpt_ds.text import listed
from igpt_ds.weights.base import Weights
from igpt_ds.weights.placed import Placement, place

if TYPE_CHECKING:
    from igpt_ds.distributed.engine import Engine

Norm = Literal["first", "none"]
Precision = Literal["float32", "bfloat16"]
Store = Literal["float32", "float16"]
T = TypeVar("T")

TOKENS = 1 << 16  # in one forward pass of a rank: 64 images of 32², 16 of 64²


@dataclass(frozen=True)
class Recipe:
    """How features are taken.

    Attributes:
        layers: 0 to L, ascending; L is the final norm's.
        norm: "first": f^l, after the block's first norm (the paper's). "none": the mean of h^l itself, which others
            use.
        precision: of the network; the mean over positions is taken in float32 in any case.
        store: the type in which features are kept; float16 takes half of the space, and keeps 11 bits of each.
    """

    layers: tuple[int, ...]
    norm: Norm = "first"
    precision: Precision = "float32"
    store: Store = "float32"


def usual_precision() -> Precision:
    """bfloat16 on a GPU that computes in it, else float32."""
    quick = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if quick else "float32"


def load_model(
    config: Config, checkpoint: Weights | None, precision: Precision = "float32", placement: Placement | None = None
) -> ImageGPT:
    """The network of some weights, or an untrained one, in evaluation mode, on the GPU where there is one.

    Args:
        placement: lay it out over memories, see `igpt_ds.weights.placed`; an untrained one stands whole.
    """
    if placement is not None and checkpoint is not None:
        return place(config, checkpoint, precision, placement)
    model = ImageGPT(config)
    if checkpoint is None:
        initialise(model, config.seed)
    else:
        model.load_state_dict(checkpoint.weights())
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu", dtype)


def parse_layers(text: str | None, config: Config) -> tuple[int, ...]:
    """Layers written as "0,4-7"; all of them, 0 to L, without a text."""
    last = config.model.layers
    layers: set[int] = set()
    for part in (text or f"0-{last}").split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, end = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > end:
            raise UserError(f"--layers {text}: not of the form 0,4-7: write numbers and ranges, divided by commas")
        layers |= set(range(first, min(end, last) + 1)) | {end}
    if max(layers) > last:
        raise UserError(f"--layers {text}: the network has layers 0 to {last}: choose among them")
    return tuple(sorted(layers))


class Network:
    """A network that gives features; built when the first ones are asked for, which a cache may save.

    Args:
        checkpoint: None for the untrained network.
        ds: name or file of a DeepSpeed configuration that divides the network over the ranks; None: whole on each.
        batch: images a rank passes through at once; None: as many as have 65 536 tokens.
        placement: as for `load_model`.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Weights | None,
        recipe: Recipe,
        ranks: Ranks,
        ds: str | None = None,
        batch: int | None = None,
        placement: Placement | None = None,
    ):
        self.placement = placement
        self.config, self.checkpoint, self.recipe, self.ranks = config, checkpoint, recipe, ranks
        self.batch = batch or max(1, TOKENS // config.sequence_length)
        division = Division(ranks.world, self.batch, 1)
        training = {
            "precision": recipe.precision,
            "batch": division.batch,
            "micro_batch": self.batch,
            "compile": False,
            "sequence_parallel": 1,
        }
        self._engine_config = replace(config, "training", **training)
        self._division = division
        self._ds = resolve(load_ds_config(ds), self._engine_config, division) if ds else None
        self._model: ImageGPT | None = None
        self._engine: Engine | None = None

    def features(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Features of a batch (tokens of any type of integers), [L, B, D] on the CPU, of the type they are kept in.

        With a divided network a collective.
        """
        if self._model is None and self._engine is None:
            self._build()
        if self._engine is not None:
            found = self._engine.features(tokens_BT, mask_BT, self.recipe.layers, self.recipe.norm == "first")
            return self._kept(found)
        assert self._model is not None
        device = self._model.token_embedding.device
        with torch.no_grad():
            output = self._model(
                tokens_BT.to(device, torch.int64),
                None if mask_BT is None else mask_BT.to(device),
                features=self.recipe.layers,
                logits=False,
                norm=self.recipe.norm == "first",
            )
        return self._kept([output.features[layer] for layer in self.recipe.layers])

    def _kept(self, features_LBD: list[Tensor]) -> Tensor:
        return torch.stack(features_LBD).to(getattr(torch, self.recipe.store)).cpu()

    def _build(self) -> None:
        if self._ds is None:
            self._model = load_model(self.config, self.checkpoint, self.recipe.precision, self.placement)
            return
        from igpt_ds.distributed.engine import Engine

        self._engine = Engine(self._engine_config, self._ds, self._division, self.ranks)
        if self.checkpoint is not None:
            self._engine.state.load(self.checkpoint, weights_only=True)

    def close(self) -> None:
        """Free the network."""
        if self._engine is not None:
            self._engine.close()
        self._model = self._engine = None


def extract(
    network: Network, dataset: Dataset, title: str, images: int, mask_seed: int | None, out_LID: np.ndarray | None
) -> None:
    """Fill rank 0's `out_LID` with the features of the dataset's first `images` images; a collective.

    Args:
        mask_seed: of a BERT model's masks, which hide parts of the input as in training (paper section 4.6); None
            hides nothing.
        out_LID: [L, images, D], of the recipe's type; None on the other ranks.

    Raises:
        RunError: a feature is not finite.
    """
    ranks = network.ranks
    batch = min(network.batch, -(-images // ranks.world))
    stride = batch * ranks.world
    hidden = True if ranks.rank else None
    with (
        tqdm(total=images, desc=title, unit=" images", leave=False, disable=hidden) as progress,
        ThreadPoolExecutor(1, "features") as writer,
    ):
        batches = evaluation_batches(dataset, batch, ranks.rank, ranks.world, read_ahead=True)
        written: Future[None] | None = None
        for first, rows in zip(range(0, images, stride), batches, strict=False):
            mask_BT = _mask(network.config, rows["tokens"], rows["positions"], mask_seed)
            parts = ranks.gather(network.features(rows["tokens"], mask_BT))
            if written is not None:
                written.result()  # the last batch's: what is wrong with it is told here
            if out_LID is not None:
                written = writer.submit(_write, out_LID, torch.cat(parts, dim=1), first, dataset, network.recipe)
            progress.update(min(stride, images - first))
        if written is not None:
            written.result()


def _write(out_LID: np.ndarray, found_LBD: Tensor, first: int, dataset: Dataset, recipe: Recipe) -> None:
    """Features of the images from `first` on; what lies beyond the last only filled the ranks' batches up."""
    found_LBD = found_LBD[:, : out_LID.shape[1] - first]
    finite_B = torch.isfinite(found_LBD).all(dim=2).all(dim=0)
    if not finite_B.all():
        bad = (first + torch.nonzero(~finite_B).flatten()).tolist()
        rough = [each for each in (recipe.precision, recipe.store) if each != "float32"]
        remedy = f", or float32 in place of {' and '.join(rough)}" if rough else ""
        raise RunError(
            f"{dataset.path}: features of images {listed(bad)} are not finite: the weights are damaged: "
            f"take another checkpoint{remedy}"
        )
    out_LID[:, first : first + found_LBD.shape[1]] = found_LBD.numpy()


def _mask(config: Config, tokens_BT: Tensor, positions_B: Tensor, seed: int | None) -> Tensor | None:
    if seed is None:
        return None
    return load_objective(config.objective.name).mask(tokens_BT, positions_B, seed, config.objective.mask_rate)


def pixels(dataset: Dataset, images: int | None = None) -> np.ndarray:
    """The colours of the (first) images as features, the baseline to beat: float32 [images, 3 n] in [-1, 1]."""
    tokens = dataset.images(images)
    return dataset.palette.colours[tokens].reshape(len(tokens), -1)
