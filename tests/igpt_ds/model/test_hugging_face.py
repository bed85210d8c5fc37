"""The network against Hugging Face's ImageGPT with the same random weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTLayerNorm

from igpt_ds.config.file import load_config
from igpt_ds.model.transformer import ImageGPT, initialise

LAYERS, WIDTH, HEADS, RESOLUTION, COLOURS = 4, 64, 4, 8, 37
TOKENS = RESOLUTION**2


@pytest.fixture(scope="module", params=["false", "true"], ids=["no-bias", "bias"])
def ours(request: pytest.FixtureRequest) -> ImageGPT:
    """Initialised as in training, then what starts at zero or one is drawn, too; without biases, and with."""
    shape = [f"model.layers={LAYERS}", f"model.width={WIDTH}", f"model.heads={HEADS}"]
    data = [f"data.resolution={RESOLUTION}", f"data.palette_size={COLOURS}"]
    model = ImageGPT(load_config("tiny", [*shape, *data, f"model.bias={request.param}"]))
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.normal_(1, 0.2, generator=generator)
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def theirs(ours: ImageGPT) -> ImageGPTForCausalImageModeling:
    model = ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            vocab_size=COLOURS + 1,
            n_positions=TOKENS,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function="quick_gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    counterparts = paired(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        for name, value in ours.named_parameters():
            counterparts.pop(name).copy_(value)
    assert all(name.endswith("bias") for name in counterparts)
    return model


def paired(model: ImageGPTForCausalImageModeling, of_gradients: bool = False) -> dict[str, Tensor]:
    """Hugging Face's weights (or their gradients), viewed in our shapes and by our names."""

    def tensor(parameter: torch.nn.Parameter) -> Tensor:
        return parameter.grad if of_gradients else parameter.data

    transformer = model.transformer
    pairs = {
        # The last row of their table is the start vector.
        "token_embedding": tensor(transformer.wte.weight)[:COLOURS],
        "start": tensor(transformer.wte.weight)[COLOURS],
        "position_embedding": tensor(transformer.wpe.weight),
        "norm.gain": tensor(transformer.ln_f.weight),
        "head.weight": tensor(model.lm_head.weight),
    }
    for layer, block in enumerate(transformer.h):
        # Conv1D keeps [inputs, outputs].
        pairs |= {
            f"blocks.{layer}.norm_attention.gain": tensor(block.ln_1.weight),
            f"blocks.{layer}.attention.qkv.weight": tensor(block.attn.c_attn.weight).T,
            f"blocks.{layer}.attention.out.weight": tensor(block.attn.c_proj.weight).T,
            f"blocks.{layer}.norm_mlp.gain": tensor(block.ln_2.weight),
            f"blocks.{layer}.mlp.up.weight": tensor(block.mlp.c_fc.weight).T,
            f"blocks.{layer}.mlp.down.weight": tensor(block.mlp.c_proj.weight).T,
            f"blocks.{layer}.attention.qkv.bias": tensor(block.attn.c_attn.bias),
            f"blocks.{layer}.attention.out.bias": tensor(block.attn.c_proj.bias),
            f"blocks.{layer}.mlp.up.bias": tensor(block.mlp.c_fc.bias),
            f"blocks.{layer}.mlp.down.bias": tensor(block.mlp.c_proj.bias),
        }
    return pairs


def test_their_layer_norm_is_a_gain_over_the_root_mean_square() -> None:
    norm = ImageGPTLayerNorm(WIDTH)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        x = torch.randn(5, WIDTH, generator=generator) + 2  # a mean that a true layer norm would remove
        expected = F.rms_norm(x, (WIDTH,), norm.weight, 1e-5)
        torch.testing.assert_close(norm(x), expected)
        assert not torch.allclose(norm(x), F.layer_norm(x, (WIDTH,), norm.weight, eps=1e-5), atol=0.1)


@pytest.mark.parametrize(("dtype", "closest"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_logits_and_gradients_equal_hugging_face(
    ours: ImageGPT, theirs: ImageGPTForCausalImageModeling, dtype: torch.dtype, closest: float
) -> None:
    ours, theirs = (copy.deepcopy(model).to(dtype) for model in (ours, theirs))
    tokens = torch.randint(COLOURS, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    start = torch.full((3, 1), COLOURS)

    logits = ours(tokens).logits_BTK
    their_logits = theirs(torch.cat([start, tokens[:, :-1]], dim=1)).logits
    assert their_logits.shape == logits.shape
    assert their_logits.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=closest)

    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(their_logits.flatten(0, 1), tokens.flatten()).backward()
    expected = paired(theirs, of_gradients=True)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 5 * closest, f"{name}: relative error {error:.1e}"
