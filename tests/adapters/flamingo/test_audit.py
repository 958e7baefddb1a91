"""`narrows.audit` on models that are right, on models that are wrong in a known way, and on transformers' own."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from narrows.adapters.flamingo import audit
from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.media_attention import AllPrevious, ConsecutiveGroup, LastMedia, LastMedium

MEDIA = 9


class Reader(nn.Module):
    """A causal model in one line of arithmetic: a position sums what stands before it, and its media.

    Args:
        sees: `[T, M]` from the places of a row's media and the text's length; by default every medium before it.
    """

    def __init__(self, sees=lambda times, count: times[:, None] > torch.arange(count)) -> None:
        super().__init__()
        self.sees = sees
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, input_ids: Tensor, media: Tensor, media_mask: Tensor | None = None, **_: object) -> Tensor:
        times = (input_ids == MEDIA).cumsum(1)
        seen = torch.stack([self.sees(row, media.shape[1]) for row in times]).to(media)
        if media_mask is not None:
            media = media.masked_fill(~media_mask[..., None, None], 0.0)
        return input_ids[..., None].to(media).cumsum(1) + (seen @ media.mean(2)).cumsum(1) @ self.weight


def a_batch(*rows: str, num_media: int = 2, **rest: Tensor) -> dict[str, Tensor]:
    """`.` is text, `M` a medium's token, `p` padding."""
    ids = torch.tensor([["p.M".index(sign) for sign in row] for row in rows])
    ids = torch.tensor([0, 5, MEDIA])[ids]
    media = torch.randn(len(rows), num_media, 3, 4, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "media": media, **rest}


@pytest.mark.parametrize(
    "rows", [["..M..M."], ["M.M...."], ["ppM..M.", "M.M..pp"], [".MM...."], ["..M....", "..M..M."]]
)
def test_a_causal_model_passes(rows):
    found = audit(Reader().double(), a_batch(*rows), media_token_id=MEDIA)
    assert found.passed, str(found)
    assert not found.leaks
    assert not found.blind


def test_text_before_a_medium_that_moves_is_a_leak():
    """What transformers' Mllama does: where all media are masked, the softmax is over all of them."""
    everything = Reader(lambda times, count: (times == 0)[:, None] | (times[:, None] > torch.arange(count)))
    found = audit(everything.double(), a_batch("..M..M."), media_token_id=MEDIA)
    assert [(leak.medium.index, leak.row, leak.positions) for leak in found.leaks] == [
        (0, 0, (0, 1)),
        (1, 0, (0, 1, 2, 3, 4)),
    ]
    assert "leak:  medium 1 of row 0, at position 5, moves positions 0-4, by up to" in str(found)
    assert not found.passed


def test_text_that_does_not_depend_on_its_medium_is_blind():
    last_only = Reader(lambda times, count: (times[:, None] > torch.arange(count)) & (torch.arange(count) > 0))
    found = audit(last_only.double(), a_batch("..M..M."), media_token_id=MEDIA)
    assert [(blind.medium.index, blind.positions) for blind in found.blind] == [(0, (2, 3, 4, 5, 6))]
    assert "blind: medium 0 of row 0, at position 2, does not move positions 2-6" in str(found)


def test_a_model_that_sees_nothing_is_told_so():
    nothing = Reader(lambda times, count: torch.zeros(len(times), count))
    assert "Are gates still closed?" in str(audit(nothing.double(), a_batch("..M..M."), media_token_id=MEDIA))


class Mixing(Reader):
    """Rows share the mean of their media."""

    def forward(self, input_ids: Tensor, media: Tensor, **rest: Tensor) -> Tensor:
        return super().forward(input_ids, media, **rest) + media.mean((0, 1, 2))[:3]


def test_rows_must_not_move_each_other():
    found = audit(Mixing().double(), a_batch("M.M", "M.M"), media_token_id=MEDIA)
    across = [leak for leak in found.leaks if leak.row != leak.medium.row]
    assert len(across) == 4
    assert "moves positions 0-2 of row 1" in str(found)


def test_masked_media_and_media_without_a_place_must_move_nothing():
    mask = torch.tensor([[True, False], [True, True]])
    batch = a_batch("M.M..", "M....", media_mask=mask)
    assert audit(Reader().double(), batch, media_token_id=MEDIA).passed
    all_media = Reader(lambda times, count: torch.ones(len(times), count))
    found = audit(all_media.double(), batch, media_token_id=MEDIA)
    assert (1, 1) in {(leak.medium.row, leak.medium.index) for leak in found.leaks}
    assert "medium 1 of row 1, without a place in the text, moves" in str(found)


