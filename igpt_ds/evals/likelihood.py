"""Likelihood of held-out images: the objective's loss in nats and bits a token, whole, by class and by position.

A token is a palette colour, not an RGB value: these figures say nothing about bits per RGB dimension, because the
palette's own loss (its distortion) is not in them. They compare models that share one palette and resolution, and
so the distortion is reported beside them where the data's manifest records it.

The network runs in float32 and sums are taken in float64. With several ranks each holds the whole network and
reads its share of the images.

Suffixes: I images of the dataset, B of a batch, T positions, K colours.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from igpt_ds.atomic import publish_file, refuse_special, writing
from igpt_ds.config.schema import Config
from igpt_ds.distributed.ranks import Ranks
from igpt_ds.errors import RunError, UserError
from igpt_ds.evals import MASKS, SHARE, Record, Subject
from igpt_ds.objectives import load_objective, token_nats
from igpt_ds.text import Table, listed, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from igpt_ds.dataset.shards import Dataset
    from igpt_ds.model.transformer import ImageGPT
    from igpt_ds.weights.base import Weights

NAME, TITLE = "eval", "Likelihood"
_MEAN = {"bits_per_token?": float, "standard_error?": float, "images": int}
HOLDS = {
    "step": int,
    "split": str,
    "name": str,
    "nats_per_token": float,
    **_MEAN,
    "tokens": int,
    "masks?": int,
    "mask_rate?": SHARE,
    "mask_seed?": int,
    "images_without_mask?": int,
    "resolution": (1, 1024),
    "colours": (1, 65536),
    "palette_distortion?": float,
    "classes?": [{"name": str, "nats_per_token?": float, **_MEAN}],
    "positions": {"nats_per_token": [float, None]},
    "per_image?": str,
}
OPTIONS = (
    click.Option(["--split"], type=click.Choice(["val", "test", "train"]), default="val", show_default=True),
    MASKS,
    click.Option(
        ["--mask-seed"], type=click.IntRange(0, 2**64 - 1), help="BERT: seed of the masks.  [default: the run's]"
    ),
    click.Option(
        ["--per-image"], metavar="FILE", type=click.Path(path_type=Path), help="Also each image's, a line of JSON each."
    ),
)
DRAWN = 5  # masks of a BERT model, as many as the paper's ensembles take (section 4.6)
_TOKENS = 1 << 16  # in one forward pass: 64 images of 32², 16 of 64²
_CLASSES_SHOWN = 24  # of more, the easiest and the hardest


def run(
    subject: Subject,
    *,
    split: str = "val",
    masks: int | None = None,
    mask_seed: int | None = None,
    per_image: Path | None = None,
) -> Record | None:
    """Likelihood of held-out images in nats and bits a token, by class and by position.

    \b
    Writes a JSON file and, beside it, a heat map of the same name; prints the table:
        igpt-ds eval RUN --data DATA --split val --json eval.json
    Shared among 8 GPUs, each with the whole network in float32:
        torchrun --nproc-per-node 8 -m igpt_ds -- eval RUN --data DATA
    Each image's as well, {"id": ..., "label": ..., "nats_per_token": ..., "bits_per_token": ...} a line:
        igpt-ds eval RUN --split test --per-image images.jsonl
    """
    from igpt_ds.features.extract import load_model
    from igpt_ds.loading.splits import open_split
    from igpt_ds.run.directory import LOGGER
    from igpt_ds.weights.base import at_resolution, config_of, require_head
    from igpt_ds.weights.formats import open_weights

    ranks, weights = subject.ranks, open_weights(subject.path, subject.step)
    require_head(weights)
    config = config_of(weights)
    if config.causal and (masks is not None or mask_seed is not None):
        raise UserError(
            f"--masks, --mask-seed: {subject.path} is no BERT model, nothing is hidden from it: leave them out"
        )
    if not subject.data and not config.data.sources:
        raise UserError(f"{subject.path}: its checkpoint names no data: give --data")
    dataset = open_split(subject.data or config.data.sources[0], split)
    weights = at_resolution(weights, dataset.manifest.resolution, LOGGER.warning)
    config = config_of(weights)
    check(weights, config, dataset)
    if not config.causal:
        masks, mask_seed = masks or DRAWN, config.seed if mask_seed is None else mask_seed
    ids = None
    if per_image is not None and ranks.rank == 0:  # what is refused is so before anything is computed
        with writing(per_image):
            refuse_special(per_image)
        ids = dataset.ids()
    with ranks.meeting():
        model = load_model(config, weights, placement=subject.placement)
        found = likelihood(model, config, dataset, ranks, masks or 1, mask_seed or 0)
    if ranks.rank:
        return None
    if per_image is not None and ids is not None:
        write_images(found, dataset, ids, per_image)
    return {
        **record(found, weights, config, dataset, masks, mask_seed),
        "per_image": None if per_image is None else str(per_image),
    }


def suffix(options: dict[str, Any]) -> str:
    """Another split than val has a record of its own."""
    split = options.get("split", "val")
    return "" if split == "val" else f"-{split}"


@dataclass(frozen=True)
class Likelihood:
    """Losses of a dataset's images.

    Attributes:
        images_I: float64, nats a token of each image, mean over its masks; NaN where all its masks are empty.
        positions_T: float64, mean nats of each position over the images (and masks that hide it); NaN where none does.
        counts_T: int64, how many tokens each entry of `positions_T` rests on.
    """

    images_I: np.ndarray
    positions_T: np.ndarray
    counts_T: np.ndarray

    @property
    def nats(self) -> float:
        """The loss: mean over images of the mean over their tokens, as in training."""
        return float(np.nanmean(self.images_I))


def check(checkpoint: "Weights", config: Config, dataset: "Dataset") -> None:
    from igpt_ds.loading.splits import resolve_data
    from igpt_ds.run.directory import LOGGER
    from igpt_ds.weights.base import check_palette

    resolve_data(config, [dataset])
    if dataset.manifest.classes is not None:
        dataset.labels()  # refused before anything is computed
    check_palette(checkpoint, dataset.palette.sha256, dataset.path, LOGGER.warning)


def likelihood(
    model: "ImageGPT", config: Config, dataset: "Dataset", ranks: Ranks, masks: int = 1, mask_seed: int = 0
) -> Likelihood:
    """Score every image once, or a BERT model's `masks` times.

    Mask m of an image is the one that it would have in pass m over the dataset under the seed `mask_seed`: mask 0
    of the run's own seed is that of the run's validation. An image whose mask is empty has no loss under it and
    that mask is left out of its mean, where training counts 0.

    Args:
        ranks: must have met; all of them get the result.
        masks, mask_seed: of BERT only.

    Raises:
        RunError: a loss is not finite, or no token of any image is hidden.
    """
    import torch

    from igpt_ds.loading.loader import evaluation_batches

    objective, rate = load_objective(config.objective.name), config.objective.mask_rate
    device = model.token_embedding.device
    images, n = dataset.rows, dataset.sequence_length
    batch = max(1, min(_TOKENS // n, -(-images // ranks.world)))
    sums_I, scored_I, sums_T, counts_T = np.zeros(images), np.zeros(images), np.zeros(n), np.zeros(n)
    total = masks * -(-images // (batch * ranks.world))
    hidden = None if ranks.rank == 0 else True  # one bar for all ranks
    bar = tqdm(total=total, desc="likelihood", unit=" batches", leave=False, disable=hidden)
    with torch.no_grad(), bar as progress:
        for mask in range(masks):
            for rows in evaluation_batches(dataset, batch, ranks.rank, ranks.world, read_ahead=True):
                real_B = rows["weight"] > 0
                tokens_BT, positions_B = rows["tokens"][real_B].to(device, torch.int64), rows["positions"][real_B]
                if len(tokens_BT):
                    mask_BT = objective.mask(tokens_BT, positions_B + mask * images, mask_seed, rate)
                    nats_BT, shown_BT = _token_losses(model, tokens_BT, mask_BT)
                    counts_B = shown_BT.sum(1)
                    index_B = positions_B.numpy()
                    sums_I[index_B] += (nats_BT.sum(1) / counts_B.clamp(min=1)).cpu().numpy()
                    scored_I[index_B] += (counts_B > 0).cpu().numpy()
                    sums_T += nats_BT.sum(0).cpu().numpy()
                    counts_T += shown_BT.sum(0).cpu().numpy()
                progress.update()
    ranks.add_up(sums_I, scored_I, sums_T, counts_T)
    # On every rank alike. An image without a loss is one whose masks are empty, and no other.
    if len(bad := np.flatnonzero(~np.isfinite(sums_I))):
        raise RunError(
            f"{dataset.path}: the loss of {len(bad):,} of {images:,} images is not finite "
            f"(images {listed(bad.tolist())}): the weights are damaged: take another checkpoint"
        )
    if not scored_I.any():
        raise RunError(f"{dataset.path}: no token of any image is hidden, so none is scored: give more --masks")
    with np.errstate(invalid="ignore"):
        return Likelihood(sums_I / scored_I, sums_T / counts_T, counts_T.astype(np.int64))


def _token_losses(model: "ImageGPT", tokens_BT: "Tensor", mask_BT: "Tensor | None") -> "tuple[Tensor, Tensor]":
    """-log p of every scored token, 0 for the others, float64 [B, T]; and which are scored, bool [B, T]."""
    logits_BTK = model(tokens_BT, mask_BT).logits_BTK
    assert logits_BTK is not None
    nats_BT = token_nats(logits_BTK, tokens_BT).double()
    scored_BT = tokens_BT >= 0 if mask_BT is None else mask_BT
    return nats_BT.where(scored_BT, 0.0), scored_BT


def record(
    found: Likelihood,
    checkpoint: "Weights",
    config: Config,
    dataset: "Dataset",
    masks: int | None,
    mask_seed: int | None,
) -> dict[str, Any]:
    """The result as JSON: nats, their standard error over images, and the same by class and by position."""
    labels = dataset.labels() if dataset.manifest.classes is not None else None
    distortion = dataset.manifest.palette.get("distortion")
    return {
        "kind": "likelihood",
        "name": config.name,
        "objective": config.objective.name,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "data": str(dataset.path),
        "split": dataset.manifest.split,
        **_mean(found.images_I),
        "tokens": int(found.counts_T.sum()),
        "images_without_mask": int(np.isnan(found.images_I).sum()),
        "masks": masks,
        "mask_seed": mask_seed,
        "mask_rate": None if masks is None else config.objective.mask_rate,
        "resolution": dataset.manifest.resolution,
        "colours": dataset.palette.k,
        "palette_sha256": dataset.palette.sha256,
        # Mean squared distance of a pixel to its colour, in [-1, 1] units: `igpt-data palette` prints it so.
        "palette_distortion": distortion if isinstance(distortion, int | float) else None,
        "classes": None
        if labels is None
        else [
            {"name": name, **_mean(found.images_I[labels == label])}
            for label, name in enumerate(dataset.manifest.classes or ())
        ],
        "positions": {
            "nats_per_token": [None if math.isnan(value) else value for value in found.positions_T.tolist()],
            "tokens": found.counts_T.tolist(),
        },
    }


def write_images(found: Likelihood, dataset: "Dataset", ids: np.ndarray, path: Path) -> None:
    """Each image's mean nats and bits a token, in the dataset's order, a line of JSON each; null: it was never masked.

    Of an auto-regressive model nats a token times tokens are -log p of the image.
    """
    labels = dataset.labels().tolist() if dataset.manifest.classes is not None else [None] * len(ids)
    with publish_file(path) as file:
        for name, label, nats in zip(ids.tolist(), labels, found.images_I.tolist(), strict=True):
            known = not math.isnan(nats)
            line = {
                "id": name.decode("utf-8", "surrogateescape"),
                "label": label,
                "nats_per_token": nats if known else None,
                "bits_per_token": nats / math.log(2) if known else None,
            }
            file.write(json.dumps(line).encode() + b"\n")


def _mean(images_I: np.ndarray) -> dict[str, Any]:
    """Mean nats and bits, standard error of the nats' mean (None of fewer than 2), and the number of images."""
    known = images_I[~np.isnan(images_I)]
    nats = float(known.mean()) if len(known) else None
    return {
        "nats_per_token": nats,
        "bits_per_token": None if nats is None else nats / math.log(2),
        "standard_error": float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None,
        "images": len(known),
    }


