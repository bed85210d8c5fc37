"""The Image GPT transformer, whole: Chen et al. 2020, section 2.2, as in the released code.

A stack of L pre-norm GPT-2 blocks over the n = resolution² tokens of an image:

    n^l     = norm(h^l)
    a^l     = h^l + attention(n^l)
    h^(l+1) = a^l + mlp(norm(a^l))

and logits = head(norm(h^L)). Where the released code differs from GPT-2 we follow the code: norms have a gain
only (no mean is subtracted, no bias), linear layers have no bias (those of the blocks get one where the configuration
asks for it), the activation is x * sigmoid(1.702 x), and the token embedding and the output head are not tied, unless
the configuration ties them.

Shape suffixes: B images, T tokens, D width, H heads, E width of a head, K colours of the palette, C classes.
"""

import zlib
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from igpt_ds.config.schema import Config, recomputed_blocks
from igpt_ds.hashing import stable_hash
from igpt_ds.model import attention

NORM_EPSILON = 1e-5  # released code
GATE = 1.702  # released code: the activation is x * sigmoid(GATE * x)
SPAN = 128  # positions by which a cache's fixed shapes grow


class Output(NamedTuple):
    """What a forward pass gives; a tuple, since ZeRO-3 looks for gradients' way back in tuples only.

    Attributes:
        logits_BTK: scores of the next (or the masked) token, or None where they were not asked for.
        features: layer l -> f^l [B, D], the mean over positions of n^l (paper section 2.4), float32.
        class_logits_BC: scores of the classes, float32; None without a class head (in a pre-training).
    """

    logits_BTK: Tensor | None
    features: dict[int, Tensor]
    class_logits_BC: Tensor | None = None


