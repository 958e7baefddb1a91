"""Language models as people have them: in peft, of 8 and 4 bits, and those that cannot be supported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MllamaForCausalLM,
    MllamaTextConfig,
)

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


VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS = {
    "prefix": PrefixTuningConfig(**VIRTUAL),
    "prompt": PromptTuningConfig(**VIRTUAL),
    "P-tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prompts_that_peft_learns_shift_no_place_of_a_medium(kind: str) -> None:
    torch.manual_seed(1)
    lm = get_peft_model(language_model("llama"), PROMPTS[kind]).eval()
    for name, parameter in lm.named_parameters():
        if "prompt_encoder" in name:
            nn.init.normal_(parameter, std=0.3)
    model, prompt, images = flamingo(lm, freeze=False).eval(), text("ab#c#de"), media(1, 2)
    with torch.no_grad():
        read = model(prompt, media=images).logits[:, -7:]
        for number, place in enumerate((2, 4)):
            changed = images.clone()
            changed[:, number] = changed[:, number].flip(-1)
            moved = (model(prompt, media=changed).logits[:, -7:] != read).any(-1)[0]
            assert moved.tolist() == [index >= place for index in range(7)]
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        written = model.generate(prompt, media=images, return_dict_in_generate=True, output_logits=True, **options)
        locations = torch.cat((prompt == 61, torch.zeros(1, 5, dtype=torch.bool)), 1)
        whole = model(written.sequences, media=images, media_locations=locations).logits
    assert_close(torch.stack(written.logits, 1), whole[:, -6:-1], 1e-5)
    model(prompt, media=images, labels=prompt).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if "prompt_encoder" in name]
    assert trained
    assert all((parameter.grad != 0).any() for parameter in (*trained, *model.blocks.parameters()))


def test_a_language_model_that_reads_another_text_is_an_error() -> None:
    class Longer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = language_model("llama")

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return self.lm(input_ids=torch.cat((input_ids[:, :1], input_ids), 1), **kwargs)

    model = flamingo(Longer())
    with pytest.raises(InvalidArgument, match=r"a pass over the 7 tokens of the call's text, .* got one over 8 tokens"):
        model(text("ab#c#de"), media=media(1, 2))


def offloaded(lm: nn.Module, how: str, folder: Path) -> nn.Module:
    if how == "cpu_offload":
        return cpu_offload(lm, execution_device="cpu")
    layers = {f"model.layers.{number}": "disk" for number in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return dispatch_model(lm, {**rest, **layers}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("how", ["cpu_offload", "disk", "all of it"])
def test_what_accelerate_offloads(how: str, tmp_path: Path) -> None:
    expected, prompt, images = flamingo(language_model("llama")), text("ab#c#de"), media(1, 2)
    options = {"media": images, "max_new_tokens": 5, "do_sample": False}
    if how == "all of it":
        model = flamingo(language_model("llama"))
        model.load_state_dict(expected.state_dict())
        cpu_offload(model, execution_device="cpu")
    else:
        model = flamingo(offloaded(language_model("llama"), how, tmp_path))
        assert {parameter.device.type for parameter in model.blocks.parameters()} == {"cpu"}
        added = {n: v for n, v in expected.state_dict().items() if n.startswith(("resampler", "blocks"))}
        model.load_state_dict(added, strict=False)
        model(prompt, media=images, labels=prompt).loss.backward()
        assert all((parameter.grad != 0).any() for parameter in model.blocks.parameters())
    assert torch.equal(model.generate(prompt, **options), expected.generate(prompt, **options))


@pytest.fixture
def one_rank() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_as_the_page_says(one_rank: Any, tmp_path: Path) -> None:
    """Two ranks are tested in tests/training."""
    prompt, images = text("ab#c#de"), media(1, 2)
    expected, model = flamingo(language_model("llama")).train(), flamingo(language_model("llama")).train()
    for module in (*model.language_model.model.layers, *model.blocks, model.resampler):
        fully_shard(module, mesh=one_rank)
    for each in (expected, model):
        each(prompt, media=images, labels=prompt, use_cache=False).loss.backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        if theirs.requires_grad:
            assert_close(ours.grad.full_tensor(), theirs.grad, 1e-5)
    options = {"media": images, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.eval().generate(prompt, **options), expected.eval().generate(prompt, **options))
    ours, theirs = (each.routing(prompt, media=images)[1].weights for each in (model, expected))
    assert_close(ours, theirs, 1e-5)
    model.save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path, language_model=language_model("llama"))
    assert torch.equal(again.generate(prompt, **options), expected.generate(prompt, **options))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_in_mixed_precision(one_rank: Any) -> None:
    prompt, policy = text("ab#c#de"), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = flamingo(language_model("llama").bfloat16()).train()
    for module in (*model.language_model.model.layers, *model.blocks, model.resampler):
        fully_shard(module, mesh=one_rank, mp_policy=policy)
    model(prompt, media=media(1, 2), labels=prompt, use_cache=False).loss.backward()
    for parameter in (*model.blocks.parameters(), model.resampler.latents):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.full_tensor() != 0).any()
    assert model.eval().generate(prompt, media=media(1, 2), max_new_tokens=2, do_sample=False).shape == (1, 9)


ELSEWHERE = "which keeps the text before in {}, which is no cache of transformers"
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rwkv": (AutoModelForCausalLM, {"attention_hidden_size": 16}, "RwkvForCausalLM, " + ELSEWHERE.format("state")),
    "xlnet": (
        AutoModelForCausalLM,
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
        ELSEWHERE.format("mems"),
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2},
        "which is an encoder-decoder",
    ),
    "bert": (AutoModelForCausalLM, {"intermediate_size": 16}, "BertLMHeadModel, which reads text in both directions"),
    "rembert": (
        AutoModelForCausalLM,
        {"intermediate_size": 16},
        "RemBertForCausalLM, which reads text in both directions",
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
    lm.model.extra = AutoModel.from_config(config)
    with pytest.raises(InvalidArgument, match=r"with 2 such lists \['model.extra.layers', 'model.layers'\]"):
        flamingo(lm, every=1)


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "itself"}], ids=str)
def test_drafts_are_refused_where_a_cache_cannot_be_cut_back(drafts: dict[str, Any]) -> None:
    types = ["linear_attention", "full_attention"]
    config = AutoConfig.for_model("qwen3_next", **SMALL, intermediate_size=16, num_experts=2, layer_types=types)
    lm = AutoModelForCausalLM.from_config(config)
    model = flamingo(lm, every=1, media_token_id=31)
    if "assistant_model" in drafts:
        drafts = {"assistant_model": lm}
    with pytest.raises(InvalidArgument, match=r"expected None: drafts that are rejected are cut from the cache"):
        model.generate(torch.tensor([[1, 31, 2]]), media=media(1, 1), max_new_tokens=2, **drafts)


def test_layers_that_text_alone_skips_get_no_block() -> None:
    sizes = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "intermediate_size": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    lm = MllamaForCausalLM(MllamaTextConfig(cross_attention_layers=[1, 3], **sizes, **ends))
    assert flamingo(lm, every=1, media_token_id=31).layer_numbers == (0, 2)
    with pytest.raises(InvalidArgument, match=r"every: expected layers that run in text: none of \[1, 3\], got \[1\]"):
        flamingo(lm, every=(0, 1), media_token_id=31)


def test_outputs_with_peft_inside_are_those_of_the_merged_model() -> None:
    torch.manual_seed(1)
    adapted = get_peft_model(language_model("llama"), LoraConfig(task_type="CAUSAL_LM", **LORA)).eval()
    model = flamingo(adapted, freeze=False)
    read = model(text("ab#c#de"), media=media(1, 2)).logits
    adapted.merge_adapter()
    assert_close(model(text("ab#c#de"), media=media(1, 2)).logits, read, 1e-5)
