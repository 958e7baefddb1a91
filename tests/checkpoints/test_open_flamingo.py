"""The same numbers as the modules of OpenFlamingo and Otter, recorded by `record_open_flamingo.py`."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.adapters.flamingo import Flamingo, audit
from narrows.checkpoints import read_open_flamingo
from narrows.checkpoints.open_flamingo import block_of, resampler_of
from narrows.errors import InvalidArgument
from narrows.ops.media_attention import AllPrevious, LastMedium
from tests.checkpoints.record_open_flamingo import LANGUAGE_MODEL, MEDIA_TOKEN, RECORDED
from tests.support import assert_close

HEAD_DIM = 4


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


def under(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ["open_flamingo.resampler", "otter.resampler"])
@pytest.mark.parametrize("kind", ["", ".frames", ".media"], ids=["neither", "frames", "media"])
def test_resampler(recorded, name, kind):
    state = under(recorded, f"{name}{kind}/")
    expected = state.pop("output")
    resampler = resampler_of(state, head_dim=HEAD_DIM)
    assert resampler.time_axis == ("media" if kind == ".media" else "frames")
    assert_close(resampler(recorded["clips"]), expected)


@pytest.mark.parametrize(
    ("name", "attend"),
    [
        ("open_flamingo.block", LastMedium()),
        ("otter.block", LastMedium()),
        ("open_flamingo.block.previous", AllPrevious()),
    ],
)
def test_gated_block(recorded, name, attend):
    state = under(recorded, f"{name}/")
    expected = state.pop("output")
    block = block_of(state, head_dim=HEAD_DIM, attend=attend)
    output = block(recorded["text"], recorded["latents"], recorded["locations"])
    # All previous media: text before the first reads a mean of all media there, future ones included.
    rows = slice(None) if attend == LastMedium() else slice(1, 2)
    assert_close(output[rows], expected[rows])


def test_a_checkpoint_gives_the_resampler_and_the_blocks_by_layer(recorded):
    parts = read_open_flamingo(under(recorded, "model/checkpoint."), head_dim=HEAD_DIM)
    assert list(parts.blocks) == [1, 3]
    assert len(parts.resampler.layers) == 2
    assert not parts.others


def test_a_whole_open_flamingo_on_a_language_model_gives_the_same_logits(recorded):
    """Its trained weights, as its trainer saves them, beside the same Llama in a `narrows.Flamingo`."""
    language_model = LlamaForCausalLM(LlamaConfig(**LANGUAGE_MODEL))
    language_model.load_state_dict(under(recorded, "model/llama."))
    parts = read_open_flamingo(under(recorded, "model/checkpoint."), head_dim=HEAD_DIM)
    model = Flamingo(language_model, media_token_id=MEDIA_TOKEN, **parts.arguments())
    missing, unexpected = model.load_state_dict(parts.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("language_model.") for name in missing)
    output = model.eval()(recorded["model/input_ids"], media=recorded["model/features"])
    assert_close(output.logits, recorded["model/logits"])
    assert audit(model, {"input_ids": recorded["model/input_ids"], "media": recorded["model/features"]}).passed


def _full_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a DDP model's whole state dict has them: under both names, beside the language model."""
    twice = {
        name.replace("model.layers", "gated_cross_attn_layers").replace(".gated_cross_attn_layer.", "."): value
        for name, value in state.items()
    }
    embeddings = {"lang_encoder.model.embed_tokens.weight": torch.zeros(19, 8)}
    return {f"module.{name}": value for name, value in (state | twice | embeddings).items()}


