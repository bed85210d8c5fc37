"""What is trained: frozen dataclasses read strictly from TOML.

A preset (`igpt_ds/presets/NAME.toml`) or a file states the science; `--set section.key=value` changes single
facts; `ds_configs/*.json` states the machine (see `ds_config.py`). Every fault of a configuration is found in
one pass and told together: unknown keys with the nearest valid name, wrong types, contradictions.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from igpt_ds.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network's shape (paper section 3.3)."""

    layers: int
    width: int  # d, the residual stream
    heads: int
    bias: bool = False  # of the blocks' linear layers: the released code has none, weights from elsewhere may


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The token shards. Where `resolution` and `palette_size` are not set, the data's manifest gives them."""

    resolution: int | None = None  # pixels a side; a sequence has resolution² tokens
    palette_size: int | None = None
    sources: tuple[str, ...] = ()  # folders that hold train/ and val/
    weights: tuple[int, ...] = ()  # images of each source in one cycle of the mixture; empty: by count
    window: int = 16  # shards whose rows are shuffled together
    workers: int = 2  # threads of a rank that read ahead; 0 reads between the steps


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted (paper section 2.1)."""

    name: Literal["next_pixel", "masked_pixel"] = "next_pixel"
    mask_rate: float = 0.15  # of masked_pixel only


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Recipe and length of a run (paper section 3.4 and table 5)."""

    steps: int
    batch: int  # images a step over all ranks
    learning_rate: float  # at the end of the warm-up
    warmup_steps: int
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up; constant when fine-tuning (section 3.4)
    beta1: float = 0.9
    beta2: float = 0.95  # 0.999 causes loss spikes (paper appendix A.1)
    epsilon: float = 1e-8
    gradient_clip: float = 0.0  # largest global norm; 0 never clips
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int | None = None  # images a rank holds at once; not set: batch / world size
    # What a block's backward pass finds and what it computes anew: "none" keeps all, "selective" attention's outputs,
    # "full" the block's input only.
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    compile: bool = False  # each block through torch.compile
    sequence_parallel: int = 1  # ranks that share an image's positions (DeepSpeed Ulysses), for more ranks than images
    log_every: int = 10
    validate_every: int = 1000  # 0: never
    # Steps between sheets of samples in the run directory (next_pixel only; 0: never). A sheet takes as many steps of
    # one token as an image and a half have pixels; the default gives a run of the paper's length a hundred sheets.
    sample_every: int = 10_000
    stop_at: int | None = None  # end cleanly after this step, with a checkpoint


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Classification beside the generative objective (paper sections 2.3 and 4.5); without this section: pre-training.

    The loss is generative_weight * L_GEN + L_CLF, both means over the images; L_GEN in nats a token.
    """

    start: str = ""  # the checkpoint whose weights it begins with; empty: random ones
    classes: int | None = None  # not set: the data's
    layer: int | None = None  # whose pooled features the class head reads, 0 to L; not set: the final norm, L
    generative_weight: float = 1.0
    augmentation: Literal["none", "crop_flip"] = "none"  # crop_flip: the paper's for CIFAR, see augment.py
    dropout: float = 0.0  # of embeddings, attention and both branches of a block, as in GPT-2
    patience: int = 5  # validations without a better accuracy that end the run; 0: none do
    fold_validation: bool = False  # train on train/ and val/ together, for the final run


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how much of it stays."""

    every: int = 1000
    keep: int = 3  # newest ones
    milestones: tuple[int, ...] = (65_536, 131_072, 262_144, 524_288, 1_000_000)  # kept for ever (paper figure 3)
    max_failures: int = 3  # saves that may fail in a row, on a full disk say, before the run ends


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What a run does about trouble; see stability.py and watchdog.py."""

    hang_timeout: float = 900.0  # seconds without progress, after which a run is ended; 0 never ends it
    spike_sigma: float = 6.0  # standard deviations above the window's mean loss; 0 lets spikes pass
    window: int = 128  # losses that a spike is held against
    patience: int = 3  # bad steps in a row before the run rolls back
    max_rollbacks: int = 3  # to the same place


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it."""

    name: str
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    finetune: FinetuneConfig | None = None
    seed: int = 0
    init_from: str = ""  # weights that a pre-training begins with; empty: random ones

    @property
    def causal(self) -> bool:
        """Whether position i sees only what stands before it (auto-regressive) or all (BERT)."""
        return self.objective.name == "next_pixel"

    @property
    def sequence_length(self) -> int:
        """Tokens an image, n. The resolution must have been resolved."""
        return _resolved(self.data.resolution) ** 2

    @property
    def palette_size(self) -> int:
        """Colours of the palette, k. It must have been resolved."""
        return _resolved(self.data.palette_size)

    @property
    def classes(self) -> int:
        """Classes to tell apart; 0 in a pre-training. They must have been resolved."""
        return _resolved(self.finetune.classes) if self.finetune else 0

    @property
    def class_layer(self) -> int | None:
        """The layer whose pooled features the class head reads; None in a pre-training."""
        if self.finetune is None:
            return None
        return self.model.layers if self.finetune.layer is None else self.finetune.layer


