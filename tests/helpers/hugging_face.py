"""Hugging Face's ImageGPT with the weights of ours: an independent implementation to hold ours against."""

import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt_ds.model.transformer import ImageGPT


@torch.no_grad()
def counterpart(model: ImageGPT) -> ImageGPTForCausalImageModeling:
    """Their network with our weights; the last token of its vocabulary is the start."""
    theirs = ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            vocab_size=model.palette_size + 1,
            n_positions=model.sequence_length,
            n_embd=model.width,
            n_layer=len(model.blocks),
            n_head=model.heads,
            activation_function="quick_gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
        )
    )
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    body = theirs.transformer
    body.wte.weight.copy_(torch.cat([model.token_embedding, model.start[None]]))
    body.wpe.weight.copy_(model.position_embedding)
    body.ln_f.weight.copy_(model.norm.gain)
    theirs.lm_head.weight.copy_(model.head.weight)
    for block, ours in zip(body.h, model.blocks, strict=True):
        block.ln_1.weight.copy_(ours.norm_attention.gain)
        block.ln_2.weight.copy_(ours.norm_mlp.gain)
        # Conv1D keeps [inputs, outputs].
        block.attn.c_attn.weight.copy_(ours.attention.qkv.weight.T)
        block.attn.c_proj.weight.copy_(ours.attention.out.weight.T)
        block.mlp.c_fc.weight.copy_(ours.mlp.up.weight.T)
        block.mlp.c_proj.weight.copy_(ours.mlp.down.weight.T)
    return theirs.eval()
