"""Weights from one format into another, checked before they are published.

The result is written beside its destination under a hidden name, one tensor after another: no more than the source's
map, one parameter and a block are in memory. Then it is read back through the reader of its own format: every value
must be the source's (after rounding, in bfloat16). Then logits on random tokens are compared: the source's against the
result's, by Hugging Face's own code where one of the two is its format, by ours otherwise, one layer in memory at a
time. Only then does the result get its name.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from igpt_ds.atomic import fsync_directory, leftovers, publish_directory, unfinished, writing
from igpt_ds.checkpoint.read import Checkpoint
from igpt_ds.checkpoint.safetensors_stream import Precision
from igpt_ds.config.schema import Config
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import RunError, UserError
from igpt_ds.model.transformer import ImageGPT
from igpt_ds.text import aligned
from igpt_ds.weights.base import Imported, Weights, config_of, palette_of, require_head, values_sha256, whole
from igpt_ds.weights.formats import formats, open_weights, written

IMAGES, TOKENS = 2, 64  # whose logits are compared; a prefix of an image is enough to meet every weight
# Of the largest logit. Two programs that add in another order differ by some hundred roundings of float32.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Report:
    """What a conversion did, for people.

    Attributes:
        logits: the largest difference, in units of the largest logit; None where it was not looked at.
    """

    lines: list[tuple[str, str]]
    logits: float | None

    def text(self) -> str:
        return aligned(self.lines)


def convert(
    source: Path,
    destination: Path,
    target: str,
    *,
    precision: Precision = "float32",
    step: int | None = None,
    palette_path: Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Report:
    """Convert weights and check the result.

    Args:
        source: any format that `open_weights` knows.
        destination: must not exist: a directory or a file, as the format is.
        target: NAME of a format that is written.
        palette_path: where the source does not tell its palette.
        shard_bytes: of a file of a Hugging Face directory.

    Raises:
        RunError: the result is not what was written; nothing is published then.
    """
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: exists already: choose another DST, or remove it")
    form = written(target)
    if precision not in form.PRECISIONS:
        raise UserError(
            f"--dtype {precision}: {target} holds {form.PRECISIONS[0]} alone: choose another --to, or leave it out"
        )
    weights = open_weights(source, step)
    require_head(weights)
    config = config_of(weights)
    if config.model.tied and target != "native":
        raise UserError(f"{source}: its head is its token embedding, which {target} does not know: choose --to native")
    palette = _palette(weights, config, palette_path)
    hidden = unfinished(destination)
    elements = sum(math.prod(facts["shape"]) for facts in weights.tensors.values())
    try:
        with tqdm(
            total=3 * elements, desc="convert", unit=" values", unit_scale=True, leave=False, disable=None
        ) as bar:
            with writing(destination):
                for left in leftovers(destination):
                    _remove(left)
                hidden.parent.mkdir(parents=True, exist_ok=True)
                if form.FOLDER:
                    hidden.mkdir()
                digests = form.write(weights, palette, hidden, precision, bar.update, shard_bytes)
                _sync(hidden)
            result = open_weights(hidden)
            values = _compare_values(weights, result, precision, bar.update)
        logits, how = _compare_logits(weights, result, config, precision)
        if destination.exists():
            raise UserError(f"{destination}: exists already: choose another DST, or remove it")
        if hidden.is_dir():
            publish_directory(hidden, destination)
        else:
            with writing(destination):
                os.rename(hidden, destination)
                fsync_directory(destination.parent)
    finally:
        _remove(hidden)
    return _report(weights, result, config, palette, destination, target, precision, digests, values, logits, how)


def _palette(weights: Weights, config: Config, path: Path | None) -> Palette | None:
    known = palette_of(weights)
    if path is None:
        return known
    given = Palette.load(path)
    recorded = weights.identity.get("palette_sha256")
    if given.k != config.palette_size or recorded not in (None, given.sha256):
        what = f"has {given.k} colours, not {config.palette_size}"
        what = what if given.k != config.palette_size else f"is not the one that {weights.path} was trained with"
        raise UserError(f"--palette {path}: {what}: leave it out, or name the right one")
    return given


def _sync(path: Path) -> None:
    """Make what was written durable, directories included."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_dir():
            fsync_directory(file)
        else:
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _compare_values(weights: Weights, result: Weights, precision: Precision, tick: Callable[[int], object]) -> str:
    """Hex sha256 of the result's values, which are the source's.

    Raises:
        RunError: they are not.
    """
    names = list(result.tensors)
    missing = sorted(set(weights.tensors) - set(names) - {"class_head.weight"})
    source: Weights = weights if precision == "float32" else _Rounded(weights)
    found, expected = values_sha256(result, names, tick), values_sha256(source, names, tick)
    if missing or found != expected:
        raise RunError(f"{result.path}: what was written is not what is read back ({missing or 'values differ'})")
    return found


