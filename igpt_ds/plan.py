"""Pure arithmetic of a run: parameters, floating-point operations, bytes per rank.

Conventions. FLOPs are those of the model: 6 N a token, N being the parameters in matrix multiplications (blocks
and head; embeddings are look-ups), and attention's two products, half of them where the mask is causal; forward
and backward, recomputation under activation checkpointing not counted. MFU is their rate over the device's dense
bfloat16 peak.
"""

import re
from dataclasses import dataclass

from igpt_ds.config import Config
from igpt_ds.ds_config import Division

# Dense bfloat16 peaks in FLOP/s, by a part of the device's name (vendors' data sheets).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Bytes:
    """Memory of one rank by kind, in bytes."""

    weights: int
    gradients: int
    master_and_moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master_and_moments + self.activations


def parameter_count(config: Config) -> int:
    """All parameters of the network, gains included."""
    d, layers = config.model.width, config.model.layers
    start = d if config.causal else 0
    embeddings = config.palette_size * d + start + config.sequence_length * d
    biases = 9 * d if config.model.bias else 0
    return layers * (12 * d * d + 2 * d + biases) + embeddings + d + (config.palette_size + config.classes) * d


def flops_per_image(config: Config) -> float:
    """Model FLOPs of forward and backward on one image; see the module's conventions."""
    d, layers, n = config.model.width, config.model.layers, config.sequence_length
    matrices = 12 * layers * d * d + config.palette_size * d
    attention = 12 * layers * n * d * (0.5 if config.causal else 1.0)
    return n * (6 * matrices + attention)


def peak_flops(device_name: str) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where it is not known."""
    # The longest match: "H100 PCIe" before "H100".
    matches = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def bytes_per_rank(config: Config, stage: int, division: Division) -> Bytes:
    """Model states divided as the ZeRO stage says, and the activations of one micro-batch.

    Measured for this DeepSpeed under ZeRO-3: float32 takes 20 bytes a parameter of the shard (the master copy
    is a second one), bfloat16 16 and, with float32 gradient accumulation, 18.
    """
    parameters, world = parameter_count(config), division.world
    bf16 = config.training.precision == "bfloat16"
    weight = 2 if bf16 else 4
    whole = {kind: parameters // (world if stage >= divided else 1) for kind, divided in _DIVIDED_FROM.items()}
    # At stage 0 the optimiser works on the weights themselves.
    master = 0 if stage == 0 else 4
    return Bytes(
        weights=whole["weights"] * weight,
        gradients=whole["gradients"] * 4,
        master_and_moments=whole["moments"] * (master + 8),
        activations=_activation_bytes(config, division.micro_batch, weight),
    )


_DIVIDED_FROM = {"weights": 3, "gradients": 2, "moments": 1}


def _activation_bytes(config: Config, micro_batch: int, width: int) -> int:
    """Kept activations: a block's input each with checkpointing and one block's inside, else every block's inside.

    Inside a block, in units of B T d: two norms' inputs and outputs 4, q, k, v 3, attention's output 2, and two of
    4 d in the MLP: 17.
    """
    unit = micro_batch * config.sequence_length * config.model.width * width
    layers = config.model.layers
    blocks = layers + 17 if config.training.activation_checkpointing != "none" else layers * 17
    logits = micro_batch * config.sequence_length * config.palette_size * (width + 8)
    return unit * blocks + logits
