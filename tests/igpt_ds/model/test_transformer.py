"""The network against the paper's formulas in NumPy float64, its figures, and what each position may see."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_ds.config.file import load_config
from igpt_ds.config.schema import Config
from igpt_ds.config.size import parameter_count
from igpt_ds.model.transformer import GATE, MLP, Cache, ImageGPT, Norm, initialise
from igpt_ds.objectives import load_objective
from tests.helpers.models import CAN_COMPILE

AUTO_REGRESSIVE = "objective.name=next_pixel"
BERT = "objective.name=masked_pixel"


def small_config(*overrides: str) -> Config:
    """3 layers of 24, 4 heads, 16 tokens of 11 colours."""
    shape = ["model.layers=3", "model.width=24", "model.heads=4", "data.resolution=4", "data.palette_size=11"]
    return load_config("tiny", [*shape, "training.activation_checkpointing=none", *overrides])


def random_model(config: Config, seed: int = 0) -> ImageGPT:
    """A float64 network with every parameter random and large enough that none can be left out unseen."""
    model = ImageGPT(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("gain") else 0.0, 0.3, generator=generator)
    return model


def random_tokens(config: Config, images: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.palette_size, (images, config.sequence_length), generator=generator)


def random_mask(tokens: Tensor, seed: int = 2) -> Tensor:
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def reference(
    model: ImageGPT, tokens: Tensor, mask: Tensor | None = None
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Section 2.2 of the paper, one image and one head at a time: logits [B, n, K] and f^0..f^L [B, d] each."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    layers, heads = len(model.blocks), model.heads

    def bias(name: str) -> Any:
        return weights.get(f"{name}.bias", 0.0)

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return np.stack([row / math.sqrt((row**2).sum() / row.size + 1e-5) for row in x]) * weights[f"{name}.gain"]

    def attention(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        n, d = x.shape
        size = d // heads
        query, key, value = np.split(x @ weights[f"{name}.qkv.weight"].T + bias(f"{name}.qkv"), 3, axis=1)
        mixed = np.zeros((n, d))
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            for i in range(n):
                seen = range(i + 1) if model.causal else range(n)
                scores = np.exp([query[i, columns] @ key[j, columns] / math.sqrt(size) for j in seen])
                mixed[i, columns] = sum(w * value[j, columns] for w, j in zip(scores / scores.sum(), seen, strict=True))
        return mixed @ weights[f"{name}.out.weight"].T + bias(f"{name}.out")

    def mlp(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        hidden = x @ weights[f"{name}.up.weight"].T + bias(f"{name}.up")
        return (hidden / (1 + np.exp(-1.702 * hidden))) @ weights[f"{name}.down.weight"].T + bias(f"{name}.down")

    logits, features = [], []
    for image in range(len(tokens)):
        x = weights["token_embedding"][tokens[image].numpy()]
        if model.causal:
            x = np.concatenate([weights["start"][None], x[:-1]])
        elif mask is not None:
            x = x * ~mask[image].numpy()[:, None]
        h = x + weights["position_embedding"]
        pooled = []
        for layer in range(layers):
            n = norm(h, f"blocks.{layer}.norm_attention")
            pooled.append(n.sum(0) / len(n))
            a = h + attention(n, f"blocks.{layer}.attention")
            h = a + mlp(norm(a, f"blocks.{layer}.norm_mlp"), f"blocks.{layer}.mlp")
        n = norm(h, "norm")
        pooled.append(n.sum(0) / len(n))
        logits.append(n @ weights["head.weight"].T)
        features.append(pooled)
    return np.stack(logits), [np.stack(layer) for layer in zip(*features, strict=True)]


@pytest.mark.parametrize(
    ("preset", "resolution", "count", "millions"),
    [
        ("s", 32, 76_571_648, 76),
        ("m", 32, 455_157_760, 455),
        ("l", 32, 1_362_250_752, 1362),
        ("xl", 32, 6_801_438_720, 6801),
        ("xl", 64, 6_810_875_904, 6810),
    ],
)
def test_parameters_of_the_paper(preset: str, resolution: int, count: int, millions: int) -> None:
    config = load_config(preset, [f"data.resolution={resolution}"])
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ImageGPT(config).named_parameters()}
    assert sum(shape.numel() for shape in shapes.values()) == count == parameter_count(config)
    # The paper's figures leave the norms' gains out.
    matrices = sum(shape.numel() for name, shape in shapes.items() if not name.endswith("gain"))
    layers, width = config.model.layers, config.model.width
    assert matrices == 12 * layers * width**2 + (513 + 512 + resolution**2) * width
    assert matrices // 10**6 == millions


@pytest.mark.parametrize("preset", ["s-bert", "m-bert", "l-bert", "l48"])
def test_parameters_of_the_other_presets(preset: str) -> None:
    config = load_config(preset)
    with torch.device("meta"):
        assert sum(p.numel() for p in ImageGPT(config).parameters()) == parameter_count(config)


@pytest.mark.parametrize("bias", ["false", "true"])
@pytest.mark.parametrize("objective", [AUTO_REGRESSIVE, BERT])
def test_logits_and_features_follow_the_papers_formulas(objective: str, bias: str) -> None:
    config = small_config(objective, f"model.bias={bias}")
    model, tokens = random_model(config), random_tokens(config)
    for mask in [None] if config.causal else [None, random_mask(tokens)]:
        logits, features = reference(model, tokens, mask)
        output = model(tokens, mask, features=range(4))
        assert output.logits_BTK is not None
        np.testing.assert_allclose(output.logits_BTK.detach().numpy(), logits, rtol=0, atol=1e-10)
        assert sorted(output.features) == [0, 1, 2, 3]
        for layer, feature in output.features.items():
            assert feature.dtype == torch.float32
            np.testing.assert_allclose(feature.detach().numpy(), features[layer], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", ["false", "true"])
def test_bfloat16_is_no_further_from_the_formulas_than_if_the_activation_were_written_out(bias: str) -> None:
    config = small_config(f"model.bias={bias}")
    away: dict[str, list[float]] = {"ours": [], "written out": []}

    class Unscaled(torch.nn.Module):
        """The norm without the block's factor."""

        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, times: float) -> Tensor:
            return self.norm(x)

    class WrittenOut(torch.nn.Module):
        """The MLP with the factors where the formula has them, but for the one that the block takes back."""

        def __init__(self, mlp: MLP) -> None:
            super().__init__()
            self.up, self.down = mlp.up, mlp.down

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            return GATE * self.down(x * torch.sigmoid(GATE * x))

    for seed in range(8):
        model, tokens = random_model(config, seed), random_tokens(config)
        with torch.no_grad():
            exact = model(tokens).logits_BTK
            model.bfloat16()
            away["ours"].append(float((model(tokens).logits_BTK.double() - exact).norm() / exact.norm()))
            for block in model.blocks:
                block.norm_mlp, block.mlp = Unscaled(block.norm_mlp), WrittenOut(block.mlp)
            away["written out"].append(float((model(tokens).logits_BTK.double() - exact).norm() / exact.norm()))
    ours, written_out = (float(np.mean(values)) for values in away.values())
    assert ours < min(1.1 * written_out, 0.05)