def test_packed_documents_must_not_move_each_other():
    packed = a_batch("M..M..", position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    found = audit(Reader().double(), packed, media_token_id=MEDIA)
    assert [(leak.medium.index, leak.positions) for leak in found.leaks] == [(0, (3, 4, 5))]


def test_padding_is_not_judged():
    batch = a_batch("pM.", num_media=1)
    everything = Reader(lambda times, count: torch.ones(len(times), count)).double()
    assert audit(everything, batch, media_token_id=MEDIA).passed


def test_the_model_is_left_as_it_was_and_noise_can_be_drawn_again():
    model, batch = Reader().double(), a_batch("..M..M.")
    model.train()
    before = {name: value.clone() for name, value in batch.items()}
    first, second = (
        audit(model, batch, media_token_id=MEDIA, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert model.training
    assert torch.equal(first.change, second.change)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


class Restless(Reader):
    """Differs from run to run by up to 1e-3."""

    def forward(self, input_ids: Tensor, media: Tensor, **rest: Tensor) -> Tensor:
        logits = super().forward(input_ids, media, **rest)
        return logits + torch.rand(()) * 1e-3


def test_what_equal_runs_differ_by_counts_as_no_change():
    found = audit(Restless().double(), a_batch("..M..M."), media_token_id=MEDIA, tolerance=1e-3)
    assert 1e-3 <= found.threshold < 2e-3
    assert found.passed


def test_a_change_to_nan_is_a_change():
    nan = Reader(lambda times, count: torch.zeros(len(times), count))
    nan.forward = lambda input_ids, media, **_: torch.log(media.mean((1, 2, 3)) - 5)[:, None, None].expand(1, 3, 2)
    batch = a_batch("M..", num_media=1)
    batch["media"] = torch.full_like(batch["media"], 9.0)
    found = audit(nan, batch, media_token_id=MEDIA, generator=torch.Generator().manual_seed(0))
    assert found.change.max() > 0


def test_the_picture_of_an_audit_is_a_routing():
    found = audit(Reader().double(), a_batch("..M..M.", "M.....p"), media_token_id=MEDIA)
    routing = found.routing()
    assert routing.weights.shape == (2, 1, 2, 7)
    assert routing.carriers == "media"
    assert routing.weights.amax() == 1
    assert (routing.weights[0, 0, 1, :5] == 0).all()
    assert (routing.weights[1, 0, 1] == 0).all()
    assert (routing.weights[1, 0, :, 6] == 0).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"media": None}, {}, "batch: expected input_ids and media under 'media' or 'pixel_values'"),
        ({}, {"media": "images"}, "media under 'images'"),
        ({}, {"media_token_id": None}, "Give it, or media_locations"),
        ({}, {"media_token_id": 77}, "expected a media token 77 in its text, got none"),
        ({}, {"tokens_per_medium": 3}, "a divisor of the 2 media tokens of row 0, got 3"),
        ({}, {"media_axis": 2}, "media_axis"),
        ({"media": torch.randn(3, 2, 4)}, {}, "say media_axis=0"),
        ({"media": torch.randn(3, 4)}, {"media_axis": 0}, "an axis 0 that 2 media share evenly"),
    ],
)
def test_bad_input_is_explained(change, options, message):
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        audit(Reader(), {**a_batch("..M..M."), **change}, **{"media_token_id": MEDIA, **options})


def test_media_have_to_be_numbers_that_can_be_changed_a_little():
    with pytest.raises(InvalidType, match="a floating-point tensor"):
        audit(Reader(), {**a_batch("M.M"), "media": torch.ones(1, 2, 3)}, media_token_id=MEDIA, media="input_ids")


def test_logits_have_to_be_of_the_text():
    class Short(Reader):
        def forward(self, input_ids: Tensor, media: Tensor, **rest: Tensor) -> Tensor:
            return super().forward(input_ids, media, **rest)[:, 1:]

    with pytest.raises(InvalidArgument, match="expected logits"):
        audit(Short().double(), a_batch("M.M"), media_token_id=MEDIA)


def a_tiny_mllama() -> nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 16, "vision_output_dim": 32, "image_size": 8, "patch_size": 4, "max_num_tiles": 1,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "pad_token_id": 0,
        "num_key_value_heads": 1, "intermediate_size": 32, "cross_attention_layers": [1, 3], "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "cross_attn" in name and name.endswith("gate"):
            nn.init.ones_(parameter)
    return model