class Cache:
    """Keys and values of the tokens seen so far, one pair of [B, H, n, E] tensors a layer, for sampling.

    A head's keys lie together in memory, in the order of the positions. Each call attends to the filled part, which
    grows by its tokens; or, after `at`, is a step of one token that attends to the first `span` positions, those not
    filled masked out, and reads from the device where it stands. So all positions of a span take the same kernels over
    the same memory, as CUDA graphs and torch.compile want it.
    """

    def __init__(self, model: "ImageGPT", images: int):
        shape = (images, model.heads, model.sequence_length, model.width // model.heads)
        like = model.token_embedding
        # Not empty: what a mask hides is still multiplied, by 0.
        self.keys = [like.new_zeros(shape) for _ in model.blocks]
        self.values = [like.new_zeros(shape) for _ in model.blocks]
        self.length = 0  # positions filled by calls without `at`
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.span: int | None = None

    def at(self, position: int) -> int:
        """Make the next call a step of fixed shapes at this position, all before which are filled; return its span."""
        self.position.fill_(position)
        self.span = min(-(-(position + 1) // SPAN) * SPAN, self.keys[0].shape[2])
        return self.span

    def append(self, layer: int, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return the keys and values to attend to."""
        keys, values, end = self.keys[layer], self.values[layer], self.span
        if end is None:
            end = self.length + k_BHTE.shape[2]
            keys[:, :, self.length : end] = k_BHTE
            values[:, :, self.length : end] = v_BHTE
        else:
            keys.index_copy_(2, self.position, k_BHTE)
            values.index_copy_(2, self.position, v_BHTE)
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, tokens: int) -> Tensor | None:
        """What the new positions may see of the keys, bool [T, keys]; None where the causal mask or none says it."""
        if self.span is not None:
            return (torch.arange(self.span, device=self.position.device) <= self.position).unsqueeze(0)
        if self.length == 0 or tokens == 1:
            return None
        shape = (tokens, self.length + tokens)
        return torch.ones(shape, dtype=torch.bool, device=self.position.device).tril(self.length)


class Norm(nn.Module):
    """x * gain / sqrt(mean(x²) + eps): the released code's layer norm, that is an RMS norm."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x_BTD: Tensor, times: float = 1.0) -> Tensor:
        gain = self.gain if times == 1.0 else times * self.gain
        return F.rms_norm(x_BTD, gain.shape, gain, NORM_EPSILON)


class Linear(nn.Module):
    """x W^T + times * bias, without bias as a rule. Weights are drawn by `initialise`: construction costs nothing."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else times * self.bias)


class Attention(nn.Module):
    """Multi-head self-attention; logits are scaled by 1/sqrt(E)."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float, bias: bool = False):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = Linear(width, 3 * width, bias)
        self.out = Linear(width, width, bias)
        # With sequence parallelism, see `ImageGPT.share_positions`: `attend` for all positions, between ranks.
        self.attend_between_ranks: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x_BTD: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTHE, k_BTHE, v_BTHE = (part.view(B, T, self.heads, D // self.heads) for part in self.qkv(x_BTD).split(D, 2))
        if cache is None:
            attend = self.attend_between_ranks or self.attend
            return self.out(attend(q_BTHE, k_BTHE, v_BTHE).reshape(B, T, D))
        q_BHTE, k_BHTE, v_BHTE = (part.transpose(1, 2) for part in (q_BTHE, k_BTHE, v_BTHE))
        # A first chunk is causal within itself; a later one sees all that is cached, too.
        causal, mask_TT = cache.length == 0 and cache.span is None, cache.mask(T)
        k_BHTE, v_BHTE = cache.append(layer, k_BHTE, v_BHTE)
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, mask_TT, is_causal=causal)
        return self.out(y_BHTE.transpose(1, 2).reshape(B, T, D))

    def attend(self, q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(E)) v: [B, T, H, E], of any of the heads."""
        dropout = self.dropout if self.training else 0.0
        q_BHTE, k_BHTE, v_BHTE = (part.transpose(1, 2) for part in (q_BTHE, k_BTHE, v_BTHE))
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=dropout, is_causal=self.causal)
        return y_BHTE.transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers, 4 d wide, with x * sigmoid(c x) between them, c = GATE. It is given c x and returns c mlp(x).

    x sigmoid(c x) = silu(c x) / c: a fused kernel, which keeps a third less for the backward pass. Between the layers
    each factor would be a pass over memory; the block has them in its norm's gain and in its residual addition.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.up = Linear(width, 4 * width, bias)
        self.down = Linear(4 * width, width, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x_BTD, GATE)), GATE)


class Block(nn.Module):
    """One layer: two residual lines."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float, bias: bool = False):
        super().__init__()
        self.dropout = dropout
        self.norm_attention = Norm(width)
        self.attention = Attention(width, heads, causal, dropout, bias)
        self.norm_mlp = Norm(width)
        self.mlp = MLP(width, bias)

    def forward(
        self, h_BTD: Tensor, pool: bool = False, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """h^l -> h^(l+1), and with `pool` the feature f^l."""
        n_BTD = self.norm_attention(h_BTD)
        a_BTD = h_BTD + self._dropped(self.attention(n_BTD, cache, layer))
        m_BTD = self._dropped(self.mlp(self.norm_mlp(a_BTD, GATE)))
        return torch.add(a_BTD, m_BTD, alpha=1 / GATE), _pooled(n_BTD) if pool else None

    def _dropped(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)


class ImageGPT(nn.Module):
    """Tokens of images -> logits and features.

    Args:
        config: its resolution and palette size must be resolved. `objective.name` decides between the
            auto-regressive network (start vector, shifted input, causal mask) and the BERT one (none of them).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.width, self.heads, self.causal = config.model.width, config.model.heads, config.causal
        self.sequence_length, self.palette_size = config.sequence_length, config.palette_size
        self.checkpointing = config.training.activation_checkpointing
        self.part = slice(None)
        self.dropout = config.finetune.dropout if config.finetune else 0.0
        self.class_layer = config.class_layer
        D = self.width
        self.token_embedding = nn.Parameter(torch.empty(self.palette_size, D))
        if self.causal:
            self.start = nn.Parameter(torch.empty(D))
        self.position_embedding = nn.Parameter(torch.empty(self.sequence_length, D))
        blocks = (
            Block(D, self.heads, self.causal, self.dropout, config.model.bias) for _ in range(config.model.layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = Norm(D)
        self.head = None if config.model.tied else Linear(D, self.palette_size)
        self.head_std = config.training.head_std
        if self.class_layer is not None:
            self.class_head = Linear(D, config.classes)

    def forward(
        self,
        tokens_BT: Tensor,
        mask_BT: Tensor | None = None,
        features: Collection[int] = (),
        logits: bool = True,
        cache: Cache | None = None,
        norm: bool = True,
    ) -> Output:
        """Run the network.

        Args:
            tokens_BT: int64 in [0, K). Without a cache all n of them: position i predicts token i, from the
                tokens before it (auto-regressive) or from the unmasked ones (BERT). With a cache, the tokens
                that follow those cached; position by position the logits predict the token after each, and
                the first call puts the start vector before its tokens (T + 1 logits).
            mask_BT: bool, BERT only: true where the token is hidden.
            features: layers 0..L whose f^l is wanted; L is the final norm.
            logits: whether the head is applied. Layers that neither it nor a feature needs are not computed.
            cache: keys and values of earlier positions, appended to.
            norm: whether the features are pooled after the norm, or before it: of h^l, the blocks' raw output.
        """
        wanted = set(features) if norm else set()
        if self.class_layer is not None and cache is None:
            wanted.add(self.class_layer)
        top = len(self.blocks)
        last = top if logits or cache is not None else max(wanted | set(features), default=0)
        h_BTD = F.dropout(self._embed(tokens_BT, mask_BT, cache), self.dropout, self.training)
        pooled: dict[int, Tensor] = {}
        raw: dict[int, Tensor] = {}
        recomputed = recomputed_blocks(self.checkpointing) if torch.is_grad_enabled() and cache is None else 0
        for layer, block in enumerate(self.blocks[: last + 1]):
            if not norm and layer in features:
                raw[layer] = _pooled(h_BTD)
            # Of every k blocks the first: when it is computed again, what the others kept is gone.
            if recomputed and layer % recomputed == 0:
                context = _keep_attention if self.checkpointing == "selective" else noop_context_fn
                h_BTD, f_BD = checkpoint(block, h_BTD, layer in wanted, use_reentrant=False, context_fn=context)
            else:
                h_BTD, f_BD = block(h_BTD, layer in wanted, cache, layer)
            if f_BD is not None:
                pooled[layer] = f_BD
        if cache is not None and cache.span is None:
            cache.length += h_BTD.shape[1]
        logits_BTK = class_logits_BC = None
        if last == top:
            if not norm and top in features:
                raw[top] = _pooled(h_BTD)
            n_BTD = self.norm(h_BTD)
            if logits:
                logits_BTK = F.linear(n_BTD, self.token_embedding) if self.head is None else self.head(n_BTD)
            if top in wanted:
                pooled[top] = _pooled(n_BTD)
        if self.class_layer in pooled:
            f_BD = pooled[self.class_layer]
            class_logits_BC = self.class_head(f_BD.to(self.class_head.weight.dtype)).float()
        asked = {layer: pooled[layer] for layer in pooled if layer in features} if norm else raw
        return Output(logits_BTK, asked, class_logits_BC)

    def compile_blocks(self) -> None:
        """Let torch.compile fuse each block, once for each number of images.

        One compilation serves all blocks, since they differ in their weights only.
        """
        for block in self.blocks:
            # Not the module: ZeRO-3's gathering hooks stay outside.
            block.forward = _compiled(block.forward)

    def choose_attention(self) -> str:
        """Let this process compute attention by the quickest kernel for the network as it lies on its device; which."""
        weight, head_width = self.token_embedding, self.width // self.heads
        arguments = (weight.device, weight.dtype, self.sequence_length, head_width, self.causal, self.dropout)
        return attention.choose(*arguments)

    def share_positions(
        self, part: slice, between_ranks: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    ) -> None:
        """Compute the positions of `part` only, other ranks the others (sequence parallelism, DeepSpeed Ulysses).

        Args:
            between_ranks: makes of a function of q, k, v [B, T, H/ranks, E] one of [B, T/ranks, H, E]: the ranks give
                one another positions for heads, and back.
        """
        self.part = part
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.attend_between_ranks = between_ranks(block.attention.attend)

    def _embed(self, tokens_BT: Tensor, mask_BT: Tensor | None, cache: Cache | None) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self.token_embedding)
        first = 0
        if cache is not None and cache.span is not None:
            return x_BTD + self.position_embedding[cache.position]
        if not self.causal:
            # Masked embeddings are zeroed before the positions are added (paper section 2.2).
            if mask_BT is not None:
                x_BTD = x_BTD.masked_fill(mask_BT.unsqueeze(2), 0)
        elif cache is None:
            x_BTD = torch.cat([self.start.expand(len(x_BTD), 1, -1), x_BTD[:, :-1]], dim=1)
        elif cache.length == 0:
            x_BTD = torch.cat([self.start.expand(len(x_BTD), 1, -1), x_BTD], dim=1)
        else:
            first = cache.length
        x_BTD = x_BTD + self.position_embedding[first : first + x_BTD.shape[1]]
        return x_BTD[:, self.part] if cache is None else x_BTD


def _compiled(forward: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A block's forward pass, compiled but for sampling, whose growing cache would be compiled at every length."""
    # A run has two micro-batches or three, and fixed shapes make quicker kernels than those that serve any.
    fused = torch.compile(forward, dynamic=False)

    def either(
        h_BTD: Tensor, pool: bool = False, cache: Cache | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        return fused(h_BTD, pool) if cache is None else forward(h_BTD, pool, cache, layer)

    return either


def _keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Selective checkpointing: attention costs much to compute anew and its output little to keep, d a position."""
    return create_selective_checkpoint_contexts(attention.OPERATORS)


def _pooled(n_BTD: Tensor) -> Tensor:
    """f = mean over positions of n (or h), in float32 whatever the network's type: [B, D]."""
    return n_BTD.mean(dim=1, dtype=torch.float32)


# Standard deviations by the parameter's last names (released code; section 3.3 for the two scaled ones).
_STANDARD_DEVIATIONS: dict[str, Callable[[int, int], float]] = {
    "token_embedding": lambda width, layers: 0.02,
    "start": lambda width, layers: 0.02,
    "position_embedding": lambda width, layers: 0.01,
    "attention.qkv.weight": lambda width, layers: width**-0.5,
    "attention.out.weight": lambda width, layers: (width * layers) ** -0.5,
    "mlp.up.weight": lambda width, layers: 0.02,
    "mlp.down.weight": lambda width, layers: 0.02,
}


@torch.no_grad()
def initialise(
    model: ImageGPT,
    seed: int,
    gathered: Callable[[Tensor], AbstractContextManager[object]] = lambda parameter: nullcontext(),
    given: Collection[str] = (),
) -> None:
    """Draw all weights: normal by `_STANDARD_DEVIATIONS`, gains 1, biases 0, both heads 0 or by training.head_std.

    Each parameter has a generator of its own, seeded by (seed, name), on the CPU: the weights depend neither on
    the device nor on the world size, the ZeRO stage or the order of construction.

    Args:
        gathered: a context in which a partitioned parameter is whole (ZeRO-3): one parameter at a time.
        given: names of parameters that are left as they are, since their values are read from elsewhere.
    """
    for name, parameter in model.named_parameters():
        if name in given:
            continue
        with gathered(parameter):
            # On ranks that only receive the values the parameter stays whole too, so all may draw.
            if name.endswith("gain"):
                parameter.fill_(1.0)
                continue
            head = name in ("head.weight", "class_head.weight")
            if name.endswith(".bias") or (head and not model.head_std):
                parameter.zero_()
            else:
                suffix = ".".join(name.split(".")[2:]) or name
                deviation = model.head_std if head else _STANDARD_DEVIATIONS[suffix](model.width, len(model.blocks))
                # Mixed here, because torch's CPU generator looks at 32 bits of its seed only.
                mixed = stable_hash(seed, zlib.crc32(name.encode())) & 0xFFFFFFFF
                generator = torch.Generator().manual_seed(mixed)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
