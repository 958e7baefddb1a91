"""Tiny language models of many families, made to read media, and a batch for them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from narrows.adapters.flamingo import Flamingo

VOCABULARY, MEDIA_TOKEN, LATENT_DIM = 64, 61, 12

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Windows narrower than the text, where a family has them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gpt2": _GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2, "use_cache": True},
    "phi": {},
    "bloom": {"n_layer": 3, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_EXPERTS, "sliding_window": 7},
    "gptj": {**_GPT, "rotary_dim": 4},
    "mixtral": _EXPERTS,
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": _EXPERTS,
    "smollm3": {},
    "stablelm": {},
}


def language_model(family: str, **overrides: Any) -> nn.Module:
    """A small model of a family in evaluation mode, its weights large enough for every part of it to matter."""
    torch.manual_seed(0)
    sizes = {} if family in ("gpt2", "mpt", "gptj", "codegen") else _SIZES
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**sizes, **tokens, **FAMILIES.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def flamingo(
    model: nn.Module, *, opened: bool = True, block: dict[str, Any] | None = None, **arguments: Any
) -> Flamingo:
    """Blocks at the first and the last layer, their gates open unless they should not be."""
    small = {"heads": 2, "head_dim": 8}
    made = Flamingo(
        model,
        **{"media_dim": LATENT_DIM, "every": (0, 2), "media_token_id": MEDIA_TOKEN, **arguments},
        resampler={"depth": 1, "num_latents": 3, **small},
        block={"mlp_ratio": 2, **small, **(block or {})},
    )
    for gated in made.blocks if opened else ():
        nn.init.constant_(gated.attn_gate, 1.0)
        nn.init.constant_(gated.ff_gate, -0.7)
    return made


def text(*rows: str) -> Tensor:
    """Token ids: a letter is a token, `#` a medium, `.` padding."""
    special = {"#": MEDIA_TOKEN, ".": 0}
    return torch.tensor([[special.get(letter, 2 + ord(letter) % 50) for letter in row] for row in rows])


def media(batch: int, count: int, tokens: int = 4) -> Tensor:
    """Encoded media, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(batch, count, tokens, LATENT_DIM, generator=generator)
