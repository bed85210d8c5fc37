"""Image GPT in Python: open a model, turn images into tokens and back, and ask it what the command line asks it.

    model = igpt_ds.load("runs/s")                        # a run, a checkpoint, or weights of any format
    tokens = model.encode(["cat.jpg", "dog.png"])         # uint16 [2, n]
    model.log_likelihood(["cat.jpg", "dog.png"])          # nats an image, float64 [2]
    model.features(["cat.jpg", "dog.png"], layers=20)     # float32 [2, 1, d]
    model.sample(16)                                      # uint8 [16, side, side, 3]

Suffixes: N images, T positions (n = side² of an image), K colours, L layers asked for, D width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from igpt_ds import evals
from igpt_ds.config.schema import Config
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import Palette
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.features.extract import TOKENS, Norm, Precision, load_model
from igpt_ds.images.decode import RejectError, decode, upright
from igpt_ds.images.transforms import Transform, evaluation
from igpt_ds.model.sampling import Drawing
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.objectives import token_nats
from igpt_ds.reading import read_regular
from igpt_ds.run.directory import Run
from igpt_ds.samples.draw import drawn_tokens
from igpt_ds.text import listed
from igpt_ds.weights.base import config_of, palette_of
from igpt_ds.weights.formats import open_weights
from igpt_ds.weights.placed import parse_placement

Images = np.ndarray | Sequence[np.ndarray | Image.Image | Path | str]


def load(
    where: Path | str,
    *,
    step: int | None = None,
    precision: Precision = "float32",
    device_map: Literal["auto"] | None = None,
    max_memory: str | None = None,
) -> "Model":
    """Open a model; it stands on the GPU where there is one (see `Model.to`).

    Args:
        where: a run directory (its newest valid checkpoint), a checkpoint, or weights of any format that
            `igpt-ds convert` knows.
        step: of a run's checkpoint.
        precision: of the network.
        device_map, max_memory: "auto" lays a network that is larger than the GPU over its memory, the processor's and
            the disk; "gpu=20GiB,cpu=8GiB" of them.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    placement = parse_placement(device_map, max_memory)
    weights = open_weights(Path(where), step)
    config = config_of(weights)
    return Model(load_model(config, weights, precision, placement), config, palette_of(weights), _transform(config))


def _transform(config: Config) -> Transform:
    """As the run's held-out images were made; as the paper's, where its data are not at hand."""
    for source in config.data.sources:
        for split in ("val", "train"):
            if (Path(source) / split / "manifest.json").exists():
                facts = Manifest.load(Path(source) / split).transform
                return evaluation(config.data.resolution, facts.get("crop") != "none")
    return evaluation(config.data.resolution, crop=True)


