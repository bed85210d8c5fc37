"""Hugging Face's ImageGPT directories, in and out.

    DIR/config.json                     the network, and (ours) what the training was
        model.safetensors               or model-00001-of-0000N.safetensors and model.safetensors.index.json,
                                        or (read only) pytorch_model.bin
        preprocessor_config.json        the palette ("clusters") and the input resolution
        README.md                       the model card (written only)

Their table of embeddings has a row more than colours: the last one is the start vector. Their linear layers keep
[inputs, outputs], the transpose of ours, and have biases, which are zero in the released models: all zero they are
dropped, otherwise the network gets biases, too. Their network is auto-regressive; a BERT model's weights fit their
names, but their code cannot run it. A class head on the final norm is their ImageGPTForImageClassification's `score`.
What has no head over the colours (their ImageGPTModel, most classifiers) gives features alone: that head is read as
NaN, which nothing reports, and `require_head` refuses it where it would be used.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_ds.atomic import publish_text
from igpt_ds.checkpoint.safetensors_stream import BYTES, Precision, Streamed, write_safetensors
from igpt_ds.config.schema import Config, ModelConfig
from igpt_ds.dataset.manifest import Manifest
from igpt_ds.dataset.palette import CLUSTERS, Palette
from igpt_ds.errors import UserError
from igpt_ds.memory import available_bytes
from igpt_ds.model.transformer import NORM_EPSILON
from igpt_ds.weights.base import Imported, Weights, chunks, config_of, transposed, whole
from igpt_ds.weights.formats._card import card
from igpt_ds.weights.formats._facts import imported, read_json, record, side, stated, whole_number
from igpt_ds.weights.formats._tensors import Bare, PickledFiles, SafetensorsFiles, TensorFiles

NAME, FOLDER, PRECISIONS = "hf", True, ("float32", "bfloat16")
ORIGIN = "Hugging Face"
OURS = "igpt_ds"  # the key of our record in their config.json
INDEX = "model.safetensors.index.json"
# What their computation must be for the weights to mean the same in ours.
_FIXED = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
    "add_cross_attention": False,
}
_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_SCORE, _CLASS_HEAD = "score.weight", "class_head.weight"  # a classifier's, theirs and ours
# Causal masks that older versions of their code stored; a classifier that we know nothing of.
_IGNORED = (".attn.bias", ".attn.masked_bias", _SCORE)
# Our linear layers by their names.
_LINEAR = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_GAINS = {"norm_attention.gain": "ln_1.weight", "norm_mlp.gain": "ln_2.weight"}
_TOP = {
    "position_embedding": "transformer.wpe.weight",
    "norm.gain": "transformer.ln_f.weight",
    "head.weight": _HEAD,
    _CLASS_HEAD: _SCORE,
}


def recognises(path: Path) -> bool:
    """Whether the directory's config.json is of ImageGPT."""
    return bool(stated(path, "model_type") == "imagegpt")


def their_name(name: str) -> tuple[str, bool]:
    """Their name of one of our parameters (but token embedding and start vector), and whether theirs is transposed."""
    if name in _TOP:
        return _TOP[name], False
    _, layer, rest = name.split(".", 2)
    prefix = f"transformer.h.{layer}."
    if rest in _GAINS:
        return prefix + _GAINS[rest], False
    linear, _, kind = rest.rpartition(".")
    return f"{prefix}{_LINEAR[linear]}.{kind}", kind == "weight"


def read(path: Path) -> Imported:
    """Open a directory."""
    config = read_json(path / "config.json")
    place = path / "config.json"
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{place}: {key} is {config[key]!r}, not {value!r}: it is another network than Image GPT's")
    width, heads = whole_number(place, config, "n_embd"), whole_number(place, config, "n_head")
    layers, positions = whole_number(place, config, "n_layer"), whole_number(place, config, "n_positions")
    colours = whole_number(place, config, "vocab_size") - 1
    if config.get("n_inner") not in (None, 4 * width) or width % heads or colours < 1:
        raise UserError(
            f"{place}: n_inner {config.get('n_inner')}, n_embd {width}, n_head {heads}, vocab_size {colours + 1}: "
            "it is another network than Image GPT's"
        )
    resolution = side(place, positions)
    files = _open_files(path)
    files.require_layers(layers)
    expected = _their_shapes(layers, width, positions, colours)
    if _HEAD not in files.shapes:
        del expected[_HEAD]
    files.require(expected, _IGNORED)
    told = config.get(OURS)
    if told is not None and not isinstance(told, dict):
        raise UserError(f"{place}: {OURS} is no record of ours: take it out")
    objective = "next_pixel"
    if told is not None and isinstance(told.get("config"), dict):
        recorded = told["config"].get("objective")
        objective = recorded.get("name", objective) if isinstance(recorded, dict) else objective
    model = ModelConfig(layers, width, heads, _has_biases(files, layers))
    found = imported(
        path,
        ORIGIN,
        told,
        (model, resolution, colours, objective),
        _rows(files, colours),
        _palette(path),
        {file: _stamp(path / file) for file in files.files},
    )
    if _CLASS_HEAD in found.tensors:
        files.require({**expected, _SCORE: tuple(found.tensors[_CLASS_HEAD]["shape"])}, _IGNORED)
    return found