def _resolved(value: int | None) -> int:
    assert value is not None, "the configuration has not met its data yet"
    return value


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (by name) or a TOML file (by path) and apply `section.key=value` overrides.

    Raises:
        UserError: no such preset or file, not TOML, or any fault of the content, all in one line.
    """
    # By the ending: a folder that is called like a preset must not hide it.
    path = Path(source) if Path(source).suffix == ".toml" else PRESETS / f"{source}.toml"
    if not path.is_file():
        raise UserError(f"preset {source}: there is none of this name: choose {', '.join(presets())} or a file.toml")
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error
    return from_tree(tree, str(source), overrides)


def from_tree(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Build a `Config` from nested dictionaries, with overrides applied; `origin` names them in errors.

    Raises:
        UserError: every fault found, joined in one line.
    """
    for override in overrides:
        _apply(tree, override)
    faults: list[str] = []
    config = _build(Config, tree, "", faults)
    if config is not None:
        faults += _contradictions(config)
    if faults:
        raise UserError(f"configuration {origin}: " + "; ".join(faults))
    return typing.cast(Config, config)


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries, without what is not set."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` reads back unchanged."""
    import tomli_w

    tree = to_tree(config)
    # TOML wants plain keys before tables.
    tree = {k: v for k, v in tree.items() if not isinstance(v, dict)} | tree
    return tomli_w.dumps(tree)


def replace(config: Config, section: str, **changes: Any) -> Config:
    """The same configuration with some keys of one section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def identity(config: Config) -> dict[str, Any]:
    """The facts that make a checkpoint usable for a run: what may not differ when it goes on."""
    # What is not used is left out: checkpoints from before it was known have no word of it.
    model = {key: value for key, value in dataclasses.asdict(config.model).items() if key != "bias" or value}
    return {
        **({"init_from": config.init_from} if config.init_from else {}),
        "seed": config.seed,
        "model": model,
        "objective": dataclasses.asdict(config.objective),
        "finetune": config.finetune and {**dataclasses.asdict(config.finetune), "patience": None},
        "resolution": config.data.resolution,
        "palette_size": config.data.palette_size,
        "batch": config.training.batch,
    }


def _apply(tree: dict[str, Any], override: str) -> None:
    """Write one `section.key=value` into the tree; the value is TOML, or a bare word for a string."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: not of the form section.key=value: write e.g. training.steps=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {section} is no section: see igpt-ds pretrain --print-config")
    tree[last] = value