def table(record: Record) -> Table:
    """What `igpt-ds eval` found, whole and by class, with what the figures are of and what they are not."""
    rows = [["all", *_cells(record)]]
    classes = record.get("classes") or []
    if len(classes) > _CLASSES_SHOWN:
        known = [c for c in classes if c.get("nats_per_token") is not None]
        known.sort(key=lambda c: c["nats_per_token"])
        half = _CLASSES_SHOWN // 2
        rows += [[f"easiest: {c['name']}", *_cells(c)] for c in known[:half]]
        rows += [[f"hardest: {c['name']}", *_cells(c)] for c in known[-half:]]
    else:
        rows += [[f"class {c['name']}", *_cells(c)] for c in classes]
    uniform = math.log(record["colours"])
    rows.append([f"uniform over {record['colours']} colours", number(uniform), number(uniform / math.log(2)), "", ""])
    title = f"{record['name']}, step {record['step']:,}, {record['split']}: {record['tokens']:,} tokens scored"
    headings = ["", "nats/token", "bits/token", "± standard error", "images"]
    return Table(title, headings, rows, "\n".join(_notes(record)))


def _cells(part: dict[str, Any]) -> list[str]:
    values = [number(part.get(key)) for key in ("nats_per_token", "bits_per_token", "standard_error")]
    return [*values, f"{part['images']:,}"]


