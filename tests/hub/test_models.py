"""Models by name and path: what comes back, and what is said where nothing can."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import narrows
from narrows.errors import InvalidArgument, NarrowsError
from narrows.hub.models import LoadedModel, open_model, save_model
from narrows.models import create_model
from tests.hub.small_models import SHAPE, save_ours, save_timm, save_transformers


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def answer(opened: LoadedModel) -> torch.Tensor:
    """What the model gives for one prepared image."""
    assert opened.prepare is not None
    image = opened.prepare(Image.new("RGB", (50, 40), (200, 30, 30)))
    assert image.shape == (len(opened.mean), *opened.size)
    red = opened.picture(image[None])[0].mean((1, 2))
    assert torch.allclose(red * 255, torch.tensor([200.0, 30.0, 30.0]), atol=1.0), "pictures undo the normalisation"
    return opened.outputs(image[None])


def test_ours_from_a_folder_and_with_a_checkpoint(tmp_path: Path) -> None:
    opened = open_model(save_ours(tmp_path))
    assert (opened.size, opened.num_classes, opened.prepare) == ((16, 16), 2, None)
    assert not opened.module.training
    weights = {name: value + 1 for name, value in opened.module.state_dict().items()}
    save_file({f"module.{name}": value for name, value in weights.items()}, tmp_path / "other.safetensors")
    other = open_model(str(tmp_path), tmp_path / "other.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in other.module.state_dict().items())
    assert open_model("vit_mini").num_classes == 10


def test_timm_with_a_checkpoint_has_its_classes_and_its_preparation(tmp_path: Path) -> None:
    opened = open_model("timm:test_vit", save_timm(tmp_path / "weights.pth", num_classes=2))
    assert (opened.name, opened.num_classes, opened.size) == ("timm:test_vit", 2, (160, 160))
    assert answer(opened).shape == (1, 2)
    thousand = open_model("timm:test_vit", save_timm(tmp_path / "weights.pth", num_classes=1000))
    assert thousand.classes[:2] == ("n01440764", "n01443537"), "WordNet's ids, in the order of ImageNet"


def test_a_training_checkpoint_says_what_was_taken_and_changed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trained = timm.create_model("test_vit", num_classes=3).eval()
    state = {f"module._orig_mod.{name}": value for name, value in trained.state_dict().items()}
    average = {name: value + 1 for name, value in state.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "model_ema": average, "args": Namespace(model="test_vit")}, file)
    opened = open_model("timm:test_vit", file)
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(opened.outputs(images), trained(images))
    assert opened.notes == (
        "Weights are those under 'model.module._orig_mod'; checkpoint_key may name 'model_ema.module._orig_mod' too",
        "The checkpoint has 3 classes, not 1000",
    )
    averaged = open_model("timm:test_vit", file, checkpoint_key="model_ema").module.state_dict()
    assert torch.equal(averaged["head.bias"], trained.head.bias + 1)
    smaller = open_model("timm:test_vit", file, image_size=80)
    assert smaller.size == (80, 80)
    assert "Positions of a grid of 10 x 10 are interpolated to 5 x 5" in smaller.notes
    assert answer(smaller).shape == (1, 3)
    features = open_model("timm:test_vit", file, num_classes=0)
    assert (features.num_classes, answer(features).shape) == (0, (1, 64))
    with pytest.raises(
        InvalidArgument, match=r"num_classes: expected 3, as the head in .* has, or 0 for features, got 5"
    ):
        open_model("timm:test_vit", file, num_classes=5)
    with pytest.raises(
        InvalidArgument, match=r"checkpoint_key: expected where weights are in .*'model.module._orig_mod'"
    ):
        open_model("timm:test_vit", file, checkpoint_key="teacher")


def test_a_checkpoint_without_a_head_gives_features(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trained = timm.create_model("test_vit", num_classes=0).eval()
    file = tmp_path / "pretrained.pth"
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_blocks.0.weight": torch.zeros(2)}
    torch.save({"model": trained.state_dict() | decoder}, file)
    opened = open_model("timm:test_vit", file)
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(opened.outputs(images), trained(images))
    assert opened.notes == (
        "The checkpoint has no head: the model gives features",
        "Left out, since only training uses it: decoder_blocks, mask_token",
    )
    with pytest.raises(InvalidArgument, match=r"num_classes: expected none \(there is no head in the file\), or 0"):
        open_model("timm:test_vit", file, num_classes=5)
    ours = {name: value for name, value in create_model("vit_mini").state_dict().items() if "head" not in name}
    torch.save(ours, file)
    with pytest.raises(InvalidArgument, match=r"a head \(head.weight\), which a ViT does not do without, got none in"):
        open_model("vit_mini", file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg_token": torch.zeros(1, 4, 64)}, "also reg_token"),
        ({"blocks.0.ls1.gamma": torch.zeros(64)}, "also blocks.0.ls1.gamma"),
        ({"pos_embed": torch.zeros(1, 102, 64)}, r"pos_embed of shape \(1, 102, 64\) in place of \(1, 101, 64\)"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int64)}, "norm.weight of integers"),
        ({"norm.weight": torch.full((64,), torch.nan)}, "finite weights, got NaN or infinity in 'norm.weight'"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, "patch_embed.proj.weight of shape"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    change: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit").state_dict() | change, tmp_path / "weights.pth")
    with pytest.raises(InvalidArgument, match=message):
        open_model("timm:test_vit", tmp_path / "weights.pth")


def test_a_model_that_has_one_size_says_so(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InvalidArgument, match="model: expected one that takes image_size=80, got timm:test_resnet"):
        open_model("timm:test_resnet", tmp_path / "weights.pth", image_size=80)
    weights = save_timm(tmp_path / "vit.pth")
    with pytest.raises(InvalidArgument, match=r"image_size: expected a size that timm:test_vit takes, got 81 \(Input"):
        open_model("timm:test_vit", weights, image_size=81)
    with pytest.raises(InvalidArgument, match="checkpoint_key: expected a checkpoint that it is a part of, got 'ema'"):
        open_model("timm:test_resnet", checkpoint_key="ema")


def test_a_classifier_of_transformers_takes_a_checkpoint_with_another_head_or_none(tmp_path: Path) -> None:
    folder = save_transformers(tmp_path / "vit")
    weights = {f"net.{n}": v for n, v in open_model(f"hf:{folder}").module.state_dict().items()}
    wider = weights | {"net.classifier.weight": torch.zeros(5, 32), "net.classifier.bias": torch.zeros(5)}
    torch.save({"state_dict": wider}, tmp_path / "wider.ckpt")
    opened = open_model(f"hf:{folder}", tmp_path / "wider.ckpt")
    assert (opened.num_classes, answer(opened).shape) == (5, (1, 5))


def test_transformers_from_a_folder(tmp_path: Path) -> None:
    opened = open_model(f"hf:{save_transformers(tmp_path)}")
    assert (opened.num_classes, opened.classes, opened.size) == (2, ("blue", "red"), (32, 32))
    assert answer(opened).shape == (1, 2)
    weights = {name: value + 1 for name, value in opened.module.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    other = open_model(f"hf:{tmp_path}", tmp_path / "other.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in other.module.state_dict().items())


def test_transformers_without_classes_gives_features(tmp_path: Path) -> None:
    opened = open_model(f"hf:{save_transformers(tmp_path, classifies=False)}")
    assert (opened.num_classes, opened.classes) == (0, ())
    assert answer(opened).shape == (1, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_mni", "model: expected timm:<name>, hf:<name or folder>, .*Did you mean 'vit_mini'"),
        ("resnet50", "A model of timm's is called timm:resnet50"),
        ("timm/vit_small", "A model of timm's is called timm:vit_small, with a colon"),
        ("timm:vit_smal_patch16_224", "model: expected a model of timm's, .*Did you mean vit_small_patch16_224"),
        ("timm:test_vit", r"timm/test_vit.r160_in1k is not here, and the hub does not answer \(.*with --checkpoint"),
        ("timm:hf-hub:nobody/nothing", r"nobody/nothing is not here, and the hub does not answer"),
        ("hf:nobody/nothing", r"nobody/nothing is not here, .*hf download nobody/nothing --local-dir <folder>"),
        ("hf:a b", "a b could not be downloaded from the hub"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(NarrowsError, match=message) as told:
        open_model(name)
    assert "\n" not in str(told.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked, session = [], huggingface_hub.utils.get_session()

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(kwargs.get("url"))
        raise ConnectionError("no network")

    monkeypatch.setattr(type(session), "request", refuse)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits to ask again"))
    for name in ("timm:resnet50", "hf:nobody/nothing"):
        with pytest.raises(NarrowsError, match=r"is not here, and the hub does not answer \(no network\)"):
            open_model(name)
    assert sum("/resolve/" in str(url) for url in asked) == 2


def test_what_is_random_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr("narrows.hub.models._check_timms_weights", lambda _: None)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, pretrained=False, **rest))
    assert open_model("timm:test_vit", num_classes=5).notes == (
        "The head for 5 classes is new: its weights are random",
    )
    assert open_model("timm:test_vit").notes == open_model("timm:test_vit", num_classes=1000).notes == ()
    assert open_model("timm:test_vit", num_classes=0).notes == ()
    assert open_model("vit_mini").notes == ("The weights of vit_mini are random: nothing has trained them",)
    assert open_model(save_ours(tmp_path)).notes == ()


def test_a_model_of_transformers_has_all_of_its_weights(tmp_path: Path) -> None:
    folder = save_transformers(tmp_path / "classifier")
    weights = load_file(f"{folder}/model.safetensors")
    weights["vit.layernorm.wieght"] = weights.pop("vit.layernorm.weight")
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        InvalidArgument, match=r"all weights of a ViTForImageClassification, got .* without vit.layernorm.w"
    ):
        open_model(f"hf:{folder}")
    folder = save_transformers(tmp_path / "features", classifies=False)
    weights = load_file(f"{folder}/model.safetensors")
    save_file({n: v for n, v in weights.items() if "pooler" not in n}, f"{folder}/model.safetensors", {"format": "pt"})
    opened = open_model(f"hf:{folder}")
    assert opened.notes == ("The saved weights have no pooler: features are those of the first token",)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(opened.outputs(images), opened.module(images).last_hidden_state[:, 0])


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="folder: expected a folder written by save_pretrained"):
        open_model(str(tmp_path))
    with pytest.raises(InvalidArgument, match=r"model: expected a folder with config.json, preprocessor_config.json"):
        open_model(f"hf:{tmp_path}")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "ours")
    with pytest.raises(InvalidArgument, match="checkpoint: expected the weights of a ViT of this size"):
        open_model(folder, save_timm(tmp_path / "weights.pth"))
    with pytest.raises(InvalidArgument, match="checkpoint: expected the weights of a VisionTransformer of this size"):
        open_model("timm:test_vit", f"{folder}/model.safetensors")


def test_a_saved_model_is_what_it_was_built_for(tmp_path: Path) -> None:
    folder = save_ours(tmp_path)
    fits = {name: SHAPE[name] for name in ("num_classes", "image_size", "channels")}
    assert open_model(folder, **fits).num_classes == 2
    message = r"model: expected a saved model with {'channels': 1}, got one with {'channels': 3} in"
    with pytest.raises(InvalidArgument, match=message):
        open_model(folder, **{**fits, "channels": 1})
    with pytest.raises(InvalidArgument, match=r"expected a saved model with {'depth': 3}"):
        open_model(folder, **fits, depth=3)


def test_a_model_of_transformers_takes_no_arguments(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="those of transformers are opened as they are"):
        open_model(f"hf:{save_transformers(tmp_path)}", num_classes=3)


def test_a_model_of_timms_is_fine_tuned_and_saved_for_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr("narrows.hub.models._check_timms_weights", lambda _: None)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, pretrained=False, **rest))
    model = open_model("timm:test_vit", num_classes=3, image_size=32, channels=1).module.train()
    images = torch.randn(2, 1, 32, 32)
    with narrows.reduce_tokens(model, budget=0.5):
        assert model(images).shape == (2, 3)
    save_model(model, tmp_path)
    monkeypatch.undo()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model.eval()(images))


def test_tokens_of_a_model_of_transformers_are_its_last_hidden_state(tmp_path: Path) -> None:
    for classifies in (True, False):
        opened = open_model(f"hf:{save_transformers(tmp_path / str(classifies), classifies=classifies)}")
        images = torch.rand(2, 3, 32, 32)
        hidden = opened.module(images, output_hidden_states=True).hidden_states[-1]
        encoder = opened.module.vit if classifies else opened.module
        assert torch.equal(opened.tokens(images), encoder.layernorm(hidden))


def test_a_model_of_neither_narrows_nor_timm_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="model: expected a model of narrows or of timm, got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path)


def _two_towers(kind: str, of: str, folder: Path) -> torch.nn.Module:
    """A saved model of transformers with a tower for images and one for text."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {
        **sizes,
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "word_embed_proj_dim": 32,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    querying = {"qformer_config": {**text, "encoder_hidden_size": 32}} if of == "Blip2" else {}
    whole = getattr(transformers, f"{of}Config")(vision_config=vision, text_config=text, projection_dim=16, **querying)
    model = getattr(transformers, kind)(whole).eval()
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "of", ["AltCLIP", "Blip", "Blip2", "ChineseCLIP", "CLIP", "CLIPSeg", "MetaClip2", "OwlViT", "Owlv2", "Siglip"]
)
def test_of_a_model_of_two_towers_the_one_that_sees_is_opened(of: str, tmp_path: Path) -> None:
    model: Any = _two_towers(f"{of}Model", of, tmp_path)
    opened, images = open_model(f"hf:{tmp_path}"), torch.rand(2, 3, 32, 32)
    assert type(opened.module).__name__ == f"{of}VisionModel"
    assert torch.equal(opened.outputs(images), model.vision_model(images).pooler_output)
    with narrows.reduce_tokens(opened.module, method="topk", budget=0.5) as reduction:
        opened.outputs(images)
        assert reduction.routing[-1].maps().amax(1).sum((1, 2)).tolist() == [8, 8]


def test_a_classifier_on_one_of_two_towers_keeps_its_classes(tmp_path: Path) -> None:
    model: Any = _two_towers("CLIPForImageClassification", "CLIP", tmp_path)
    opened, images = open_model(f"hf:{tmp_path}"), torch.rand(2, 3, 32, 32)
    assert (opened.num_classes, opened.size) == (2, (32, 32))
    assert torch.equal(opened.outputs(images), model(images).logits)


def test_a_model_of_videos_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes, image_size=32)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match=r"model: expected a model of images, got .*VideoMAEModel, which takes"):
        open_model(f"hf:{tmp_path}")
