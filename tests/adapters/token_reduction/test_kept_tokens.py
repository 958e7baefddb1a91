"""What follows the vision tower reads kept tokens alone: equal to embeddings that are put together by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.adapters.token_reduction.kept_tokens import downsample
from narrows.errors import InvalidArgument, InvalidType
from tests.support import assert_close

transformers = pytest.importorskip("transformers")
IMAGE, PADDING = 63, 0
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES = {"image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": PADDING,
    "initializer_range": 0.3,
}


def llava(**options: Any) -> Any:
    torch.manual_seed(0)
    tower, text = transformers.CLIPVisionConfig(**TOWER, **SIZES), transformers.LlamaConfig(**TEXT)
    options = {"vision_config": tower, "text_config": text, "image_token_id": IMAGE, **options}
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**options)).eval()
    with torch.no_grad():  # sharp attention, so that adaptive sampling keeps other numbers of tokens
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(2000)
    return model


def prompts(left: bool = True, grid: int = 16) -> dict[str, Tensor]:
    """Three texts: of two images, of one and padding, of one between texts."""
    generator = torch.Generator().manual_seed(1)
    length = 8 + 2 * grid
    ids = torch.randint(3, 60, (3, length), generator=generator)
    starts = {0: (2, 4 + grid), 1: (4,), 2: (10,)}
    for row, of_row in starts.items():
        for start in of_row:
            ids[row, start : start + grid] = IMAGE
    mask = torch.ones_like(ids)
    (mask[1, :3] if left else mask[1, -3:]).zero_()
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    return {"input_ids": ids.where(mask.bool(), PADDING), "attention_mask": mask, "pixel_values": pixels}


def by_hand(model: Any, inputs: dict[str, Tensor], features: list[Tensor], kept: list[list[int]]) -> list[Tensor]:
    """The last logits of each text alone: embeddings one by one, dropped ones never there, absolute positions."""
    images, answers = iter(zip(features, kept, strict=True)), []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        embeddings, positions, place, seen = [], [], 0, 0
        feature, chosen = torch.empty(0), []
        for token, real in zip(ids.tolist(), mask.tolist(), strict=True):
            if not real:
                continue
            if token != IMAGE:
                embeddings.append(model.get_input_embeddings().weight[token])
                positions.append(place)
                seen = 0
            else:
                if seen % 16 == 0:
                    feature, chosen = next(images)
                if seen % 16 in chosen:
                    embeddings.append(feature[seen % 16])
                    positions.append(place)
                seen += 1
            place += 1
        hidden = model.model.language_model(
            inputs_embeds=torch.stack(embeddings)[None], position_ids=torch.tensor([positions])
        )[0]
        answers.append(model.lm_head(hidden[0]))
    return answers


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("method", list(METHODS))
def test_the_language_model_gives_what_embeddings_by_hand_give(method: str, left: bool) -> None:
    model, inputs = llava(), prompts(left)
    with reduce_tokens(model, method=method, budget=0.5) as reduction:
        features = list(model.get_image_features(inputs["pixel_values"]).pooler_output)
        kept = reduction.kept_tokens(**inputs)
        # LLaVA reads the output of the last block but one.
        counts = [len(ids) for ids in kept.kept]
        expected_counts = [count for count in reduction.schedule[:-1] if count is not None][-1]
        assert max(counts) <= round(16 * expected_counts) < 16
        for feature, ids, alone in zip(features, kept.kept, kept.features, strict=True):
            assert_close(alone, feature[ids])
        logits = model(**kept.inputs).logits
        expected = by_hand(model, inputs, features, [ids.tolist() for ids in kept.kept])
    for row, (mask, one) in enumerate(zip(kept.prompt["attention_mask"], expected, strict=True)):
        assert_close(logits[row, mask.bool()], one)


SEES = {"image_token_id": IMAGE, "text_config": dict(TEXT)}
VISION = {**TOWER, **SIZES}
PINPOINTS = {"image_grid_pinpoints": [[32, 32], [32, 64]]}


def seeing(kind: str, config: str = "", **options: Any) -> Any:
    """A small vision-language model by the name of its class, without "ForConditionalGeneration"."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{config or kind}Config")(**{**SEES, **options})
    return getattr(transformers, f"{kind}ForConditionalGeneration")(made).eval()


def paligemma() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=32)
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    return seeing("PaliGemma", vision_config=vision, text_config=text, projection_dim=32, hidden_size=32)