def _build(cls: type, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    """An instance of the dataclass `cls`, or None where a value is missing or of the wrong type."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            faults.append(f"unknown key {prefix}{key} (nearest: {prefix}{near[0]})")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], prefix + name, faults)
        elif field.default is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]):
                values[name] = _build(typing.cast(type, hints[name]), {}, f"{prefix}{name}.", faults)
            else:
                faults.append(f"{prefix}{name} is missing")
                values[name] = None
    # TOML has no null: None is the mark of a fault.
    return None if None in values.values() else cls(**values)


def _convert(hint: Any, value: Any, name: str, faults: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(typing.cast(type, hint), value, f"{name}.", faults)
        faults.append(f"{name} must be a section, not {value!r}")
        return None
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        return _convert(typing.get_args(hint)[0], value, name, faults)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        faults.append(f"{name} must be one of {', '.join(typing.get_args(hint))}, not {value!r}")
        return None
    if origin is tuple:
        if isinstance(value, list):
            items = tuple(_convert(typing.get_args(hint)[0], item, name, faults) for item in value)
            return None if None in items else items
        faults.append(f"{name} must be a list, not {value!r}")
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int in Python, but `steps = true` is a mistake.
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    faults.append(f"{name} must be {hint.__name__}, not {value!r}")
    return None


def _contradictions(config: Config) -> list[str]:
    model, data, training = config.model, config.data, config.training
    faults = []

    def require(holds: bool, text: str) -> None:
        if not holds:
            faults.append(text)

    positive = {
        "model.layers": model.layers,
        "model.width": model.width,
        "model.heads": model.heads,
        "data.resolution": data.resolution,
        "data.palette_size": data.palette_size,
        "data.window": data.window,
        "training.steps": training.steps,
        "training.batch": training.batch,
        "training.micro_batch": training.micro_batch,
        "training.sequence_parallel": training.sequence_parallel,
        "training.log_every": training.log_every,
        "training.learning_rate": training.learning_rate,
        "training.epsilon": training.epsilon,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.max_failures": config.checkpoint.max_failures,
        "health.patience": config.health.patience,
    }
    for name, value in positive.items():
        require(value is None or value > 0, f"{name} must be above 0, not {value}")
        require(value != math.inf, f"{name} must be finite")
    natural = {
        "seed": config.seed,
        "data.workers": data.workers,
        "training.warmup_steps": training.warmup_steps,
        "training.gradient_clip": training.gradient_clip,
        "training.validate_every": training.validate_every,
        "training.sample_every": training.sample_every,
        "health.hang_timeout": config.health.hang_timeout,
        "health.spike_sigma": config.health.spike_sigma,
        "health.max_rollbacks": config.health.max_rollbacks,
    }
    for name, value in natural.items():
        require(value >= 0, f"{name} must not be negative, but is {value}")
    require(config.health.window > 1, f"health.window must be above 1, not {config.health.window}")
    require(min(config.checkpoint.milestones, default=1) > 0, "checkpoint.milestones must be above 0")
    require(config.seed < 2**64, f"seed {config.seed} exceeds 64 bits")
    if model.heads > 0:
        require(model.width % model.heads == 0, f"model.width {model.width} is no multiple of {model.heads} heads")
    require(data.palette_size is None or data.palette_size <= 65536, "data.palette_size exceeds 16 bits (65536)")
    require(
        0 < config.objective.mask_rate < 1,
        f"objective.mask_rate {config.objective.mask_rate} is not in (0, 1)",
    )
    for name in ("beta1", "beta2"):
        require(0 <= getattr(training, name) < 1, f"training.{name} {getattr(training, name)} is not in [0, 1)")
    if training.stop_at is not None:
        require(0 < training.stop_at <= training.steps, f"training.stop_at {training.stop_at} is not in 1..steps")
    if training.sequence_parallel > 1:
        faults += _sequence_parallel_contradictions(config, training.sequence_parallel)
    if config.finetune is not None:
        faults += _finetune_contradictions(config, config.finetune)
    if data.weights:
        require(
            len(data.weights) == len(data.sources) and min(data.weights) > 0,
            f"data.weights is {list(data.weights)}: give one whole number above 0 for each of "
            f"{len(data.sources)} sources",
        )
    return faults


def _sequence_parallel_contradictions(config: Config, ranks: int) -> list[str]:
    key = f"training.sequence_parallel={ranks}"
    rules = {
        f"{key} does not divide the {config.model.heads} heads, which the ranks deal out among them": (
            config.model.heads % ranks == 0
        ),
        f"{key} does not divide the {config.data.resolution}² positions": (
            config.data.resolution is None or config.data.resolution**2 % ranks == 0
        ),
        f"{key} is for pre-training: a class head needs all positions": config.finetune is None,
    }
    return [text for text, holds in rules.items() if not holds]


def _finetune_contradictions(config: Config, finetune: FinetuneConfig) -> list[str]:
    layers, every = config.model.layers, config.training.validate_every
    rules = {
        f"finetune.classes must be above 1, not {finetune.classes}": finetune.classes is None or finetune.classes > 1,
        f"finetune.layer {finetune.layer} is not in 0..{layers}": 0 <= (finetune.layer or 0) <= layers,
        f"finetune.generative_weight must be finite and not negative, but is {finetune.generative_weight}": (
            0 <= finetune.generative_weight < math.inf
        ),
        f"finetune.dropout {finetune.dropout} is not in [0, 1)": 0 <= finetune.dropout < 1,
        f"finetune.patience must not be negative, but is {finetune.patience}": finetune.patience >= 0,
        "finetune.fold_validation leaves nothing to validate on: set training.validate_every=0": (
            not (finetune.fold_validation and every)
        ),
        "training.validate_every=0 leaves no best checkpoint: set an interval, or finetune.fold_validation=true": (
            bool(every) or finetune.fold_validation
        ),
    }
    return [text for text, holds in rules.items() if not holds]
