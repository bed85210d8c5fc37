"""The network against Hugging Face's ImageGPT with the same random weights."""

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


@pytest.fixture(scope="module")
def ours() -> ImageGPT:
    """Initialised as in training, then what starts at zero or one is drawn, too."""
    shape = [f"model.layers={LAYERS}", f"model.width={WIDTH}", f"model.heads={HEADS}"]
    data = [f"data.resolution={RESOLUTION}", f"data.palette_size={COLOURS}"]
    model = ImageGPT(load_config("tiny", [*shape, *data]))
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.normal_(1, 0.2, generator=generator)
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
    assert not counterparts
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


def test_logits_and_gradients_equal_hugging_face(ours: ImageGPT, theirs: ImageGPTForCausalImageModeling) -> None:
    tokens = torch.randint(COLOURS, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    start = torch.full((3, 1), COLOURS)

    logits = ours(tokens).logits_BTK
    their_logits = theirs(torch.cat([start, tokens[:, :-1]], dim=1)).logits
    assert their_logits.shape == logits.shape
    assert their_logits.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=2e-5)

    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(their_logits.flatten(0, 1), tokens.flatten()).backward()
    expected = paired(theirs, of_gradients=True)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
