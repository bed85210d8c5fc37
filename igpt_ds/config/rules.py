"""What the values of a configuration must satisfy, alone and together."""

from igpt_ds import objectives
from igpt_ds.config.schema import CHECKPOINTING, Config, FinetuneConfig, recomputed_blocks


def contradictions(config: Config) -> list[str]:
    """Every fault of the values, a sentence each."""
    model, data, training = config.model, config.data, config.training
    micro_batch = None if training.micro_batch == "auto" else training.micro_batch
    faults = []

    def require(holds: bool, text: str) -> None:
        if not holds:
            faults.append(text)

    choice = objectives.names()
    require(
        config.objective.name in choice,
        f"objective.name must be one of {', '.join(choice)}, not {config.objective.name!r}",
    )
    positive = {
        "model.layers": model.layers,
        "model.width": model.width,
        "model.heads": model.heads,
        "data.resolution": data.resolution,
        "data.palette_size": data.palette_size,
        "data.window": data.window,
        "training.steps": training.steps,
        "training.batch": training.batch,
        "training.micro_batch": micro_batch,
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
    natural = {
        "seed": config.seed,
        "data.workers": data.workers,
        "training.warmup_steps": training.warmup_steps,
        "training.gradient_clip": training.gradient_clip,
        "training.weight_decay": training.weight_decay,
        "training.head_std": training.head_std,
        "training.validate_every": training.validate_every,
        "training.sample_every": training.sample_every,
        "health.hang_timeout": config.health.hang_timeout,
        "health.spike_sigma": config.health.spike_sigma,
        "health.max_rollbacks": config.health.max_rollbacks,
    }
    for name, value in natural.items():
        require(value >= 0, f"{name} must not be negative, but is {value}")
    most = {
        "model.layers": (model.layers, 4096),
        "model.width": (model.width, 1 << 20),
        "data.resolution": (data.resolution, 1 << 12),
        "data.palette_size": (data.palette_size, 1 << 16),  # 16 bits
        "data.window": (data.window, 1 << 20),
        "data.workers": (data.workers, 256),
        "training.steps": (training.steps, 10**12),
        "training.batch": (training.batch, 2**31 - 1),
        "training.micro_batch": (micro_batch, 2**31 - 1),
        "training.sequence_parallel": (training.sequence_parallel, 2**31 - 1),
        "health.hang_timeout": (config.health.hang_timeout, 366 * 86_400),  # a timer of C takes no more than some years
        "health.window": (config.health.window, 1 << 20),
        "seed": (config.seed, 2**64 - 1),  # 64 bits
    }
    for name, (value, limit) in most.items():
        require(value is None or value <= limit, f"{name} must be at most {limit}, not {value}")
    require(config.health.window > 1, f"health.window must be above 1, not {config.health.window}")
    require(min(config.checkpoint.milestones, default=1) > 0, "checkpoint.milestones must be above 0")
    if model.heads > 0:
        require(model.width % model.heads == 0, f"model.width {model.width} is no multiple of {model.heads} heads")
    require(
        0 < config.objective.mask_rate < 1,
        f"objective.mask_rate {config.objective.mask_rate} is not in (0, 1)",
    )
    require(
        training.activation_checkpointing in ("auto", *CHECKPOINTING)
        or recomputed_blocks(training.activation_checkpointing) > 1,
        f"training.activation_checkpointing must be one of auto, {', '.join(CHECKPOINTING)}, or a share of the blocks "
        f"such as 1/4, not {training.activation_checkpointing!r:.40}",
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
        f"finetune.classes must be from 2 to a million, not {finetune.classes}": (
            finetune.classes is None or 2 <= finetune.classes <= 10**6
        ),
        f"finetune.layer {finetune.layer} is not in 0..{layers}": 0 <= (finetune.layer or 0) <= layers,
        f"finetune.generative_weight must not be negative, but is {finetune.generative_weight}": (
            finetune.generative_weight >= 0
        ),
        f"finetune.dropout {finetune.dropout} is not in [0, 1)": 0 <= finetune.dropout < 1,
        f"finetune.patience must not be negative, but is {finetune.patience}": finetune.patience >= 0,
        f"finetune.labels must be above 0, not {finetune.labels}": finetune.labels is None or finetune.labels > 0,
        "finetune.labels and data.fold_validation: few labels are drawn of train/ alone: leave one out": (
            not (finetune.labels and config.folded)
        ),
        "training.validate_every=0 leaves no best checkpoint: set an interval, or data.fold_validation=true": (
            bool(every) or config.folded
        ),
    }
    return [text for text, holds in rules.items() if not holds]