ONE_BY_ONE = {
    "llava of siglip": lambda: llava(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "llava of dinov2": lambda: seeing(
        "Llava",
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.Dinov2Config(
            hidden_size=32, mlp_ratio=2, num_hidden_layers=4, num_attention_heads=4, **SIZES
        ),
    ),
    "vip-llava": lambda: seeing(
        "VipLlava",
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        vision_feature_layer=[-2, -3],
    ),
    "paligemma": paligemma,
}


def seen(model: Any) -> dict[str, Tensor]:
    """Two texts with an image each, as the model takes them."""
    ids = torch.tensor([[5, 6, *[IMAGE] * 16, 7, 8], [9, *[IMAGE] * 16, 10, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
    return inputs | ({"token_type_ids": (ids == IMAGE).long()} if "Gemma" in type(model).__name__ else {})


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_language_models_that_read_one_feature_for_each_token(name: str) -> None:
    model = ONE_BY_ONE[name]()
    inputs = seen(model)
    with reduce_tokens(model, method="topk", budget={1: 0.5}) as reduction:
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        kept = reduction.kept_tokens(**inputs)
        logits = model(**kept.inputs).logits
        embeddings = model.get_input_embeddings()(kept.prompt["input_ids"])
    assert [len(ids) for ids in kept.kept] == [8, 8]
    places = kept.prompt["input_ids"] == IMAGE
    embeddings[places] = torch.cat([feature[ids] for feature, ids in zip(features, kept.kept, strict=True)])
    given = {argument: value for argument, value in kept.prompt.items() if argument != "input_ids"}
    assert_close(logits, model(inputs_embeds=embeddings, **given).logits)
    assert kept.prompt["position_ids"][:, -1].tolist() == [19, 19]


@torch.no_grad()
def test_features_in_one_tensor_need_as_many_of_every_image() -> None:
    model, message = ONE_BY_ONE["vip-llava"](), "method: expected as many tokens of every image, as VipLlavaFor"
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.mul_(2000)
    inputs = seen(model)
    with reduce_tokens(model, method="ats", budget={1: 10}) as reduction, pytest.raises(InvalidArgument, match=message):
        reduction.kept_tokens(**inputs)


OTHERWISE = {
    "LlavaNext": {"vision_config": transformers.CLIPVisionConfig(**VISION), **PINPOINTS},
    "LlavaOnevision": {"vision_config": transformers.SiglipVisionConfig(**VISION), **PINPOINTS},
    "Idefics3": {"vision_config": dict(VISION), "scale_factor": 2},
    "Gemma3": {"vision_config": transformers.SiglipVisionConfig(**VISION), "mm_tokens_per_image": 4},
    "AyaVision": {"vision_config": transformers.SiglipVisionConfig(**VISION), "downsample_factor": 2},
    "InternVL": {
        "vision_config": transformers.InternVLVisionConfig(**{**VISION, "image_size": [32, 32], "patch_size": [8, 8]}),
        "downsample_ratio": 0.5,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERWISE)
def test_language_models_that_read_features_otherwise_are_refused(kind: str) -> None:
    texts = {"Gemma3": "Gemma3TextConfig", "AyaVision": "CohereConfig", "InternVL": "Qwen2Config"}
    text = getattr(transformers, texts.get(kind, "LlamaConfig"))(**TEXT)
    model = seeing(kind, **OTHERWISE[kind], text_config=text)
    inputs = seen(model)
    if "image_grid_pinpoints" in OTHERWISE[kind]:
        inputs |= {"pixel_values": torch.randn(2, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32], [32, 32]])}
    if kind == "Idefics3":
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    with (
        reduce_tokens(model, method="topk", budget={1: 0.5}) as reduction,
        pytest.raises(InvalidType, match="model: expected a language model that reads one feature for each token"),
    ):
        reduction.kept_tokens(**inputs)


@torch.no_grad()
def test_images_may_keep_different_numbers_of_tokens() -> None:
    model, inputs = llava(), prompts()
    with reduce_tokens(model, method="ats", budget={1: 10}) as reduction:
        kept = reduction.kept_tokens(**inputs)
    assert len({len(ids) for ids in kept.kept}) > 1
    lengths = kept.prompt["attention_mask"].sum(1).tolist()
    dropped = [16 - len(ids) for ids in kept.kept]
    assert lengths == [40 - dropped[0] - dropped[1], 37 - dropped[2], 40 - dropped[3]]


@torch.no_grad()
def test_every_token_kept_is_the_model_untouched() -> None:
    model, inputs = llava(vision_feature_select_strategy="full"), prompts(grid=17)
    expected = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)).logits
    with reduce_tokens(model, method="topk", budget=1.0) as reduction:
        assert_close(model(**reduction.kept_tokens(**inputs).inputs).logits, expected)
    with (
        reduce_tokens(model, method="topk", budget={3: 0.5}) as reduction,
        pytest.raises(InvalidArgument, match="expected blocks that reduce up to block 2"),
    ):
        reduction.kept_tokens(**inputs)
    with reduce_tokens(model, method="topk", budget=15) as reduction:
        shorter = reduction.kept_tokens(**inputs)
        assert all(ids[0] == 0 and len(ids) == 16 for ids in shorter.kept)  # the class token is read, and stays
        assert model(**shorter.inputs).logits.shape[1] == expected.shape[1] - 1


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_goes_on_at_the_next_position(beams: int) -> None:
    model, inputs = llava(), prompts()
    model.generation_config.eos_token_id = None
    with reduce_tokens(model, method="topk", budget=0.5) as reduction:
        kept = reduction.kept_tokens(**inputs)
        features = list(model.get_image_features(inputs["pixel_values"]).pooler_output)
        options = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
        sequences = model.generate(**kept.inputs, **options)
        assert torch.equal(sequences, model.generate(**kept.inputs, **options))
        if beams > 1:  # without a cache the same
            assert torch.equal(sequences, model.generate(**kept.inputs, **options, use_cache=False))
            return
        chosen = [ids.tolist() for ids in kept.kept]
        for _ in range(3):  # the whole text again for every token
            logits = by_hand(model, inputs, features, chosen)
            following = torch.stack([one[-1].argmax() for one in logits])[:, None]
            inputs["input_ids"] = torch.cat((inputs["input_ids"], following), 1)
            inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(following)), 1)
    assert torch.equal(sequences[:, -3:], inputs["input_ids"][:, -3:])