def test_it_finds_the_leak_of_mllama():
    """huggingface/transformers#39379: text before the first image reads the mean of all images."""
    ids = torch.randint(3, 60, (1, 10))
    ids[0, [3, 7]] = 63
    mask = torch.zeros(1, 10, 2, 1, dtype=torch.long)
    mask[0, 3:7, 0], mask[0, 7:, 1] = 1, 1
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 2, 1, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(1, 2, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 2, 1, dtype=torch.long),
        "cross_attention_mask": mask,
    }
    found = audit(a_tiny_mllama(), batch)
    assert {(0, 1, 2), (0, 1, 2, 3, 4, 5, 6)} == {leak.positions for leak in found.leaks}
    assert not found.blind


TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def images_at(*rows: Sequence[int], length: int = 14, token: int = 63, **more: Any) -> dict[str, Any]:
    """A batch with the tokens of images at these positions."""
    ids = torch.randint(3, 57, (len(rows), length), generator=torch.Generator().manual_seed(3))
    for row, positions in enumerate(rows):
        ids[row, list(positions)] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def a_tiny_llava(text: PreTrainedConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text or LlamaConfig(**TEXT), image_token_id=63
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


TWO = [*range(2, 6), *range(8, 12)]


@pytest.mark.parametrize("options", [{}, {"tokens_per_medium": 4, "media_axis": 0}], ids=str)
def test_llava_has_no_leak(options: dict[str, int]):
    """Its images stand among the text, four tokens each, those of both rows one after another."""
    batch = images_at(TWO, range(5, 9), pixel_values=torch.randn(3, 3, 8, 8))
    found = audit(a_tiny_llava(), batch, **options)
    assert found.passed, str(found)
    assert [(medium.row, medium.index, medium.position) for medium in found.media] == [(0, 0, 2), (0, 1, 8), (1, 0, 5)]


def test_one_image_of_llava_is_not_three():
    """`[1, 3, H, W]` could be three media of one row."""
    found = audit(a_tiny_llava(), images_at(range(2, 6), pixel_values=torch.randn(1, 3, 8, 8)))
    assert found.passed, str(found)
    assert [medium.position for medium in found.media] == [2]
    together = audit(a_tiny_llava(), images_at(range(2, 10), pixel_values=torch.randn(2, 3, 8, 8)))
    assert [medium.position for medium in together.media] == [2, 6]


def test_what_experts_round_otherwise_is_no_leak():
    batch = images_at(TWO, range(5, 9), length=40, pixel_values=torch.randn(3, 3, 8, 8))
    model = a_tiny_llava(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))
    found = audit(model, batch)
    assert found.verdict == "passes", str(found)
    assert found.threshold < 1e-5


def test_what_leaks_is_a_leak_beside_experts_that_round():
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = a_tiny_llava(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))
            self.config = self.inner.config

        def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
            return self.inner(pixel_values=pixel_values, **kwargs).logits + 1e-3 * pixel_values.mean()

    batch = images_at(TWO, range(5, 9), length=40, pixel_values=torch.randn(3, 3, 8, 8))
    assert audit(Leaking(), batch).verdict == "leaks"


def test_text_out_of_reach_of_a_sliding_window_is_not_blind():
    model = a_tiny_llava(MistralConfig(**TEXT, sliding_window=4))
    found = audit(model, images_at(range(3, 7), length=30, pixel_values=torch.randn(1, 3, 8, 8)))
    assert found.verdict == "passes", str(found)
    assert (found.change[0, 0, 20:] == 0).all()
    assert not found.within_reach[0, 0, 20:].any()


def test_patches_of_images_of_unequal_size_are_told_by_their_grids():
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=63,
        vision_start_token_id=62, vision_end_token_id=61, video_token_id=60,
    )  # fmt: skip
    grids = torch.tensor([[1, 2, 4], [1, 4, 4]])
    batch = images_at((2, 3, 9, 10, 11, 12), length=20, pixel_values=torch.randn(24, 12), image_grid_thw=grids)
    batch["input_ids"][0, [1, 8]], batch["input_ids"][0, [4, 13]] = 62, 61
    batch["mm_token_type_ids"] = (batch["input_ids"] == 63).int()
    found = audit(Qwen2VLForConditionalGeneration(config), batch)
    assert found.verdict == "passes", str(found)
    assert [(one.position, one.where) for one in found.media] == [(2, (slice(0, 8),)), (9, (slice(8, 24),))]
    with pytest.raises(InvalidArgument, match="grid_thw: expected 24 patches for 6 media tokens"):
        audit(Qwen2VLForConditionalGeneration(config), {**batch, "image_grid_thw": grids + 1})


