"""What is saved is what was added; it loads beside the language model it was made for, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from narrows.adapters.flamingo import Flamingo
from narrows.errors import InvalidArgument
from narrows.ops.media_attention import AllPrevious, Attend, ConsecutiveGroup, LastMedia, LastMedium
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text

CHOICES: list[dict[str, Any]] = [
    {},
    {"attend": LastMedia(2), "placement": "after"},
    {"attend": ConsecutiveGroup(), "every": 1, "block": {"feed_forward_without_media": False}},
    {"attend": AllPrevious(), "media_token_id": None},
]


@pytest.mark.parametrize("arguments", CHOICES, ids=str)
def test_what_was_saved_reads_as_before(arguments: dict[str, Any], tmp_path: Path) -> None:
    lm, tokens, images = language_model("llama"), text("ab#c#de"), media(1, 2)
    model = flamingo(lm, **arguments)
    locations = tokens == 61
    read = model(tokens, media=images, media_locations=locations).logits
    model.save_pretrained(tmp_path)
    model.remove()
    again = Flamingo.from_pretrained(tmp_path, language_model=lm)
    assert torch.equal(again(tokens, media=images, media_locations=locations).logits, read)
    assert (again.attend, again.placement) == (model.attend, model.placement)
    assert again.media_token_id == model.media_token_id


def test_only_what_was_added_is_saved(tmp_path: Path) -> None:
    model = flamingo(language_model("llama"), vision_encoder=torch.nn.Linear(3, 12))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"resampler", "blocks"}  # noqa: SIM118
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["made_for"] == {"model_type": "llama", "width": 32, "layers": 3}


def test_arguments_given_on_loading_go_first(tmp_path: Path) -> None:
    lm = language_model("llama")
    flamingo(lm).save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path, language_model=lm, attend=AllPrevious(), dtype=torch.float64)
    assert again.attend == AllPrevious()
    assert {parameter.dtype for parameter in again.blocks.parameters()} == {torch.float64}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("beside", [torch.bfloat16, torch.float32])
def test_weights_come_back_in_the_precision_in_which_they_were_saved(
    dtype: str, beside: torch.dtype, tmp_path: Path
) -> None:
    lm = language_model("llama").to(beside)
    model = flamingo(lm, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path, language_model=lm)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert again.resampler.latents.dtype == getattr(torch, dtype)
    told = Flamingo.from_pretrained(tmp_path, language_model=lm, dtype="float32")
    assert {parameter.dtype for parameter in told.blocks.parameters()} == {torch.float32}


def test_a_policy_of_ones_own_is_given_again(tmp_path: Path) -> None:
    class Own(LastMedium):
        """Nobody else's."""

    lm = language_model("llama")
    attend: Attend = Own()
    flamingo(lm, attend=attend).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["policy"] is None
    assert Flamingo.from_pretrained(tmp_path, language_model=lm, attend=attend).attend == attend


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    lm = language_model("llama")
    model = flamingo(lm)
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match=r"language_model: expected one like .*'layers': 3.* got .*'gpt2'"):
        Flamingo.from_pretrained(tmp_path, language_model=language_model("gpt2"))
    with pytest.raises(InvalidArgument, match=r"path: .*these blocks, got .* with others: also blocks.1"):
        Flamingo.from_pretrained(tmp_path, language_model=lm, every=3)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match=r"path: expected what save_pretrained of a Flamingo wrote"):
        Flamingo.from_pretrained(empty, language_model=lm)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match=r"path: expected a folder with model.safetensors"):
        Flamingo.from_pretrained(tmp_path, language_model=lm)


def test_loading_that_fails_leaves_no_hooks(tmp_path: Path) -> None:
    model = flamingo(language_model("llama"))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    lm = language_model("llama")
    trained = [parameter.requires_grad for parameter in lm.parameters()]
    with pytest.raises(Exception, match=r"."):
        Flamingo.from_pretrained(tmp_path, language_model=lm)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())
    assert [parameter.requires_grad for parameter in lm.parameters()] == trained