@pytest.mark.parametrize("form", ["trained weights", "whole model", "saved by training", "safetensors"])
def test_every_form_of_a_checkpoint_is_read(recorded, form, tmp_path):
    state = under(recorded, "model/checkpoint.")
    expected = read_open_flamingo(state, head_dim=HEAD_DIM)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        written = _full_names(state) if form == "whole model" else state
        torch.save({"model_state_dict": written, "epoch": 3} if form == "saved by training" else written, path)
    parts = read_open_flamingo(path, head_dim=HEAD_DIM)
    assert list(parts.others) == (["module.lang_encoder.model.embed_tokens.weight"] if form == "whole model" else [])
    read, known = ([each.resampler, *each.blocks.values()] for each in (parts, expected))
    for ours, theirs in zip(read, known, strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "checkpoint: expected tensors by name, got nothing"),
        (lambda state: {"epoch": 3}, "expected tensors by name, got 'epoch' of type int"),
        (lambda state: {"a": torch.ones(1)}, "expected weights named 'perceiver...' and .*Is it a checkpoint of Open"),
        (lambda state: {k: v for k, v in state.items() if "perceiver" in k}, "gated_cross_attn_layer"),
        (lambda state: {k.replace("to_q", "query"): v for k, v in state.items()}, "no 'layers.0.attn.to_q.weight'"),
        (
            lambda state: (
                state | {"perceiver.frame_embs": torch.zeros(2, 6), "perceiver.media_time_embs": torch.zeros(2, 1, 6)}
            ),
            "got both",
        ),
        (lambda state: state | {"perceiver.proj.weight": torch.zeros(2)}, r"got also perceiver\.proj\.weight"),
        (
            lambda state: {k: v for k, v in state.items() if not k.endswith(("norm_media.bias", "attn_gate"))},
            r"got no layers\.0\.attn\.norm_media\.bias, no layers\.1\.attn\.norm_media\.bias\.",
        ),
        (
            lambda state: {k: v[:3] if k.endswith("attn.norm.bias") else v for k, v in state.items()},
            r"model\.layers\.1\.gated_cross_attn_layer\.attn\.norm\.bias of shape \(3,\) in place of \(8,\)",
        ),
        (
            lambda state: {k: v[0] if k.endswith("to_q.weight") else v for k, v in state.items()},
            r"got perceiver\.layers\.0\.0\.to_q\.weight of shape \(6,\)",
        ),
        (
            lambda state: state | {"gated_cross_attn_layers.1.attn_gate": torch.full((1,), 9.0)},
            r"one weight for narrows\.blocks\.1\.attn_gate, got '.*attn_gate' and '.*attn_gate', which differ",
        ),
    ],
    ids=[
        "empty",
        "no tensors",
        "something else",
        "no blocks",
        "other names",
        "both embeddings",
        "one too many",
        "two missing",
        "another shape",
        "another layout",
        "two that differ",
    ],
)
def test_other_weights_are_refused(recorded, change, message):
    with pytest.raises(InvalidArgument, match=message):
        read_open_flamingo(change(under(recorded, "model/checkpoint.")), head_dim=HEAD_DIM)


def test_parts_keep_the_dtype_of_their_weights(recorded):
    state = under(recorded, "model/checkpoint.")
    mixed = {name: value.double() if "norm" in name else value.bfloat16() for name, value in state.items()}
    parts = read_open_flamingo({"model_state_dict": mixed}, head_dim=HEAD_DIM)
    for part in (parts.resampler, *parts.blocks.values()):
        for name, parameter in part.named_parameters():
            is_norm = "norm" in name
            assert parameter.dtype == (torch.float64 if is_norm else torch.bfloat16), name


def test_blocks_of_different_sizes_make_no_flamingo(recorded):
    narrow = {"ff.1.weight": (slice(None, 5),), "ff.3.weight": (slice(None), slice(None, 5))}
    state = under(recorded, "model/checkpoint.")
    for name, value in state.items():
        for ending, part in narrow.items():
            if "layers.3." in name and name.endswith(ending):
                state[name] = value[part]
    parts = read_open_flamingo(state, head_dim=HEAD_DIM)
    with pytest.raises(InvalidArgument, match=r"checkpoint: expected gated blocks of one size, got \{1: .*, 3: "):
        parts.arguments()


def test_heads_of_another_width_are_refused(recorded):
    with pytest.raises(InvalidArgument, match="head_dim: expected a divisor of the inner width 8, got 3"):
        read_open_flamingo(under(recorded, "model/checkpoint."), head_dim=3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="nope"):
        read_open_flamingo(tmp_path / "nope.pt")
