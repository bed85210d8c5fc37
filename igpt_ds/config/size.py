"""Pure arithmetic of a network: its parameters and its floating-point operations. What a job needs: planner/.

Conventions. FLOPs are those of the model: 6 N a token, N being the parameters in matrix multiplications (blocks
and head; embeddings are look-ups), and attention's two products, half of them where the mask is causal; forward
and backward, recomputation under activation checkpointing not counted. MFU is their rate over the device's dense
bfloat16 peak.
"""

from igpt_ds.config.schema import Config


def block_parameters(config: Config) -> int:
    """Parameters of one block: 12 d² in its matrices and two gains, and biases where it has them."""
    d = config.model.width
    return 12 * d * d + 2 * d + (9 * d if config.model.bias else 0)


def parameter_count(config: Config) -> int:
    """All parameters of the network, gains included."""
    d, layers = config.model.width, config.model.layers
    start = d if config.causal else 0
    embeddings = config.palette_size * d + start + config.sequence_length * d
    heads = (0 if config.model.tied else config.palette_size) + config.classes
    return layers * block_parameters(config) + embeddings + d + heads * d


def flops_per_image(config: Config) -> float:
    """Model FLOPs of forward and backward on one image; see the module's conventions."""
    return matrix_flops_per_image(config) + attention_flops_per_image(config)


def matrix_flops_per_image(config: Config) -> float:
    """6 N a token: what the products with weights take of `flops_per_image`."""
    d, layers = config.model.width, config.model.layers
    return float(config.sequence_length * 6 * (12 * layers * d * d + config.palette_size * d))


def attention_flops_per_image(config: Config) -> float:
    """What attention's two products take of `flops_per_image`: they grow with the square of the sequence."""
    d, layers, n = config.model.width, config.model.layers, config.sequence_length
    return 12 * layers * n * n * d * (0.5 if config.causal else 1.0)