class Model:
    """A network with its palette and its images' transform; `load` opens one.

    Images are a NumPy array, uint8 [N, H, W, 3], or a list of arrays, PIL images and paths, of any size: they are cut
    and scaled as the run's held-out images were. Whatever is wrong with one of them is a UserError.

    Attributes:
        network: the torch module, in evaluation mode.
        config: its configuration.
        transform: from an image to its pixels.
    """

    def __init__(self, network: ImageGPT, config: Config, palette: Palette | None, transform: Transform) -> None:
        self.network, self.config, self.transform, self._palette = network, config, transform, palette

    @property
    def palette(self) -> Palette:
        """The colours of the tokens.

        Raises:
            UserError: the weights came without one.
        """
        if self._palette is None:
            raise UserError("the weights have no palette: igpt-ds convert adds one: --to native --palette FILE")
        return self._palette

    @property
    def side(self) -> int:
        """Pixels a side of an image."""
        return round(self.config.sequence_length**0.5)

    def to(self, device: torch.device | str) -> "Model":
        """Move the network to a device; returns the model itself."""
        self.network.to(device)
        return self

    def encode(self, images: Images) -> np.ndarray:
        """Images -> tokens, uint16 [N, n]."""
        pixels = [self._pixels(image, number) for number, image in enumerate(images)]
        stacked = np.stack(pixels) if pixels else np.empty((0, self.side, self.side, 3), np.uint8)
        return self.palette.encode(stacked).reshape(len(pixels), -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens, integers [N, n] -> their colours, uint8 [N, side, side, 3]."""
        return self.palette.decode(tokens).reshape(-1, self.side, self.side, 3)

    def _pixels(self, image: np.ndarray | Image.Image | Path | str, number: int) -> np.ndarray:
        name, exif = f"image {number}", self.transform.exif
        try:
            if isinstance(image, str | Path):
                name = str(image)
                image = decode(read_regular(Path(image)), exif)
            elif isinstance(image, np.ndarray):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                    raise UserError(f"{name}: {image.dtype} {list(image.shape)}: give uint8 [height, width, 3]")
                image = Image.fromarray(image)
            else:
                image = upright(image, exif)
            return self.transform(image, name, 0)
        except (RejectError, OSError, ValueError) as error:
            raise UserError(f"{name}: cannot be used ({error}): give another one") from None

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> Tensor:
        """Tokens, integers [N, n] -> scores of the colours of each position, float32 [N, n, K], on the CPU.

        Those of position i follow from the tokens before it; of a BERT model from all, with nothing hidden.
        """
        self._require_head()
        parts = [self.network(tokens_NT).logits_BTK.float().cpu() for tokens_NT in self._batches(tokens)]
        return torch.cat(parts)

    @torch.no_grad()
    def log_likelihood(self, images: Images) -> np.ndarray:
        """log p of each image's tokens under the model, in nats: float64 [N]; of the palette's colours, not of RGB.

        Raises:
            UserError: it is a BERT model, which gives images no probability.
            RunError: a result is not finite.
        """
        if not self.config.causal:
            raise UserError("log_likelihood: this is a BERT model: only next_pixel models give images a probability")
        self._require_head()
        found = [
            -token_nats(self.network(tokens_NT).logits_BTK, tokens_NT).double().sum(1).cpu()
            for tokens_NT in self._batches(self.encode(images))
        ]
        return _finite(torch.cat(found).numpy(), "log_likelihood")

    @torch.no_grad()
    def features(
        self, images: Images, layers: Literal["all"] | int | Sequence[int] = "all", norm: Norm = "first"
    ) -> np.ndarray:
        """Mean features of layers, float32 [N, L, D] (paper section 2.4).

        Args:
            layers: numbers from 0 to the network's depth, the last being the final norm's; "all" of them.
            norm: "first": after the layer's first norm, as the paper takes them; "none": before it.
        """
        top = self.config.model.layers
        wanted = range(top + 1) if layers == "all" else [layers] if isinstance(layers, int) else list(layers)
        if not wanted or not all(0 <= layer <= top for layer in wanted):
            raise UserError(f"layers {listed(wanted)}: the network has layers 0 to {top}: choose among them")
        parts = []
        for tokens_NT in self._batches(self.encode(images)):
            found = self.network(tokens_NT, features=wanted, logits=False, norm=norm == "first").features
            parts.append(torch.stack([found[layer] for layer in wanted], dim=1).float().cpu())
        return _finite(torch.cat(parts).numpy(), "features")

    def sample(self, n: int, **drawing: Any) -> np.ndarray:
        """Draw `n` images: uint8 [n, side, side, 3].

        Args:
            drawing: seed, temperature, top_k and top_p; see `igpt_ds.model.sampling.Drawing`.
        """
        return self._draw(torch.empty(n, 0, dtype=torch.int64), drawing)

    def complete(self, images: Images, rows: int | None = None, **drawing: Any) -> np.ndarray:
        """Draw what lies below the upper rows of images: uint8 [N, side, side, 3].

        Args:
            rows: that the model is shown; None: the upper half.
            drawing: as for `sample`.
        """
        given = self.side // 2 if rows is None else rows
        if not 0 < given < self.side:
            raise UserError(f"rows {given}: the images have {self.side}: give 1 to {self.side - 1}")
        tokens = self.encode(images)[:, : given * self.side]
        return self._draw(torch.from_numpy(tokens.astype(np.int64)), drawing)

    def _draw(self, given_NT: Tensor, drawing: dict[str, Any]) -> np.ndarray:
        self._require_head()
        drawn = drawn_tokens(self.network, given_NT, Drawing(**drawing), Ranks(), "images")
        assert drawn is not None, "one rank has all of them"
        return self.decode(drawn)

    def _require_head(self) -> None:
        head = self.network.head
        if head is not None and torch.isnan(head.weight[0, 0]):
            raise UserError("the weights have no head over the colours: there are features alone")

    def _batches(self, tokens: np.ndarray) -> Iterator[Tensor]:
        n, device = self.config.sequence_length, self.network.token_embedding.device
        if tokens.ndim != 2 or tokens.shape[1] != n or not len(tokens):
            raise UserError(f"tokens {list(tokens.shape)}: the model takes [N, {n}], of one image or more")
        if tokens.min() < 0 or tokens.max() >= self.config.palette_size:
            raise UserError(f"tokens from {tokens.min()} to {tokens.max()}: the model knows {self.config.palette_size}")
        size = max(1, TOKENS // n)
        for first in range(0, len(tokens), size):
            yield torch.from_numpy(tokens[first : first + size].astype(np.int64)).to(device)


def _finite(found: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(found).all():
        raise RunError(f"{what}: not finite: the weights are damaged, take another checkpoint, or float32")
    return found


class Features(TransformerMixin, BaseEstimator):
    """Images -> the features of one layer, [N, D], as a step of a scikit-learn pipeline; a linear probe in three lines:

        probe = make_pipeline(igpt_ds.Features("runs/s", layer=12), LogisticRegression(max_iter=1000))
        probe.fit(train_images, train_labels)
        probe.score(test_images, test_labels)

    Args:
        where: as for `load`.
        layer: 0 to the network's depth; those in the middle do best (paper section 4.3).
    """

    def __init__(self, where: Path | str, layer: int = 0) -> None:
        self.where, self.layer = where, layer

    def fit(self, images: Images, labels: Any = None) -> "Features":
        """Open the model; nothing is learnt from the images."""
        self.model_ = load(self.where)
        return self

    def transform(self, images: Images) -> np.ndarray:
        """The features, float32 [N, D]."""
        return self.model_.features(images, self.layer)[:, 0]


def pretrain(
    preset: str, data: Path | str | Sequence[Path | str], run: Path | str, *, ds: str | None = None, **settings: Any
) -> Path:
    """Pre-train in this process, or go on with the run; under a launcher every rank calls this.

    Args:
        preset: a name or a TOML file, as --preset.
        data: folder or folders of train/ and val/.
        run: the run directory.
        ds: a DeepSpeed configuration, as --ds.
        settings: facts of the preset that are changed, section by section: seed=1, training={"steps": 20}.

    Returns:
        The run directory, which `load` opens.
    """
    from igpt_ds.train.begin import pretraining
    from igpt_ds.train.launch import launch
    from igpt_ds.train.signals import handlers_restored

    sources = [data] if isinstance(data, str | Path) else data
    facts = [
        (f"{section}.{key}", value)
        for section, values in settings.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    facts += [(key, value) for key, value in settings.items() if not isinstance(value, dict)]
    asked = pretraining(preset, Run(Path(run)), [str(source) for source in sources], facts, ds)
    with handlers_restored():
        launch(asked, Run(Path(run)))
    return Path(run)


def evaluate(name: str, where: Path | str, data: Path | str | None = None, **options: Any) -> dict[str, Any]:
    """Run an evaluation, keep its record as the command does, and return it: evaluate("probe", "runs/s", split="test").

    Args:
        name: of the verb: "probe", "low-data", "eval".
        where: as for `load`.
        data: folder of the splits; None: the run's own.
        options: of the verb, with _ for -; json_path names the record's file.
    """
    found = evals.of_verb(name)
    if found is None:
        verbs = sorted(evals.load(module).NAME for module in evals.names())
        raise UserError(f"evaluation {name}: there is none: choose from {', '.join(verbs)}")
    done = evals.evaluate(found, Path(where), data=None if data is None else str(data), **options)
    return {} if done is None else done[0]