@torch.no_grad()
def test_a_second_turn_reads_the_cache_of_the_first() -> None:
    model, inputs = llava(), prompts()
    model.generation_config.eos_token_id = None
    question = torch.tensor([[5, 6, 7]]).expand(3, -1)
    with reduce_tokens(model, method="tome", budget=0.5) as reduction:
        kept = reduction.kept_tokens(**inputs)
        features = list(model.get_image_features(inputs["pixel_values"]).pooler_output)
        first = model.generate(**kept.inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        turn = kept.next_turn(torch.cat((first.sequences, question), 1))
        second = model.generate(**turn, past_key_values=first.past_key_values, max_new_tokens=1, do_sample=False)
        said = torch.cat((first.sequences[:, -2:], question), 1)
        whole = {
            "input_ids": torch.cat((inputs["input_ids"], said), 1),
            "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(said)), 1),
        }
        expected = by_hand(model, whole, features, [ids.tolist() for ids in kept.kept])
    assert second[:, -1].tolist() == [one[-1].argmax().item() for one in expected]
    with pytest.raises(InvalidArgument, match="sequences: expected the ids that generate returned"):
        kept.next_turn(second + 1)


def test_labels_and_given_positions_stay_with_their_tokens() -> None:
    model, inputs = llava(), prompts(left=False)
    ids = inputs["input_ids"]
    given = {"labels": torch.arange(ids.numel()).view_as(ids) % 60, "position_ids": torch.arange(40).expand(3, -1) + 5}
    with reduce_tokens(model, method="topk", budget=0.5) as reduction:
        kept = reduction.kept_tokens(**inputs, **given)
        prompt = kept.prompt
        model(**kept.inputs).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    real = prompt["attention_mask"].bool()
    assert (prompt["labels"][~real] == -100).all()
    rows = torch.arange(3)[:, None].expand_as(real)[real]
    at = prompt["position_ids"][real] - 5
    assert torch.equal(prompt["labels"][real], given["labels"][rows, at])
    assert torch.equal(prompt["input_ids"][real], ids[rows, at])


@torch.no_grad()
def test_the_average_of_the_grid_is_a_smaller_image() -> None:
    model, inputs = llava(), prompts()
    smaller = downsample(model, 0.25, inputs)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    for feature, alone in zip(features, smaller.features, strict=True):
        expected = [feature.view(4, 4, -1)[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 2) for x in (0, 2)]
        assert_close(alone, torch.stack(expected))
    assert smaller.prompt["position_ids"].amax(1).tolist() == [40 - 25, 40 - 3 - 13, 40 - 13]
    in_place = downsample(model, 0.25, inputs, keep_positions=True)
    assert [ids.tolist() for ids in in_place.kept] == [[5, 7, 13, 15]] * 4
    expected = by_hand(
        model,
        inputs,
        [
            torch.zeros(16, 32).index_copy(0, ids, one)
            for ids, one in zip(in_place.kept, in_place.features, strict=True)
        ],
        [[5, 7, 13, 15]] * 4,
    )
    logits = model(**in_place.inputs).logits
    for row, (mask, one) in enumerate(zip(in_place.prompt["attention_mask"], expected, strict=True)):
        assert_close(logits[row, mask.bool()], one)


class Tower(nn.Module):
    """A model without a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = llava().model.vision_tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The class token."""
        return self.tower(pixel_values).pooler_output


def test_what_cannot_be_shortened_is_refused() -> None:
    model, inputs = llava(), prompts()
    with reduce_tokens(model, method="topk", budget=0.5) as reduction:
        with pytest.raises(InvalidArgument, match="pixel_values: expected a tensor, got NoneType"):
            reduction.kept_tokens(input_ids=inputs["input_ids"])
        with pytest.raises(InvalidArgument, match="input_ids: expected one placeholder for each feature"):
            reduction.kept_tokens(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})
        with pytest.raises(InvalidArgument, match="past_key_values: expected none"):
            reduction.kept_tokens(**inputs, past_key_values=1)
    with pytest.raises(InvalidArgument, match="expected a model that runs reduced"):
        reduction.kept_tokens(**inputs)
    with (
        reduce_tokens(Tower(), method="topk", budget=0.5) as reduction,
        pytest.raises(InvalidType, match="expected reduce_tokens of a vision-language model"),
    ):
        reduction.kept_tokens(**inputs)
