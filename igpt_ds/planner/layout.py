"""Who holds what: a configuration and a DeepSpeed configuration laid out over nodes of GPUs."""

from dataclasses import dataclass, replace
from typing import Any

from igpt_ds.config.batch import Division, divide_batch
from igpt_ds.config.deepspeed import load_ds_config, resolve
from igpt_ds.config.schema import Config, recomputed_blocks
from igpt_ds.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A job's place on its machines.

    Attributes:
        config: resolution and palette size resolved, and what the machine decides.
        zero: the resolved `zero_optimization` (see `igpt_ds.config.deepspeed.resolve`).
        division: of the batch over the ranks.
        ranks_per_node: GPUs of a node.
        summed_in: DeepSpeed's `communication_data_type`, in which ranks sum up gradients; None: in that of weights.
    """

    config: Config
    zero: dict[str, Any]
    division: Division
    ranks_per_node: int
    summed_in: str | None = None

    def __post_init__(self) -> None:
        recipe = self.config.training
        decided = "auto" not in (recipe.precision, recipe.activation_checkpointing, recipe.compile)
        assert decided, "the configuration has not met its machine yet"

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def nodes(self) -> int:
        """Machines; a last one may be half empty."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.division.world

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share an image."""
        return self.division.sequence_parallel

    @property
    def bf16(self) -> bool:
        """Whether the network computes in bfloat16."""
        return self.config.training.precision == "bfloat16"

    @property
    def width(self) -> int:
        """Bytes of a weight, an activation or a gradient in its backward pass."""
        return 2 if self.bf16 else 4

    @property
    def sent_width(self) -> int:
        """Bytes of a gradient on its way between ranks."""
        return {"bf16": 2, "fp32": 4}.get(self.summed_in or "", self.width)

    @property
    def checkpointing(self) -> str:
        """What of a block is computed again in the backward pass: none, selective (all but attention), full; or 1/k,
        which is full in every k-th block, from the first on."""
        return self.config.training.activation_checkpointing

    @property
    def recomputed(self) -> range:
        """The blocks that are computed again."""
        layers, every = self.config.model.layers, recomputed_blocks(self.checkpointing)
        return range(0, layers, every) if every else range(0)

    @property
    def hpz_group(self) -> int:
        """Ranks that share a second copy of the weights (hpZ); 1: there is none."""
        return int(self.zero.get("zero_hpz_partition_size", 1))

    def option(self, key: str, default: Any) -> Any:
        """A key of `zero`, or DeepSpeed's default."""
        return self.zero.get(key, default)

    def with_training(self, **changes: Any) -> "Layout":
        """The same with other facts of [training]."""
        return replace(self, config=replace(self.config, training=replace(self.config.training, **changes)))


def gpus_of(nodes: int | None, gpus_per_node: int | None) -> int | None:
    """How many GPUs that are; None where neither is said. One node, or 8 GPUs of each, where one of them is not."""
    return (nodes or 1) * (gpus_per_node or 8) if nodes or gpus_per_node else None


def require_facts(config: Config, verb: str = "plan") -> None:
    """Refuse a configuration that leaves open what its data would say."""
    missing = [key for key in ("resolution", "palette_size") if getattr(config.data, key) is None]
    if missing:
        examples = " ".join(f"--set data.{key}={32 if key == 'resolution' else 512}" for key in missing)
        raise UserError(f"{verb}: {config.name} takes {' and '.join(missing)} from its data: add {examples}")
    if config.finetune is not None and config.finetune.classes is None:
        raise UserError(f"{verb}: {config.name} takes its classes from its data: add --set finetune.classes=10")


def lay_out(config: Config, ds_source: str, nodes: int, ranks_per_node: int) -> Layout:
    """Divide a job over so many GPUs."""
    require_facts(config)
    recipe = config.training
    division = divide_batch(recipe.batch, recipe.micro_batch, nodes * ranks_per_node, recipe.sequence_parallel)
    ds = resolve(load_ds_config(ds_source), config, division, ranks_per_node)
    return laid_out(config, ds, division, ranks_per_node)


def laid_out(config: Config, ds: dict[str, Any], division: Division, ranks_per_node: int) -> Layout:
    """By a resolved DeepSpeed configuration."""
    return Layout(config, ds["zero_optimization"], division, ranks_per_node, ds.get("communication_data_type"))


@dataclass(frozen=True)
class Sizes:
    """Parameters of the modules, in the order in which a forward pass needs them.

    Attributes:
        root: what the network itself holds: token embedding, start vector, positions.
        block: norm, qkv, attention's output, norm, up, down; each block's alike.
        after: norm, head (where it is not the embedding), class head.
    """

    root: tuple[int, ...]
    block: tuple[int, ...]
    after: tuple[int, ...]


def module_sizes(config: Config) -> Sizes:
    """The network's modules (see `igpt_ds.model.transformer`)."""
    d, k = config.model.width, config.palette_size
    return Sizes(
        root=(k * d, *([d] if config.causal else []), config.sequence_length * d),
        block=(d, 3 * d * d, d * d, d, 4 * d * d, 4 * d * d),
        after=(d, *([] if config.model.tied else [k * d]), *([config.classes * d] if config.classes else [])),
    )
