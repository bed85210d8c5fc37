"""DeepSpeed's JSON + our configuration + the world size -> a resolved dictionary, purely.

The JSON states the machine: ZeRO stage, overlap, offload, groups. What the science fixes is "auto" there and filled in
here, so that every fact has one owner; so may be bucket sizes, which follow from the size of a block. DeepSpeed itself
ignores unknown keys and turns an "auto" that nobody resolved into a default without a word; here both are errors.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from igpt_ds.config.batch import Division
from igpt_ds.config.schema import Config
from igpt_ds.config.size import block_parameters
from igpt_ds.errors import UserError
from igpt_ds.reading import read_json

_PACKAGE = Path(str(resources.files("igpt_ds")))
# Installed, it lies in the package; in a checkout, beside it.
FOLDER = next(path for path in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if path.is_dir())

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
_SWITCHES = {
    "contiguous_gradients",
    "reduce_scatter",
    "allgather_partitions",
    "overlap_comm",
    "round_robin_gradients",
    "memory_efficient_linear",
    "use_multi_rank_bucket_allreduce",
}
_SIZES = {
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}
_KNOWN_ZERO = {*_SWITCHES, *_SIZES, "stage", "zero_hpz_partition_size", "offload_optimizer", "offload_param"}
# Of offload_optimizer and offload_param. The processor's memory only: a checkpoint reads and writes the states, which
# on an NVMe disk would have to be swapped in for it.
_KNOWN_OFFLOAD = {"device", "pin_memory"}
# Keys of DeepSpeed that are known and refused, and why; docs/deepspeed.md tells what was tried.
_QUANTISES = "its kernels are for CUDA, and it was not seen to train"
_REFUSED = {
    "optimizer": "it is torch's AdamW, by training.beta1, beta2 and epsilon; of an 8-bit Adam no slices can be saved",
    "scheduler": "the learning rate goes by training.schedule and warmup_steps",
    "fp16": "the paper found float16 worse: choose training.precision",
    "amp": "choose training.precision",
    "torch_autocast": "choose training.precision: bfloat16 takes as much memory, and smaller activations",
    "activation_checkpointing": "it is training.activation_checkpointing",
    "sequence_parallel_size": "it is training.sequence_parallel",
    "compile": "DeepCompile is built against CUDA, and was not seen to train: set training.compile=true",
    "zero_optimization.zero_quantized_weights": _QUANTISES,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISES,
    "zero_optimization.zero_quantized_gradients": f"on one node it does nothing; between nodes {_QUANTISES}",
}
_SUMMED_IN = ("bf16", "fp32")  # of float16's numbers small gradients are none
_FILLED_IN = "filled_in"  # the key of RUN/ds.json that names what was "auto"
DECIDED = "decided"  # and that which tells what the machine decided (train/machine.py)
_MESSAGE = 16 * 2**20  # elements that a bucket has at least: 32 MiB in bfloat16, where bandwidth counts, not latency
_HEAD = 512  # colours of the paper's palette


def ds_presets() -> list[str]:
    """Names of the files in ds_configs/."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_ds_config(source: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: a name in ds_configs/ (such as zero3) or a path."""
    path = Path(source) if source.endswith(".json") else FOLDER / f"{source}.json"
    if not path.is_file():
        names = ", ".join(ds_presets())
        raise UserError(f"DeepSpeed configuration {source}: no such file: choose one of {names} or a file.json")
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    try:
        tree.pop(DECIDED, None)
        for name in tree.pop(_FILLED_IN, []):
            _leave_open(tree, name)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its {_FILLED_IN} does not fit it: name another by --ds") from error
    if not (isinstance(tree, dict) and isinstance(tree.get("zero_optimization"), dict)):
        raise UserError(
            f"{path}: is no object with an object zero_optimization in it: begin with ds_configs/zero3.json"
        )
    zero = tree["zero_optimization"]
    faults = _unknown(tree, _KNOWN, "") + _unknown(zero, _KNOWN_ZERO, "zero_optimization.")
    for key, value in zero.items():
        if key in _SWITCHES and not isinstance(value, bool):
            faults.append(f"zero_optimization.{key} must be true or false, not {value!r:.80}")
        elif key in _SIZES and value != "auto" and (type(value) is not int or not 0 <= value < 2**63):
            faults.append(f'zero_optimization.{key} must be a whole number or "auto", not {value!r:.80}')
    if tree.get("communication_data_type", _SUMMED_IN[0]) not in _SUMMED_IN:
        faults.append(f"communication_data_type must be bf16 or fp32, not {tree['communication_data_type']!r:.80}")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if key in zero:
            faults += _offload_faults(zero[key], f"zero_optimization.{key}", zero.get("stage"), stages)
    if faults:
        raise UserError(f"{path}: " + "; ".join(faults))
    return dict(tree)