def test_only_what_is_asked_for_is_returned() -> None:
    config = small_config()
    model, tokens = random_model(config), random_tokens(config)
    assert model(tokens).features == {}
    output = model(tokens, features={2}, logits=False)
    assert output.logits_BTK is None
    assert list(output.features) == [2]
    assert torch.equal(output.features[2], model(tokens, features=range(4)).features[2])


@pytest.mark.parametrize("changed", [0, 1, 7, 14, 15])
def test_a_token_reaches_only_later_positions(changed: int) -> None:
    config = small_config(AUTO_REGRESSIVE)
    model, tokens = random_model(config), random_tokens(config)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % config.palette_size
    difference = (model(tokens).logits_BTK - model(other).logits_BTK).abs().amax(dim=(0, 2))
    assert difference[: changed + 1].max() < 1e-12
    assert (difference[changed + 1 :] > 1e-6).all()


def test_bert_sees_every_visible_token_and_no_masked_one() -> None:
    config = small_config(BERT)
    model, tokens = random_model(config), random_tokens(config)
    assert "start" not in dict(model.named_parameters())
    mask = random_mask(tokens)
    logits = model(tokens, mask).logits_BTK
    hidden_changed = torch.where(mask, (tokens + 3) % config.palette_size, tokens)
    assert torch.equal(model(hidden_changed, mask).logits_BTK, logits)
    for position in (0, 7, 15):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % config.palette_size
        difference = (model(changed, mask).logits_BTK - logits).abs().amax(dim=2)
        # Where it is visible, a token reaches every position, before and behind it.
        assert ((difference > 1e-6).all(dim=1) == ~mask[:, position]).all()