def _rows(files: TensorFiles, colours: int) -> Callable[[str, int, int], Tensor]:
    def rows(name: str, first: int, last: int) -> Tensor:
        if name == "token_embedding":
            return files.part(_TABLE, slice(first, last)).float()
        if name == "start":
            return files.part(_TABLE, slice(colours, colours + 1), slice(first, last)).float().reshape(-1)
        theirs, transposed = their_name(name)
        if theirs == _HEAD and theirs not in files.shapes:
            return torch.full((min(last, colours) - first, files.shapes[_TABLE][1]), torch.nan)
        if transposed:
            return files.part(theirs, slice(None), slice(first, last)).float().T.contiguous()
        return files.part(theirs, slice(first, last)).float()

    return rows


def _open_files(path: Path) -> TensorFiles:
    kinds: tuple[tuple[type[SafetensorsFiles | PickledFiles], str], ...] = (
        (SafetensorsFiles, "model.safetensors"),
        (PickledFiles, "pytorch_model.bin"),
    )
    for kind, file in kinds:
        place = path / f"{file}.index.json"
        if place.is_file():
            index = read_json(place).get("weight_map")
            if not isinstance(index, dict) or not index or not all(_plain(name) for name in index.values()):
                raise UserError(f"{place}: has no weight_map of file names in this directory: get it anew")
            found = kind(path, sorted(set(index.values())), index)
        elif (path / file).is_file():
            found = kind(path, [file])
        else:
            continue
        return found if _TABLE in found.shapes else Bare(found, "transformer.")  # ImageGPTModel's
    raise UserError(f"{path}: holds neither model.safetensors, pytorch_model.bin nor an index of one: get it anew")


def _plain(file: Any) -> bool:
    """Whether it is the name of a file in the same directory."""
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _their_shapes(layers: int, width: int, positions: int, colours: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        _TABLE: (colours + 1, width),
        "transformer.wpe.weight": (positions, width),
        "transformer.ln_f.weight": (width,),
        _HEAD: (colours, width),
    }
    linear = {"c_attn": (width, 3 * width), "attn.c_proj": (width, width), "c_fc": (width, 4 * width)}
    linear["mlp.c_proj"] = (4 * width, width)
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        shapes |= {prefix + gain: (width,) for gain in _GAINS.values()}
        for name in _LINEAR.values():
            shape = next(shape for end, shape in linear.items() if name.endswith(end))
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[1:]}
    return shapes


def _has_biases(files: TensorFiles, layers: int) -> bool:
    names = [f"transformer.h.{layer}.{name}.bias" for layer in range(layers) for name in _LINEAR.values()]
    return any(bool(files.part(name, slice(None)).any()) for name in names)


def _stamp(file: Path) -> dict[str, Any]:
    """Tells a file from another one without reading it: a model's features are cached by this."""
    facts = file.stat()
    return {"bytes": facts.st_size, "modified": facts.st_mtime_ns}


def _palette(path: Path) -> Palette | None:
    file = path / CLUSTERS
    return Palette.load(file) if file.exists() and stated(path, "clusters", CLUSTERS) is not None else None


