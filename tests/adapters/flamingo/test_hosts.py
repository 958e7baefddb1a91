"""Language models as people have them: in peft, of 8 and 4 bits, and those that cannot be supported."""

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from narrows.adapters.flamingo import Flamingo
from narrows.errors import InvalidArgument
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text
from tests.support import assert_close

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def quantise(model: nn.Module, bits: int) -> None:
    """Linear layers of bitsandbytes in the place of torch's, as `BitsAndBytesConfig` puts them."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                sizes, bias = (child.in_features, child.out_features), child.bias is not None
                if bits == 8:
                    linear = bitsandbytes.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
                    linear.weight = bitsandbytes.nn.Int8Params(child.weight.data, False, has_fp16_weights=False)
                else:
                    linear = bitsandbytes.nn.Linear4bit(*sizes, bias, compute_dtype=torch.float32, quant_type="nf4")
                    linear.weight = bitsandbytes.nn.Params4bit(child.weight.data, False, quant_type="nf4")
                setattr(parent, name, linear.to("cpu"))  # weights are quantised where they are moved
    model.requires_grad_(False).eval()


def assert_cached(model: Flamingo) -> None:
    options = {"media": media(1, 2), "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(text("ab#c#de"), **options)
    assert torch.equal(cached, model.generate(text("ab#c#de"), use_cache=False, **options))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantised_language_model(bits: int) -> None:
    # Where a CPU multiplies in bfloat16, four bits are packed in blocks of 64 by 32.
    lm = language_model("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    quantise(lm, bits)
    assert lm.model.layers[0].mlp.up_proj.weight.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    bare = lm(input_ids=text("ab#c")).logits
    model = flamingo(lm, opened=False)
    assert torch.equal(model(text("ab#c"), media=media(1, 1)).logits, bare)
    assert {parameter.dtype for parameter in model.blocks.parameters()} == {torch.float32}
    model.remove()
    opened = flamingo(lm)
    assert_cached(opened)
    opened(text("ab#c"), media=media(1, 1), labels=text("ab#c")).loss.backward()
    assert all((parameter.grad != 0).any() for parameter in opened.blocks.parameters())


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("order", ["lora inside", "lora afterwards"])
def test_lora(order: str) -> None:
    torch.manual_seed(1)
    lm, config = language_model("llama"), LoraConfig(task_type="CAUSAL_LM", **LORA)
    if order == "lora inside":
        adapted = get_peft_model(lm, config).eval()
        model = flamingo(adapted, freeze=False)
    else:
        model = flamingo(lm)
        adapted = get_peft_model(lm, config).eval()
    prompt, images = text("ab#c#de"), media(1, 2)
    assert_cached(model)
    with torch.no_grad():
        read = model(prompt, media=images).logits
        with adapted.disable_adapter():
            assert not torch.equal(model(prompt, media=images).logits, read)
    model(prompt, media=images, labels=prompt).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"lora" in name or name.startswith(("resampler", "blocks")) for name in trained} == {True}
    assert sum("lora" in name for name in trained) == 12
    alone = adapted(input_ids=prompt).logits
    assert model.remove() is model.language_model
    assert torch.equal(adapted(input_ids=prompt).logits, alone)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mamba": (AutoModelForCausalLM, {"state_size": 4}, "MambaForCausalLM, which takes no past_key_values: .*recurrent"),
    "rwkv": (AutoModelForCausalLM, {"attention_hidden_size": 16}, "RwkvForCausalLM, which takes no past_key_values"),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2},
        "which is an encoder-decoder",
    ),
    "bert": (AutoModelForCausalLM, {"intermediate_size": 16}, "BertLMHeadModel, which reads text in both directions"),
    "recurrent_gemma": (
        AutoModelForCausalLM,
        {"num_hidden_layers": 3, "intermediate_size": 32, "lru_width": 16},
        "RecurrentGemmaForCausalLM, which .*recurrent",
    ),
    "qwen3_next": (
        AutoModelForCausalLM,
        {"layer_types": ["linear_attention", "full_attention"], "intermediate_size": 16, "num_experts": 2},
        r"Qwen3NextForCausalLM, which has a recurrent state",
    ),
    "ctrl": (AutoModelForCausalLM, {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 16}, "CTRL.* with 0 such lists"),
    "openai-gpt": (
        AutoModelForCausalLM,
        {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "OpenAIGPTLMHeadModel, which takes no",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_architectures_are_refused_by_name_with_the_reason(family: str) -> None:
    auto, sizes, reason = REFUSED[family]
    sizes = sizes if "n_embd" in sizes or "d_model" in sizes else {**SMALL, **sizes}
    lm = auto.from_config(AutoConfig.for_model(family, **{"vocab_size": 32, **sizes}))
    with pytest.raises(InvalidArgument, match=reason):
        Flamingo(lm, media_dim=4, every=1)


def test_layers_that_pass_something_else_than_text_are_refused_when_they_do() -> None:
    """Gemma 3n carries four predictions of every hidden state between its layers."""
    small = {**SMALL, "head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 16, "num_kv_shared_layers": 0}
    inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32, "laurel_rank": 4}
    layers = ["sliding_attention", "full_attention"]
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", layer_types=layers, **small, **inputs))
    model = flamingo(lm, every=1, media_token_id=31)
    with pytest.raises(InvalidArgument, match=r"got shape \(4, 1, 4, 16\) for text \(1, 4\) at Gemma3n"):
        model(torch.tensor([[1, 31, 2, 3]]), media=media(1, 1))


def test_several_lists_that_could_be_the_decoder_layers_are_refused() -> None:
    config = AutoConfig.for_model("llama", **SMALL, intermediate_size=16)
    lm = AutoModelForCausalLM.from_config(config)
    assert len(flamingo(lm, every=1).blocks) == 2
    lm.extra = AutoModel.from_config(config)
    with pytest.raises(InvalidArgument, match=r"with 2 such lists \['extra.layers', 'model.layers'\]"):
        flamingo(lm, every=1)


def test_outputs_with_peft_inside_are_those_of_the_merged_model() -> None:
    torch.manual_seed(1)
    adapted = get_peft_model(language_model("llama"), LoraConfig(task_type="CAUSAL_LM", **LORA)).eval()
    model = flamingo(adapted, freeze=False)
    read = model(text("ab#c#de"), media=media(1, 2)).logits
    adapted.merge_adapter()
    assert_close(model(text("ab#c#de"), media=media(1, 2)).logits, read, 1e-5)