def test_bert_keeps_the_position_of_a_masked_token() -> None:
    config = small_config(BERT)
    model, tokens = random_model(config), random_tokens(config)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 5] = True
    before = model(tokens, mask).logits_BTK
    with torch.no_grad():
        model.position_embedding[5] += 1
    assert ((model(tokens, mask).logits_BTK - before).abs().amax(dim=2) > 1e-6).all()


def test_bert_without_positions_is_equivariant() -> None:
    config = small_config(BERT)
    model, tokens = random_model(config), random_tokens(config)
    mask = random_mask(tokens)
    order = torch.randperm(config.sequence_length, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert not torch.allclose(model(tokens[:, order], mask[:, order])[0], model(tokens, mask)[0][:, order])
        model.position_embedding.zero_()
        torch.testing.assert_close(model(tokens[:, order], mask[:, order])[0], model(tokens, mask)[0][:, order])


@pytest.mark.parametrize("objective", [AUTO_REGRESSIVE, BERT])
@pytest.mark.parametrize("colours", [16, 512])
def test_the_initial_loss_is_ln_of_the_palette(objective: str, colours: int) -> None:
    config = small_config(objective, f"data.palette_size={colours}", "objective.mask_rate=0.5")
    model, tokens = ImageGPT(config), random_tokens(config, images=8)
    initialise(model, seed=0)
    module = load_objective(config.objective.name)
    mask = module.mask(tokens, torch.arange(8), config.seed, config.objective.mask_rate)
    losses = module.image_losses(model(tokens, mask).logits_BTK, tokens, mask)
    assert losses.tolist() == pytest.approx([math.log(colours)] * 8, abs=5e-7 * math.log(colours))


@pytest.mark.parametrize("chunks", [(0, *[1] * 15), (6, *[1] * 9), (15,), (3, 4, 1, 5, 2)], ids=str)
def test_decoding_with_a_cache_equals_the_full_pass(chunks: Sequence[int]) -> None:
    config = small_config(AUTO_REGRESSIVE)
    model, tokens = random_model(config).float(), random_tokens(config)
    cache = Cache(model, len(tokens))
    logits, begin = [], 0
    with torch.no_grad():
        for size in chunks:
            logits.append(model(tokens[:, begin : begin + size], cache=cache).logits_BTK)
            begin += size
            # The start vector takes a position, too.
            assert cache.length == begin + 1
        whole = model(tokens).logits_BTK
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


class Operators(TorchDispatchMode):
    """The names of the operators that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str, without: str) -> int:
        return sum(part in name and without not in name for name in self.names)


@pytest.mark.parametrize("objective", [AUTO_REGRESSIVE, BERT])
def test_activation_checkpointing_recomputes_and_changes_no_gradient(objective: str) -> None:
    gradients, calls = {}, {}
    for kept in ("none", "1/2", "1/3", "selective", "full"):
        config = small_config(objective, f"training.activation_checkpointing={kept}")
        model, tokens = random_model(config).float(), random_tokens(config)
        passes = [0, 0, 0]
        for layer, block in enumerate(model.blocks):

            def count(*_: Any, layer: int = layer, passes: list[int] = passes) -> None:
                passes[layer] += 1

            block.mlp.register_forward_pre_hook(count)
        output = model(tokens, None if config.causal else random_mask(tokens), features=[1, 3])
        loss = output.logits_BTK.square().mean() + sum(f.square().mean() for f in output.features.values())
        with Operators() as operators:
            loss.backward()
        gradients[kept] = {name: p.grad for name, p in model.named_parameters()}
        calls[kept] = (passes, operators.count("scaled_dot_product", "_backward"))
    # Times that each block's MLP is computed, and in the backward pass attention.
    assert calls == {
        "none": ([1, 1, 1], 0),
        "1/2": ([2, 1, 2], 2),
        "1/3": ([2, 1, 1], 1),
        "selective": ([2, 2, 2], 0),
        "full": ([2, 2, 2], 3),
    }
    for name, gradient in gradients.pop("none").items():
        assert gradient.abs().max() > 0, name
        for kept, found in gradients.items():
            assert torch.equal(gradient, found[name]), (kept, name)


def kept_bytes(kept: str, layers: int) -> int:
    """Bytes of tensors that a forward pass keeps for the backward pass, those of the parameters not counted."""
    config = small_config(f"training.activation_checkpointing={kept}", f"model.layers={layers}")
    model, tokens = random_model(config).float(), random_tokens(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens)
    return sum(sizes.values())


@pytest.mark.parametrize(("share", "recomputed"), [("1/2", 6), ("1/4", 3), ("1/5", 3), ("1/12", 1), ("1/100", 1)])
def test_a_share_of_the_blocks_recomputed_keeps_that_share_of_the_memory(share: str, recomputed: int) -> None:
    beside = 2 * kept_bytes("none", 1) - kept_bytes("none", 2)
    everything, inputs = kept_bytes("none", 12) - beside, kept_bytes("full", 12) - beside
    input_of_a_block = 2 * 16 * 24 * 4  # images, positions, width, bytes of a float32
    # The first block's input, and the final norm's, are kept in any case.
    assert inputs == pytest.approx(12 * input_of_a_block, abs=input_of_a_block)
    assert everything > 15 * inputs
    expected = recomputed * inputs / 12 + (12 - recomputed) * everything / 12
    assert kept_bytes(share, 12) - beside == pytest.approx(expected, abs=input_of_a_block)


@torch._dynamo.config.patch(disable=False)
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs g++ and Python.h (apt install g++ python3-dev)")
@pytest.mark.parametrize("kept", ["none", "1/2", "selective", "full"])
def test_compiled_blocks_give_the_same_gradients(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    config = small_config(AUTO_REGRESSIVE, f"training.activation_checkpointing={kept}")
    gradients = []
    for compiled in (False, True):
        model, tokens = random_model(config).float(), random_tokens(config)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            model.compile_blocks()
        model(tokens).logits_BTK.square().mean().backward()
        counters = torch._dynamo.utils.counters
        assert counters["frames"]["ok"] == int(compiled), "one compilation serves all blocks"
        assert not counters["graph_break"]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch._dynamo.config.patch(disable=False)
def test_each_number_of_images_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as for any compiler, and then left as it is: no compiler is needed to see what it would be given.
    compiled: list[list[int]] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        assert not any(isinstance(x, torch.SymInt) for x in inputs), "a graph for any number of images"
        compiled.append([len(x) for x in inputs if isinstance(x, Tensor) and x.ndim == 3])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced))
    torch._dynamo.reset()
    config = small_config(AUTO_REGRESSIVE, "training.activation_checkpointing=1/2")
    model = random_model(config).float()
    model.compile_blocks()
    for images in (4, 4, 2, 3, 4, 2):
        model(random_tokens(config, images)).logits_BTK.mean().backward()
    assert compiled == [[4], [2], [3]]
