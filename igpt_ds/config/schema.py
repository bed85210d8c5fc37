"""What is trained: the science of a run as frozen dataclasses.

They are read from TOML by file.py and held against one another by rules.py; what the machine is comes
from `ds_configs/*.json` (see deepspeed.py).
"""

import dataclasses
from typing import Any, Literal

from igpt_ds.objectives import load_objective

CHECKPOINTING = ("none", "selective", "full")  # and "1/k"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network's shape (paper section 3.3)."""

    layers: int
    width: int  # d, the residual stream
    heads: int
    bias: bool = False  # of the blocks' linear layers: the released code has none, weights from elsewhere may
    tied: bool = False  # the head is the token embedding; the paper found them better apart (appendix A.1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The token shards. Where `resolution` and `palette_size` are not set, the data's manifest gives them."""

    resolution: int | None = None  # pixels a side; a sequence has resolution² tokens
    palette_size: int | None = None
    sources: tuple[str, ...] = ()  # folders that hold train/ and val/
    weights: tuple[int, ...] = ()  # images of each source in one cycle of the mixture; empty: by count
    # The final run: val/ of each source is trained on as well, and nothing is validated (section 3.1).
    fold_validation: bool = False
    window: int = 16  # shards whose rows are shuffled together
    workers: int = 2  # threads of a rank that read ahead; 0 reads between the steps


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted (paper section 2.1)."""

    name: str = "next_pixel"  # of a module in objectives/
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
    weight_decay: float = 0.0  # AdamW's, of all but gains and biases; 0.01 changed nothing (appendix A.1)
    head_std: float = 0.0  # of the heads over colours and classes at the start; 0 did better than not (appendix A.1)
    gradient_clip: float = 0.0  # largest global norm; 0 never clips
    # The machine's part: "auto" leaves it to the planner (planner/choose.py). Where nothing is trained, as in an
    # evaluation, "auto" is the plainest: float32, a rank's whole share at once, nothing recomputed, not compiled.
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # float32 master weights in any case
    micro_batch: Literal["auto"] | int = "auto"  # images a rank holds at once
    # What a block's backward pass finds and what it computes anew: "none" keeps all, "selective" attention's outputs,
    # "full" the block's input only; "1/4" is full in every fourth block, and none in the others.
    activation_checkpointing: str = "auto"
    compile: Literal["auto"] | bool = "auto"  # each block through torch.compile
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

    classes: int | None = None  # not set: the data's
    labels: int | None = None  # images of each class that are trained on, drawn by the seed; not set: all (section 4.7)
    layer: int | None = None  # whose pooled features the class head reads, 0 to L; not set: the final norm, L
    generative_weight: float = 1.0
    augmentation: Literal["none", "crop_flip"] = "none"  # crop_flip: the paper's for CIFAR, see augment.py
    dropout: float = 0.0  # of embeddings, attention and both branches of a block, as in GPT-2
    patience: int = 5  # validations without a better accuracy that end the run; 0: none do
    fold_validation: bool = False  # data.fold_validation, as it once was called


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
    init_from: str = ""  # path of the weights that a training begins with; empty: random ones

    @property
    def causal(self) -> bool:
        """Whether position i sees only what stands before it (auto-regressive) or all (BERT)."""
        return load_objective(self.objective.name).CAUSAL

    @property
    def sequence_length(self) -> int:
        """Tokens an image, n. The resolution must have been resolved."""
        return _resolved(self.data.resolution) ** 2

    @property
    def palette_size(self) -> int:
        """Colours of the palette, k. It must have been resolved."""
        return _resolved(self.data.palette_size)

    @property
    def folded(self) -> bool:
        """Whether the validation images are trained on as well."""
        return self.data.fold_validation or (self.finetune is not None and self.finetune.fold_validation)

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


def recomputed_blocks(checkpointing: str) -> int:
    """k where `training.activation_checkpointing` says that every k-th block is computed again; 0: none is."""
    numerator, _, every = checkpointing.partition("/")
    if numerator == "1" and every.isdecimal() and every.isascii() and 1 < int(every) <= 4096:
        return int(every)
    return int(checkpointing in ("full", "selective"))


def replace(config: Config, section: str, **changes: Any) -> Config:
    """The same configuration with some keys of one section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def identity(config: Config) -> dict[str, Any]:
    """The facts that make a checkpoint usable for a run: what may not differ when it goes on."""

    def used(section: Any, *younger: str) -> dict[str, Any]:
        # What is not used is left out: checkpoints from before it was known have no word of it.
        return {key: value for key, value in dataclasses.asdict(section).items() if key not in younger or value}

    return {
        **({"init_from": config.init_from} if config.init_from else {}),
        "seed": config.seed,
        "model": used(config.model, "bias", "tied"),
        "objective": dataclasses.asdict(config.objective),
        "finetune": config.finetune and {**used(config.finetune, "labels"), "patience": None},
        "resolution": config.data.resolution,
        "palette_size": config.data.palette_size,
        "batch": config.training.batch,
    }
