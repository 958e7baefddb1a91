"""What is particular to towers recognised by their make, and to those inside larger models."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from narrows.adapters.token_reduction import reduce_tokens
from narrows.adapters.token_reduction.hosts import recognise
from narrows.errors import InvalidArgument, InvalidType
from tests.adapters.token_reduction import layouts
from tests.adapters.token_reduction.families import FAMILIES, awake
from tests.adapters.token_reduction.hosts import HOSTS, PATCH, SIDE, config, inputs
from tests.adapters.token_reduction.test_every_host import kept, run
from tests.support import assert_close

POOLING = (
    "open_clip, averaging",
    "open_clip, attention pooling",
    "hub linear classifier",
    "timm beit",
    "timm naflex",
    "timm naflex, rotary",
    "transformers beit",
    "transformers data2vec",
    "transformers i-jepa",
    "transformers metaclip 2 classifier",
    "transformers videomae",
)


def pooling(name: str) -> nn.Module:
    if name == "hub linear classifier":
        return awake(layouts._LinearClassifierWrapper())
    if name == "transformers metaclip 2 classifier":
        whole = transformers.MetaClip2Config(vision_config=config("MetaClip2VisionConfig").to_dict())
        return awake(transformers.MetaClip2ForImageClassification(whole))
    return HOSTS[name]()


@torch.no_grad()
@pytest.mark.parametrize("name", POOLING)
def test_what_pools_the_grid_sees_kept_tokens_only(name: str) -> None:
    """Whatever dropped tokens hold after the last block, the first result does not change."""
    model = pooling(name)
    given = inputs(model, 2)
    with reduce_tokens(model, method="topk", budget=0.5) as reduction:
        before = run(model, given)[0]
        gone = ~kept(reduction)[-1]

        def spoil(_: nn.Module, __: Any, output: Any) -> None:
            grid = output[0] if isinstance(output, tuple) else output
            assert grid.shape[:2] == gone.shape
            grid[gone] += 100.0

        handle = reduction.host.blocks[-1].register_forward_hook(spoil)
        after = run(model, given)[0]
        handle.remove()
        assert gone.any()
        assert_close(after, before, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip", "hub dinov2", "hub dinov3", "timm beit", "timm naflex"])
def test_intermediate_features_are_on_the_grid(name: str) -> None:
    model: Any = HOSTS[name]()

    def states() -> list[Tensor]:
        images = inputs(model, 2)["x"]
        if hasattr(model, "get_intermediate_layers"):
            return list(model.get_intermediate_layers(images, 4))
        found = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        return found["image_intermediates"] if isinstance(found, dict) else found

    untouched = states()
    with reduce_tokens(model, method="topk", budget={2: 0.5}) as reduction:
        reduced = states()
        carried = kept(reduction)[0][:, reduction.host.prefix :]
    assert [state.shape for state in reduced] == [state.shape for state in untouched]
    assert all(map(torch.equal, reduced[:2], untouched[:2]))
    for state in reduced[2:]:
        assert torch.equal(state[~carried], reduced[1][~carried])
        assert (state[carried] != reduced[1][carried]).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["openai clip", "open_clip", "torchvision", "hub dinov2"])
def test_towers_that_read_the_class_token_alone_never_make_the_grid(name: str) -> None:
    model: Any = HOSTS[name]()
    given, widths = inputs(model, 2), []
    with reduce_tokens(model, method="topk", budget=0.5) as reduction:
        dim = 0 if name == "openai clip" else 1
        last = reduction.host.blocks[-1]
        handle = last.register_forward_hook(lambda _, __, output: widths.append(output.shape[dim]))
        run(model, given)
        assert widths == [reduction.host.prefix + 8]
        if hasattr(model, "forward_features"):
            assert model.forward_features(**given)["x_prenorm"].shape[1] == 19
            assert model(**given, is_training=True)["x_norm_patchtokens"].shape[1] == 16
        handle.remove()


@torch.no_grad()
def test_dinov2_takes_images_of_any_size_and_refuses_lists_of_crops() -> None:
    for name in ("hub dinov2", "hub dinov3"):
        model = HOSTS[name]()
        with reduce_tokens(model, method="topk", budget=0.25) as reduction:
            model(torch.randn(2, 3, 48, 32))
            assert reduction.routing[0].grid == (6, 4)
            assert reduction.routing[0].num_carriers == 3 + 6
    block, tokens = model.blocks[1], torch.randn(1, 19, 32)  # pyright: ignore
    with reduce_tokens(model, budget={1: 0.5}), pytest.raises(InvalidArgument, match="expected one batch of images"):
        block([tokens, tokens], [None, None])


def test_attention_with_keys_of_its_own_is_refused_by_name() -> None:
    model: Any = HOSTS["torchvision"]()
    model.encoder.layers[2].self_attention = nn.MultiheadAttention(32, 2, add_bias_kv=True, batch_first=True)
    with pytest.raises(InvalidType, match=r"block 2: expected .*EncoderBlock with MultiheadAttention"):
        reduce_tokens(model, budget={2: 0.5})


VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": SIDE, "patch_size": PATCH}
TEXT = {**VISION, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 64}
WRITER = {"model_type": "llama", **TEXT, "pad_token_id": 0}
READER = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def of_transformers(kind: str, places: int, of: int = 1, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    whole = getattr(transformers, f"{kind}Config")(**settings)
    task = "ForConditionalGeneration" if hasattr(transformers, f"{kind}ForConditionalGeneration") else "Model"
    model = awake(getattr(transformers, kind + task)(whole))
    words = torch.tensor([[1, *[63] * places, 5, 2]])
    return model, {"input_ids": words, "pixel_values": image(*(1,) * of)}


def of_tiles(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    seen = {"vision_config": {**VISION, **IMAGES}, "scale_factor": 2, "image_token_id": 63}
    return of_transformers(kind, 4, 2, text_config=WRITER, **seen)


def of_open_clip() -> tuple[nn.Module, dict[str, Any]]:
    seen = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": 4, "head_width": 16}
    read = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = awake(open_clip.model.CLIP(16, open_clip.CLIPVisionCfg(**seen), open_clip.CLIPTextCfg(**read)))
    return model, {"image": image(1), "text": torch.randint(64, (1, 8))}


WHOLE: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "openai clip": lambda: (awake(layouts.CLIP()), {"image": image(1), "text": torch.tensor([[1, 2]])}),
    "open_clip": of_open_clip,
    "llava": lambda: of_transformers(
        "Llava",
        16,
        vision_config={"model_type": "clip_vision_model", **VISION, **IMAGES},
        text_config=WRITER,
        image_token_index=63,
    ),
    "internvl": lambda: of_transformers(
        "InternVL",
        4,
        vision_config=config("InternVLVisionConfig").to_dict(),
        text_config={**WRITER, "model_type": "qwen2"},
        image_token_id=63,
    ),
    "idefics3": lambda: of_tiles("Idefics3"),
    "smolvlm": lambda: of_tiles("SmolVLM"),
    "blip": lambda: of_transformers(
        "Blip",
        0,
        vision_config={**VISION, **IMAGES},
        text_config={**READER, "encoder_hidden_size": 32, "sep_token_id": 3},
    ),
    "altclip": lambda: of_transformers(
        "AltCLIP", 0, vision_config={**VISION, **IMAGES}, text_config={**READER, "project_dim": 16}, projection_dim=16
    ),
    "chinese clip": lambda: of_transformers(
        "ChineseCLIP", 0, vision_config={**VISION, **IMAGES}, text_config=READER, projection_dim=16
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_a_tower_in_a_larger_model_is_found_and_tested_by_the_call_of_the_whole(name: str) -> None:
    model, call = WHOLE[name]()
    before = run(model, call)
    for method in ("topk", "tome"):
        with reduce_tokens(model, method=method, budget=0.5, example=call) as reduction:
            reduced = run(model, call)
            assert [tensor.shape for tensor in reduced] == [tensor.shape for tensor in before]
            assert not torch.equal(reduced[0], before[0])
            assert reduction.error is not None
            assert reduction.routing[0].name in dict(model.named_modules())
    assert all(map(torch.equal, run(model, call), before))


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers idefics3", "timm naflex, rotary", "timm naflex"])
def test_images_of_other_grids_in_one_batch_do_not_see_their_padding(name: str) -> None:
    """And each gets what it gets alone."""
    model = HOSTS[name]()
    if name == "transformers idefics3":
        whole = image(2)
        real = torch.ones(2, SIDE // PATCH, SIDE // PATCH, dtype=torch.bool)
        real[1, 3:] = False
        given = {"pixel_values": whole, "patch_attention_mask": real}
        padding = {**given, "pixel_values": whole.clone()}
        padding["pixel_values"][1, :, 3 * PATCH :] = 5.0
        real = real.flatten(1)
    else:
        patches = torch.randn(2, 16, 3 * PATCH**2, generator=torch.Generator().manual_seed(1))
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
        real = torch.ones(2, 16, dtype=torch.bool)
        real[1, 12:] = False
        places = places.repeat(2, 1, 1) * real[..., None]
        given = {"x": patches, "patch_coord": places, "patch_valid": real}
        padding = {**given, "x": patches.clone()}
        padding["x"][1, 12:] = 5.0
    for method in ("topk", "ats"):
        with reduce_tokens(model, method=method, budget=6, execution="static") as reduction:
            first, positions = run(model, given)[0], kept(reduction)
            other = run(model, padding)[0]
            if first.ndim == 3:
                first, other = first[real], other[real]
            assert_close(other, first, 1e-5)
            assert all(map(torch.equal, kept(reduction), positions))
            assert not positions[-1][1, reduction.host.prefix :][~real[1]].any()


def packed(kind: str, tower: str, **sizes: Any) -> nn.Module:
    """A vision-language model whose tower reads the patches of all images in one row."""
    vision = getattr(transformers, f"{tower}VisionConfig")(**sizes)
    whole = getattr(transformers, f"{kind}Config")(vision_config=vision.to_dict(), text_config=WRITER)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(whole)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "windows"),
    "timm hiera": (lambda: timm.create_model("hiera_tiny_224"), "pools tokens"),
    "timm mvit": (lambda: timm.create_model("mvitv2_tiny"), "pools tokens"),
    "timm pvt": (lambda: timm.create_model("pvt_v2_b0"), "feature maps"),
    "timm twins": (lambda: timm.create_model("twins_svt_small"), "windows"),
    "timm sam": (lambda: timm.create_model("samvit_base_patch16"), "windows"),
    "timm resnet": (lambda: timm.create_model("resnet18"), "no tokens"),
    "torchvision swin": (lambda: torchvision.models.swin_t(), "windows"),
    "torchvision mvit": (lambda: torchvision.models.video.mvit_v2_s(), "pools tokens"),
    "transformers swin": (lambda: transformers.SwinModel(transformers.SwinConfig()), "windows"),
    "transformers hiera": (lambda: transformers.HieraModel(transformers.HieraConfig()), "pools tokens"),
    "transformers segformer": (lambda: transformers.SegformerModel(transformers.SegformerConfig()), "feature maps"),
    "transformers sam": (lambda: transformers.SamVisionModel(transformers.SamVisionConfig()), "windows"),
    "llava of pixtral": (lambda: packed("Llava", "Pixtral", **VISION, **IMAGES), "into one row"),
    "mistral 3": (lambda: packed("Mistral3", "Pixtral", **VISION, **IMAGES), "into one row"),
    "qwen2-vl": (lambda: transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig()), "into one row"),
    "qwen2.5-vl": (
        lambda: transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig()),
        "into one row",
    ),
    "qwen3-vl": (lambda: transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig()), "into one row"),
    "glm 4v": (lambda: transformers.Glm4vForConditionalGeneration(transformers.Glm4vConfig()), "into one row"),
    "transformers sam 2": (lambda: transformers.Sam2VisionModel(transformers.Sam2VisionConfig()), "pools tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_is_refused_by_name_with_the_reason(name: str) -> None:
    make, why = REFUSED[name]
    with torch.device("meta"):
        model = make()
    with pytest.raises(InvalidType, match=rf"{type(model).__name__}.*{why}.*Take a plain vision transformer"):
        reduce_tokens(model)


def test_an_unknown_model_is_told_what_is_known() -> None:
    with pytest.raises(InvalidType, match=r"open_clip.*got torch.nn.modules.linear.Linear. To support another model"):
        reduce_tokens(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["transformers beit", "timm beit"])
def test_relative_positions_have_no_place_in_packed_rows(name: str) -> None:
    model = HOSTS[name]() if name in HOSTS else FAMILIES[name]()
    with pytest.raises(InvalidArgument, match=r"execution: expected 'auto' or 'static' .*relative positions"):
        reduce_tokens(model, method="ats", execution="ragged")
    assert all("forward" not in vars(module) for module in model.modules())


def test_heads_that_read_stale_tokens_are_named() -> None:
    sizes = config("VJEPA2Config", num_pooler_layers=1)
    model = awake(transformers.VJEPA2ForVideoClassification(sizes))
    with pytest.warns(UserWarning, match="VJEPA2AttentivePooler may average"):
        reduce_tokens(model, budget=0.5).remove()
    first = awake(transformers.VideoMAEForVideoClassification(config("VideoMAEConfig", use_mean_pooling=False)))
    with pytest.warns(UserWarning, match="VideoMAEForVideoClassification may average"):
        reduce_tokens(first, budget=0.5).remove()


def test_a_masked_autoencoder_is_reduced_by_the_patches_it_sees() -> None:
    model = awake(transformers.ViTMAEForPreTraining(config("ViTMAEConfig")))
    assert recognise(model).num_tokens == 8
    given = inputs(model, 2)
    with reduce_tokens(model, method="topk", budget=0.5) as reduction, torch.no_grad():
        result = model(**given)
        assert reduction.routing[0].num_carriers == 1 + 4
        assert reduction.routing[0].grid is None  # its tokens are in no order
    assert result.logits.shape == (2, 16, 3 * PATCH**2)