def write(
    weights: Weights,
    palette: Palette | None,
    folder: Path,
    precision: Precision,
    tick: Callable[[int], object],
    shard_bytes: int,
) -> dict[str, str]:
    """Write the files into the empty `folder`; return file -> sha256.

    Args:
        shard_bytes: no file holds more than so many bytes of tensors, but for one that is larger alone.
    """
    config = config_of(weights)
    shards: list[list[Streamed]] = [[]]
    room = shard_bytes
    for tensor in _streamed(weights, config):
        size = tensor.elements * BYTES[precision]
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    digests: dict[str, str] = {}
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = write_safetensors(folder / file, shard, precision, tick, {"format": "pt"})
        index |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.elements * BYTES[precision] for shard in shards for tensor in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(
        folder / "config.json", _their_config(config, precision) | {OURS: record(weights, palette, has_score(config))}
    )
    if palette is not None:
        _write_json(folder / CLUSTERS, _their_processor(config, palette))
    publish_text(folder / "README.md", card(weights, config, palette, _their_class(config), has_score(config)))
    return digests


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    publish_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def has_score(config: Config) -> bool:
    """Whether there is a class head where their classifier has its own: on the final norm's features."""
    return config.class_layer == config.model.layers


def _their_class(config: Config) -> str:
    return "ImageGPTForImageClassification" if has_score(config) else "ImageGPTForCausalImageModeling"


def _class_names(config: Config) -> list[str]:
    for source in config.data.sources:
        if (Path(source) / "train" / "manifest.json").exists():
            names = Manifest.load(Path(source) / "train").classes
            if names is not None and len(names) == config.classes:
                return names
    return [f"LABEL_{number}" for number in range(config.classes)]


def _their_config(config: Config, precision: Precision) -> dict[str, Any]:
    # Their class would run a BERT model with a causal mask, so it is not named as the one to run it with.
    labels = _class_names(config) if has_score(config) else []
    return {
        **({"architectures": [_their_class(config)]} if config.causal else {}),
        **({"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}),
        "model_type": "imagegpt",
        "vocab_size": config.palette_size + 1,
        "n_positions": config.sequence_length,
        "n_embd": config.model.width,
        "n_layer": config.model.layers,
        "n_head": config.model.heads,
        "n_inner": None,
        **_FIXED,
        # The paper trains without dropout.
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "reorder_and_upcast_attn": False,
        "use_cache": True,
        "dtype": precision,
    }


def _their_processor(config: Config, palette: Palette) -> dict[str, Any]:
    resolution = config.data.resolution
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": resolution, "width": resolution},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_color_quantize": True,
        "clusters": palette.colours.tolist(),
    }


def _streamed(weights: Weights, config: Config) -> Iterator[Streamed]:
    """Their tensors, made of ours one at a time."""
    width = config.model.width

    def table() -> Iterator[Tensor]:
        yield from chunks(weights, "token_embedding")
        # A BERT model has no start vector.
        yield whole(weights, "start") if config.causal else torch.zeros(width)

    for name, facts in weights.tensors.items():
        shape = tuple(facts["shape"])
        if name == "token_embedding":
            yield Streamed(_TABLE, (shape[0] + 1, width), table)
        elif name != "start" and (name != _CLASS_HEAD or has_score(config)):
            theirs, turned = their_name(name)
            if not turned:
                yield Streamed(theirs, shape, lambda name=name: chunks(weights, name))  # type: ignore[misc]
                continue
            yield Streamed(theirs, shape[::-1], lambda name=name: transposed(whole(weights, name)))  # type: ignore[misc]
            if not config.model.bias:
                bias = theirs.removesuffix("weight") + "bias"
                yield Streamed(bias, shape[:1], lambda count=shape[0]: iter([torch.zeros(count)]))  # type: ignore[misc]


@torch.no_grad()
def logits(weights: Weights, config: Config, tokens_BT: Tensor) -> tuple[Tensor | None, str]:
    """Logits [B, T, K] of a prefix of images by transformers, float32, and its name and version; or None and why."""
    if not config.causal:
        return None, ""  # which their code would run with a causal mask
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed"
    elements = sum(math.prod(facts["shape"]) for facts in weights.tensors.values())
    if 6 * elements >= available_bytes():  # 4 bytes each, and half as much to work with
        return None, "too little memory for transformers"
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.ImageGPTForCausalImageModeling.from_pretrained(
            weights.path, local_files_only=True, torch_dtype=torch.float32
        )
    finally:
        transformers.logging.set_verbosity(level)
    start_B1 = torch.full((len(tokens_BT), 1), config.palette_size)
    output = model.eval()(torch.cat([start_B1, tokens_BT[:, :-1]], dim=1), use_cache=False)
    return output.logits.float(), f"transformers {transformers.__version__}"