def test_padding_images_of_idefics_stay_padding():
    """It tells them by their zeros, and noise in their place would be images without a place."""
    perceiver = {
        "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
        "num_key_value_heads": 1, "hidden_size": 16,
    }  # fmt: skip
    config = Idefics2Config(
        vision_config=VISION, perceiver_config=perceiver, text_config={**TEXT, "model_type": "mistral"},
        image_token_id=63,
    )  # fmt: skip
    images = torch.randn(2, 2, 3, 8, 8)
    images[1, 1] = 0
    found = audit(Idefics2ForConditionalGeneration(config), images_at((2, 3, 8, 9), (5, 6), pixel_values=images))
    assert found.verdict == "passes", str(found)
    assert [(medium.row, medium.position) for medium in found.media] == [(0, 2), (0, 8), (1, 5)]


def test_a_prefix_that_reads_in_both_directions_is_no_leak_and_is_declared():
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    vision = {**VISION, "model_type": "siglip_vision_model", "num_image_tokens": 4}
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=63, projection_dim=16, hidden_size=16, vocab_size=64
    )
    model = PaliGemmaForConditionalGeneration(config)
    batch = images_at(range(2, 6), pixel_values=torch.randn(1, 3, 8, 8))
    prefix = torch.arange(14)[None] < 9
    batch |= {"token_type_ids": (~prefix).long(), "labels": batch["input_ids"]}
    silent = audit(model, batch)
    assert silent.verdict.startswith("cannot tell, because the language model itself reads text that follows")
    assert not silent.leaks
    assert "cannot tell" in str(silent)
    assert audit(model, batch, prefix=prefix).verdict == "passes"


def test_fuyu_has_its_patches_at_their_indices():
    config = FuyuConfig(
        **TEXT, patch_size=2, num_channels=3, text_config={**TEXT, "model_type": "persimmon"}, image_token_id=63
    )
    batch = images_at((2, 3, 5, 6), (4, 5, 7, 8), image_patches=torch.randn(2, 4, 12))
    batch["image_patches_indices"] = torch.where(batch["input_ids"] == 63, 0, -1)
    found = audit(FuyuForCausalLM(config), batch)
    assert found.verdict == "passes", str(found)
    assert [(medium.row, medium.position) for medium in found.media] == [(0, 2), (1, 4)]


def test_a_model_that_fails_on_what_is_changed_accuses_nobody():
    class Fragile(Reader):
        def forward(self, input_ids: Tensor, media: Tensor, **rest: Tensor) -> Tensor:
            if not hasattr(self, "first"):
                self.first = media.clone()
            if not torch.equal(media, self.first):
                raise RuntimeError("another number of images")
            return super().forward(input_ids, media, **rest)

    found = audit(Fragile().double(), a_batch("M.M"), media_token_id=MEDIA)
    assert found.verdict.startswith("cannot tell, because the model raises RuntimeError with medium 0 of row 0 changed")
    assert not found.leaks
    assert not found.blind


POLICIES = (LastMedium(), LastMedia(2), ConsecutiveGroup(), AllPrevious())


@pytest.mark.parametrize("attend", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_flamingo_passes_whatever_its_text_may_see(attend):
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.adapters.flamingo import Flamingo

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    language_model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes)).double()
    model = Flamingo(language_model, media_dim=4, every=1, attend=attend, media_token_id=MEDIA, resampler={"depth": 1})
    assert "Are gates still closed?" in str(audit(model, a_batch("..M..M.")))
    for block in model.blocks:
        nn.init.ones_(block.attn_gate)
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    batch = a_batch(".MM..M..pp", "pp..M..M..", "..........", num_media=3, media_mask=mask)
    found = audit(model, batch)
    assert found.passed, str(found)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_that_no_change_exceeds_is_refused(tolerance):
    with pytest.raises(InvalidArgument, match="tolerance: expected a finite number"):
        audit(Reader().double(), a_batch("..M..M."), media_token_id=MEDIA, tolerance=tolerance)


class _Padded(nn.Module):
    """A reader that leaks; some numbers at padding, or everywhere, are none."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, input_ids: Tensor, media: Tensor, **_: object) -> Tensor:
        logits = media.mean((1, 2, 3))[:, None, None].expand(*input_ids.shape, 3).clone()
        logits[..., 0] = -torch.inf  # a token that is never written
        return logits.masked_fill((input_ids == 0)[..., None] | (self.where == "everywhere"), torch.nan)


def test_numbers_that_are_none_hide_no_leak():
    found = audit(_Padded("at padding"), a_batch("pp..M.."), media_token_id=MEDIA)
    assert [leak.positions for leak in found.leaks if leak.medium.index == 0] == [(2, 3)]
    with pytest.raises(InvalidArgument, match="model: expected logits that are numbers at real text, got NaN"):
        audit(_Padded("everywhere"), a_batch("pp..M.."), media_token_id=MEDIA)