def remembered(source: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps: the resolved dictionary, and what was filled in, which `load_ds_config` leaves open again."""

    def filled_in(before: dict[str, Any], after: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in after.items():
            if before.get(key, "auto") == "auto":
                found.append(prefix + key)
            elif isinstance(value, dict):
                found += filled_in(before[key], value, f"{prefix}{key}.")
        return found

    return {**resolved, _FILLED_IN: filled_in(source, resolved, "")}


def _leave_open(tree: dict[str, Any], name: str) -> None:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree[section]
    if sections or key in _KNOWN:
        tree[key] = "auto"
    else:
        del tree[key]  # ours, and stated anew each time


def resolve(
    tree: dict[str, Any], config: Config, division: Division, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """Fill in what the configuration and the world size decide.

    Args:
        ranks_per_node: the group within which hpZ keeps a second copy of the weights, where the JSON leaves it open.

    Raises:
        UserError: the JSON states a fact that the configuration owns, differently; an "auto" is left over; bf16
            without ZeRO (DeepSpeed then takes another optimiser, far from the float32 run); hpZ groups that do not
            divide the ranks.
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
        # Stage 1 adds a gradient to its float32 sum as soon as it is there, and keeps it no longer.
        "bf16": {"enabled": bf16, **({"immediate_grad_update": True} if bf16 else {})},
        # bfloat16 sums of many micro-batches lose what float32 keeps. Between ranks gradients are summed in the
        # network's type all the same, or in `communication_data_type`.
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    resolved = dict(tree)
    for key, value in owned.items():
        stated = tree.get(key, "auto")
        if isinstance(stated, dict) and isinstance(value, dict):
            agrees = {k: v for k, v in stated.items() if v != "auto"}.items() <= value.items()
        else:
            agrees = stated in ("auto", value)
        if not agrees:
            raise UserError(f'DeepSpeed configuration: {key} is {stated}, but the run\'s is {value}: write "auto"')
        resolved[key] = value
    zero = dict(tree["zero_optimization"])
    sizes = bucket_sizes(config)
    zero.update({key: sizes[key] for key, value in zero.items() if value == "auto" and key in sizes})
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = _group(zero, division.world, ranks_per_node)
    resolved["zero_optimization"] = zero
    if offloads(zero, "optimizer"):
        # Our Adam is torch's, on the processor, too; DeepSpeed's would be compiled at the start.
        resolved["zero_force_ds_cpu_optimizer"] = False
    left = _autos(resolved, "")
    if left:
        raise UserError(f'DeepSpeed configuration: nothing resolves "auto" at {", ".join(left)}: write a value')
    return resolved


def bucket_sizes(config: Config) -> dict[str, int]:
    """What "auto" stands for, in elements: everything goes by whole blocks.

    A bucket holds one block (113 M parameters of iGPT-XL), or of small models as many as make a message that is not
    ruled by latency, and the output head beside them; so the first reduction of a backward pass ends with a block,
    and each later one is a block. While one bucket is computed on, the next is gathered. Parameters are kept that are
    needed again within two buckets: from a block's recomputation to its backward pass (18 d² elements, one and a half
    blocks), but not from its forward pass to that.
    """
    block = block_parameters(config)
    blocks = min(config.model.layers, -(-_MESSAGE // block))
    bucket = blocks * block + _HEAD * config.model.width
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 3 * bucket,
        "stage3_max_reuse_distance": 2 * bucket,
    }


def offloads(zero: dict[str, Any], what: str) -> bool:
    """Whether "optimizer" or "param" lies in the processor's memory."""
    return bool(zero.get(f"offload_{what}", {}).get("device", "none") == "cpu")


def _group(zero: dict[str, Any], world: int, ranks_per_node: int | None) -> int:
    """The size of hpZ's groups; 1, which is none, where all ranks are in one."""
    stated = zero["zero_hpz_partition_size"]
    name = "DeepSpeed configuration: zero_optimization.zero_hpz_partition_size"
    group = (ranks_per_node or 1) if stated == "auto" else stated
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise UserError(f'{name} is {group}: write the number of GPUs of a node, or "auto"')
    if zero.get("stage") != 3:
        raise UserError(f"{name}: only stage 3 divides weights: leave it out, or set stage 3")
    if group >= world:
        return 1
    if world % group:
        raise UserError(f"{name} is {group}: {world} ranks are no whole number of such groups: start a multiple of it")
    return group


def _offload_faults(offload: Any, name: str, stage: object, stages: tuple[int, ...]) -> list[str]:
    if not isinstance(offload, dict):
        return [f"{name} must be an object, not {offload!r}"]
    faults = _unknown(offload, _KNOWN_OFFLOAD, f"{name}.")
    if offload.get("device", "none") not in ("none", "cpu"):
        faults.append(f"{name}.device is {offload['device']!r}: write cpu or none")
    if not isinstance(offload.get("pin_memory", True), bool):
        faults.append(f"{name}.pin_memory must be true or false, not {offload['pin_memory']!r}")
    if stage not in stages:
        faults.append(f"{name} needs stage {' or '.join(map(str, stages))}, not {stage}")
    return faults


def _unknown(tree: dict[str, Any], known: set[str], prefix: str) -> list[str]:
    return [
        f"{prefix}{key} is refused: {_REFUSED[prefix + key]} (docs/deepspeed.md)"
        if prefix + key in _REFUSED
        else f"unknown key {prefix}{key} (nearest: {prefix}{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]})"
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
