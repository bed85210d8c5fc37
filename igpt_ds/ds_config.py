"""DeepSpeed's JSON + our configuration + the world size -> a resolved dictionary, purely.

The JSON states the machine: ZeRO stage, buckets, overlap. What the science fixes is "auto" there and filled in
here, so that every fact has one owner. DeepSpeed itself ignores unknown keys and turns an "auto" that nobody
resolved into a default without a word; here both are errors.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.config import Config
from igpt_ds.errors import UserError

FOLDER = Path(__file__).parent.parent / "ds_configs"

_KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "data_types",
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "comms_logger",
    "memory_breakdown",
    "dump_state",
}
_KNOWN_ZERO = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "memory_efficient_linear",
}


@dataclass(frozen=True)
class Division:
    """How a global batch is spread: replicas * micro_batch * accumulation = batch.

    A replica is one rank, or `sequence_parallel` neighbouring ones that each hold a part of every image's positions.
    """

    world: int
    micro_batch: int
    accumulation: int
    sequence_parallel: int = 1

    @property
    def replicas(self) -> int:
        return self.world // self.sequence_parallel

    @property
    def batch(self) -> int:
        return self.replicas * self.micro_batch * self.accumulation

    def replica(self, rank: int) -> int:
        """The replica that a rank belongs to."""
        return rank // self.sequence_parallel


def divide_batch(batch: int, micro_batch: int | None, world: int, sequence_parallel: int = 1) -> Division:
    """Micro-batch and accumulation of each replica; without a micro-batch it holds its whole share at once.

    Raises:
        UserError: the batch cannot be spread evenly; the nearest sizes that can are named.
    """
    if world % sequence_parallel:
        raise UserError(
            f"training.sequence_parallel={sequence_parallel}: does not divide {world} ranks: start a multiple of it"
        )
    replicas = world // sequence_parallel
    if batch % replicas:
        fitting = [n * sequence_parallel for n in range(1, batch + 1) if batch % n == 0]
        batches = [b for b in (batch // replicas * replicas, (batch // replicas + 1) * replicas) if b > 0]
        ways = f"start {_nearest(world, fitting)} ranks or set training.batch={' or '.join(map(str, batches))}"
        if replicas > batch and world % batch == 0:
            ways += f", or training.sequence_parallel={world // batch} (ranks that share an image's positions)"
        raise UserError(f"training.batch={batch}: {world} ranks cannot share it evenly: {ways}")
    share = batch // replicas
    micro = share if micro_batch is None else micro_batch
    if share % micro:
        nearest = _nearest(micro, [n for n in range(1, share + 1) if share % n == 0])
        raise UserError(
            f"training.micro_batch={micro}: does not divide the {share} images of a "
            f"{'rank' if sequence_parallel == 1 else 'replica'} (batch {batch} on {world} ranks): "
            f"set training.micro_batch={nearest}"
        )
    return Division(world, micro, share // micro, sequence_parallel)


def load_ds_config(source: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: a name in ds_configs/ (such as zero3) or a path.

    Raises:
        UserError: no such file, not JSON, unknown keys.
    """
    path = Path(source) if source.endswith(".json") else FOLDER / f"{source}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise UserError(f"DeepSpeed configuration {source}: no such file: choose one of {names} or a file.json")
    try:
        tree = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not (isinstance(tree, dict) and isinstance(tree.get("zero_optimization"), dict)):
        raise UserError(
            f"{path}: is no object with an object zero_optimization in it: begin with ds_configs/zero3.json"
        )
    faults = _unknown(tree, _KNOWN, "") + _unknown(tree["zero_optimization"], _KNOWN_ZERO, "zero_optimization.")
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return dict(tree)


def resolve(tree: dict[str, Any], config: Config, division: Division) -> dict[str, Any]:
    """Fill in what the configuration and the world size decide.

    Raises:
        UserError: the JSON states a fact that the configuration owns, differently; an "auto" is left over; bf16
            without ZeRO (DeepSpeed then takes another optimiser, far from the float32 run).
    """
    bf16 = config.training.precision == "bfloat16"
    stage = tree["zero_optimization"].get("stage")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed configuration: zero_optimization.stage is {stage}: write 0, 1, 2 or 3")
    if bf16 and stage == 0:
        raise UserError("training.precision=bfloat16: needs ZeRO stage 1 to 3: choose ds_configs zero1, zero2 or zero3")
    owned: dict[str, Any] = {
        # DeepSpeed averages gradients over all ranks and need not know that some share their images: to it, each
        # rank holds a micro-batch of its own.
        "train_batch_size": division.world * division.micro_batch * division.accumulation,
        "train_micro_batch_size_per_gpu": division.micro_batch,
        "gradient_accumulation_steps": division.accumulation,
        "gradient_clipping": config.training.gradient_clip,
        "bf16": {"enabled": bf16},
        # bf16 sums of micro-batch gradients lose what float32 keeps.
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    resolved = dict(tree)
    for key, value in owned.items():
        stated = tree.get(key, "auto")
        left_open = stated == "auto" or (isinstance(stated, dict) and all(item == "auto" for item in stated.values()))
        if not left_open and stated != value:
            raise UserError(f'DeepSpeed configuration: {key} is {stated}, but the run\'s is {value}: write "auto"')
        resolved[key] = value
    left = _autos(resolved, "")
    if left:
        raise UserError(f'DeepSpeed configuration: nothing resolves "auto" at {", ".join(left)}: write a value')
    return resolved


def _unknown(tree: dict[str, Any], known: set[str], prefix: str) -> list[str]:
    return [
        f"unknown key {prefix}{key} (nearest: {prefix}{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]})"
        for key in tree
        if key not in known
    ]


def _autos(tree: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in tree.items():
        if value == "auto":
            found.append(prefix + key)
        elif isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
    return found


def _nearest(wanted: int, fitting: list[int]) -> str:
    below = [n for n in fitting if n <= wanted][-1:]
    above = [n for n in fitting if n > wanted][:1]
    return " or ".join(str(n) for n in below + above)