def _notes(record: Record) -> list[str]:
    lines = ["The standard error is that of the nats, over images."]
    if record.get("masks") is not None:
        lines.append(
            f"BERT: mean over {record['masks']} masks an image, rate {record.get('mask_rate')}, "
            f"mask seed {record.get('mask_seed')}; "
            f"{record.get('images_without_mask')} images were never masked and left out."
        )
    if (distortion := record.get("palette_distortion")) is None:
        lines.append(
            "Palette distortion: unknown, the data's manifest does not record it; "
            "igpt-data palette prints it when it fits a palette to the images."
        )
    else:
        lines.append(f"Palette distortion: {distortion:.4e} squared distance a pixel, in [-1, 1] units.")
    lines.append(
        f"A token is one of {record['colours']} palette colours: this is no RGB likelihood (bits/dim), "
        "and compares with models on the same palette and resolution only."
    )
    if record.get("per_image"):
        lines.append(f"Each image's: {record['per_image']}")
    return lines


def figure(record: Record) -> "Figure":
    """Mean nats by position, in the place that the position has in the image."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from igpt_ds.plots import new

    side = record["resolution"]
    values = [np.nan if nats is None else nats for nats in record["positions"]["nats_per_token"]]
    drawn = new(5.2, 4.6)
    axes = drawn.subplots()
    axes.set_facecolor("0.6")  # positions that were never scored
    image = axes.imshow(np.reshape(values, (side, side)), cmap="viridis", interpolation="nearest")
    drawn.colorbar(image, ax=axes, label="nats a token", shrink=0.9)
    axes.set_title(
        f"{record['nats_per_token']:.4f} nats a token, mean of {record['images']:,} {record['split']} images"
    )
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def fault(record: Record) -> str:
    """Another number of positions than an image has."""
    found, side = len(record["positions"]["nats_per_token"]), record["resolution"]
    return "" if found == side * side else f"{found} positions of {side} x {side}"
