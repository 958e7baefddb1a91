"""Every causal language model of transformers, tiny and random: does it read media, as exactly as it reads text?

`python -m tests.adapters.flamingo.sweep` tries all of them, in about two minutes, and writes the table of
docs/flamingo.md; names after it try those alone, and print more.
"""

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from narrows.adapters.flamingo import Flamingo
from narrows.errors import NarrowsError
from tests.adapters.flamingo.hosts import LATENT_DIM, MEDIA_TOKEN, VOCABULARY, media, text

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path("docs/flamingo.md")
BEGIN, END = "<!-- made by tests.adapters.flamingo.sweep -->\n", "<!-- end of it -->\n"

EXACT, ROUNDED = 1e-5, 1e-3
VERDICTS = READS, ROUNDS, OWN, REFUSED, UNTRIED = (
    "reads media",
    "reads media but for rounding",
    "reads media; its own cached text differs from its uncached",
    "refused",
    "not tried",
)

# What makes a model small, under the names that configurations have for it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "mamba_d_ssm"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_d_state"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "rotary_dim", "qk_rope_head_dim", "laurel_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "index_head_dim", "hidden_size_per_layer_input", "sliding_window"), 8),
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    "mamba_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "index_topk"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"), 0.0),
    "mamba_d_head": "auto",
    "qk_head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT_ATTENTION = {"num_key_value_heads": 4, "head_dim": 4}
LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
OWN_SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT_ATTENTION),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "dots3_note_text"), LATENT_ATTENTION),
    "bailing_hybrid": {**LATENT_ATTENTION, "layer_types": LINEAR, "num_experts": 16, "num_experts_per_tok": 2},
    "bamba": {"attn_layer_indices": [2]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {
        **LATENT_ATTENTION,
        "layer_types": LINEAR,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_experts": 8,
        "num_experts_per_token": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# Seen to be so; what is refused by the library is not here.
CANNOT_BE_TRIED = {
    "blt": "reads bytes through models of its own; its configuration has no number of layers, as generate needs",
    "cohere_compass_text": "its configuration does not take a few layers",
    "dots3_note": "its configuration does not take a few layers",
    "gemma4_assistant": "drafts for a model that it needs",
    "gemma4_unified_assistant": "drafts for a model that it needs",
    "musicgen": "reads codes of sound, not text",
    "musicgen_melody": "reads codes of sound, not text",
    "xlstm": "does not run small",
    "zamba": "its weights are tied over more layers",
    "zamba2": "does not run small",
}


class Trial(NamedTuple):
    """What came of a language model.

    Args:
        verdict: one of the above.
        reason: why it is refused, or was not tried; else figures.
    """

    verdict: str
    reason: str


def tiny(kind: str) -> nn.Module:
    """A small model of a kind, a decoder where it could be an encoder, its weights large enough to matter."""
    torch.manual_seed(0)
    default = AutoConfig.for_model(kind)
    given = _sizes(default) | OWN_SIZES.get(kind, {})
    if "is_decoder" in default.to_dict() and not default.is_encoder_decoder:
        given["is_decoder"] = True
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def _sizes(config: Any) -> dict[str, Any]:
    known = config.to_dict()
    found = {
        name: size
        for name, size in SIZES.items()
        if name in known and (name == "eos_token_id" or not isinstance(known[name], list | dict))
    }
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            own = OWN_SIZES.get(part.model_type, {})
            found[name] = {**_sizes(part), **own, "model_type": part.model_type}
    return found


def trial(kind: str) -> Trial:
    """Closed gates are no change, a medium moves the text from its place on and no other, cached is uncached."""
    if kind in CANNOT_BE_TRIED:
        return Trial(UNTRIED, CANNOT_BE_TRIED[kind])
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = tiny(kind)
        try:
            return _read(lm)
        except NarrowsError as error:
            got = str(error).rpartition(", got ")[2].rstrip(".")
            if got.startswith("shape "):
                got = "which passes on more than a hidden state for each token between its layers"
            elif got.endswith("0 such lists []"):
                got = "has its decoder layers in no list that takes hidden states"
            return Trial(REFUSED, re.sub(r"^(\w+, )?which ", "", got))


def _read(lm: Any) -> Trial:
    prompt, images, places = text("ab#cde#fgh"), media(1, 2), [2, 6]
    small = {"heads": 2, "head_dim": 8, "mlp_ratio": 2}
    model = Flamingo(
        lm,
        media_dim=LATENT_DIM,
        every=2,
        media_token_id=MEDIA_TOKEN,
        resampler={"depth": 1, "num_latents": 3, **small},
        block=small,
    )
    with torch.no_grad():
        assert torch.equal(model(prompt, media=images).logits, lm(input_ids=prompt).logits), "closed gates change it"
    for block in model.blocks:
        nn.init.constant_(block.attn_gate, 1.0)
        nn.init.constant_(block.ff_gate, -0.7)
    logits = model(prompt, media=images, use_cache=False).logits
    logits.square().mean().backward()
    assert all((parameter.grad != 0).any() for parameter in model.blocks.parameters()), "a block is not trained"
    scale, others = logits.abs().max(), 0.0
    with torch.no_grad():
        for number, place in enumerate(places):
            changed = images.clone()
            changed[:, number] = changed[:, number].flip(-1)
            moved = (model(prompt, media=changed, use_cache=False).logits - logits).abs().amax((0, 2)) / scale
            assert moved[place:].min() > ROUNDED, f"text does not move that should: {moved}"
            others = max(others, float(moved[:place].max()))
    assert others <= EXACT, f"text moves that must not: {others}"
    ours, alone = _cached(model, prompt, media=images), _cached(lm, prompt)
    figures = f"other text moves by {others:.1e}, cached by {ours:.1e}, without media {alone:.1e}"
    if ours <= EXACT:
        return Trial(READS if others == 0 else ROUNDS, figures)
    if ours <= ROUNDED:
        return Trial(ROUNDS, figures)
    assert alone > ROUNDED, f"cached text is not uncached text: {figures}"
    return Trial(OWN, figures)


def _cached(model: Any, prompt: torch.Tensor, **given: Any) -> float:
    """How far logits of cached generation are from those of the whole text, of the largest."""
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    written = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **options, **given)
    places = {}
    if given:
        new = torch.zeros_like(written.sequences[:, prompt.shape[1] :], dtype=torch.bool)
        places = {"media_locations": torch.cat((prompt == MEDIA_TOKEN, new), 1)}
    with torch.no_grad():
        whole = model(input_ids=written.sequences, use_cache=False, **given, **places).logits[:, -4:-1]
    return float((torch.stack(written.logits, 1) - whole).abs().max() / whole.abs().max())


def table(trials: dict[str, Trial]) -> str:
    """The table of the page."""
    rows = ["| verdict | language models (`model_type`) |", "| --- | --- |"]
    for verdict in (READS, ROUNDS, OWN):
        names = [f"`{kind}`" for kind, one in trials.items() if one.verdict == verdict]
        rows.append(f"| {verdict} ({len(names)}) | {', '.join(names)} |")
    for verdict in (REFUSED, UNTRIED):
        reasons: dict[str, list[str]] = {}
        for kind, one in trials.items():
            if one.verdict == verdict:
                reasons.setdefault(one.reason, []).append(f"`{kind}`")
        rows += [f"| {verdict}: {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """The table that is in a page."""
    return page.partition(BEGIN)[2].partition(END)[0]


def row_of(kind: str, page: str) -> str:
    """The verdict of a language model in a table; empty where it is not there."""
    row = next((line for line in page.splitlines() if f"`{kind}`" in line), "")
    return next((verdict for verdict in VERDICTS if re.match(rf"\| {re.escape(verdict)}( \(|:)", row)), "")


def main(kinds: Iterable[str]) -> None:
    trials = {}
    for kind in kinds or KINDS:
        try:
            trials[kind] = trial(kind)
        except Exception as error:  # to be looked at; the others are worth knowing
            trials[kind] = Trial("FAILED", f"{type(error).__name__}: {error}")
        print(f"{kind:28} {trials[kind].verdict}: {trials[kind].reason}", flush=True)
    if not kinds:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(trials) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1:])