class _Rounded:
    """The source's weights as bfloat16 keeps them."""

    def __init__(self, source: Weights):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._source.read(name, kind, start, stop).bfloat16().float()


def _compare_logits(
    weights: Weights, result: Weights, config: Config, precision: Precision
) -> tuple[float | None, str]:
    """Largest difference of the logits in units of the largest, and how it was found.

    Raises:
        RunError: it is larger than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(TOKENS, config.sequence_length)
    tokens_BT = torch.randint(config.palette_size, (IMAGES, count), generator=generator)
    (ours, by_ours), (theirs, by_theirs) = (_logits(each, config, tokens_BT) for each in (weights, result))
    if not torch.isfinite(ours).all():
        raise UserError(
            f"{weights.path}: its logits are not finite, so its weights are damaged: take another checkpoint"
        )
    largest = max(float(ours.abs().max()), 1e-30)
    difference = float((ours - theirs).abs().max()) / largest
    # The type stands for itself: what bfloat16 loses is told, and is no fault.
    if precision == "float32" and not difference <= TOLERANCE:
        raise RunError(f"{result.path}: its logits differ from the source's by {difference:.1e} of the largest one")
    how = f"of {IMAGES} x {count} random tokens, source by {by_ours}, result by {by_theirs}"
    return difference, how


def _logits(weights: Weights, config: Config, tokens_BT: Tensor) -> tuple[Tensor, str]:
    """Logits [B, T, K] in float32 and the name of the program that computed them: the format's own, if it has one."""
    why = ""
    if isinstance(weights, Imported):
        own = (f for f in formats() if hasattr(f, "logits") and weights.origin == f.ORIGIN)
        if form := next(own, None):
            found, why = form.logits(weights, config, tokens_BT)
            if found is not None:
                return found, why
    return streamed_logits(weights, config, tokens_BT), f"igpt-ds ({why})" if why else "igpt-ds"


@torch.no_grad()
def streamed_logits(weights: Weights, config: Config, tokens_BT: Tensor) -> Tensor:
    """Logits of a prefix of images with one layer in memory at a time: float32 [B, T, K]."""
    with torch.device("meta"):
        model = ImageGPT(config).eval()
    x_BTD = F.embedding(tokens_BT, whole(weights, "token_embedding"))
    if config.causal:
        x_BTD = torch.cat([whole(weights, "start").expand(len(x_BTD), 1, -1), x_BTD[:, :-1]], dim=1)
    h_BTD = x_BTD + whole(weights, "position_embedding")[: tokens_BT.shape[1]]
    for layer, block in enumerate(model.blocks):
        names = [name for name, _ in block.named_parameters()]
        state = {name: whole(weights, f"blocks.{layer}.{name}") for name in names}
        block.load_state_dict(state, assign=True)
        h_BTD = block(h_BTD)[0]
        block.to("meta")
    model.norm.load_state_dict({"gain": whole(weights, "norm.gain")}, assign=True)
    return F.linear(model.norm(h_BTD), whole(weights, "token_embedding" if config.model.tied else "head.weight"))


def _report(
    weights: Weights,
    result: Weights,
    config: Config,
    palette: Palette | None,
    destination: Path,
    target: str,
    precision: Precision,
    digests: dict[str, str],
    values: str,
    logits: float | None,
    how: str,
) -> Report:
    origin = weights.origin if isinstance(weights, Imported) else "checkpoint"
    ranks = f" of {weights.world} ranks" if isinstance(weights, Checkpoint) else ""
    parameters = sum(math.prod(facts["shape"]) for facts in result.tensors.values())
    files = [
        ("sha256", f"{digest}  {name if destination.is_dir() else destination.name}")
        for name, digest in digests.items()
    ]
    lines = [
        ("source", f"{weights.path} ({origin}{ranks}, step {weights.step})"),
        ("result", f"{destination} ({target}, {precision})"),
        ("network", f"{config.model.layers} layers of {config.model.width}, {config.model.heads} heads"),
    ]
    lines += [
        ("tensors", f"{len(result.tensors)} by our names"),
        ("parameters", f"{parameters:,}"),
        ("palette", palette.sha256 if palette else "not known: --palette FILE adds it"),
        *files,
        ("of values", f"{values} ({'as' if precision == 'float32' else 'rounded from'} the source's)"),
        ("logits", f"largest difference {logits:.1e} of the largest logit, {how}"),
    ]
    if "class_head.weight" in weights.tensors and "class_head.weight" not in result.tensors:
        why = "Hugging Face's classifier reads the final norm alone" if target == "hf" else "this format has no place"
        lines.append(("left out", f"class_head.weight: {why}"))
    elif target == "hf" and "class_head.weight" in result.tensors:
        lines.append(("classifier", f"start it with token {config.palette_size}: [{config.palette_size}, tokens[:-1]]"))
    if target == "hf" and not config.causal:
        lines.append(("note", "a BERT model: Hugging Face's code masks causally and cannot run it; ours reads it back"))
    return Report(lines, logits)
