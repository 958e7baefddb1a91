"""What every model of the registry promises. Small ones run; usual sizes are built without memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from narrows.errors import InvalidArgument
from narrows.models import ImageClassifier, create_model, list_models, load_model
from tests.support import assert_close, parameter_gradients

KEYS = Path(__file__).parents[1] / "snapshots" / "model_state_dict_keys.json"
MINI = list_models("*_mini")

every_mini = pytest.mark.parametrize("name", MINI)


def build(name: str) -> ImageClassifier:
    torch.manual_seed(0)
    return create_model(name).eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@every_mini
def test_every_parameter_learns(name: str) -> None:
    model = build(name).train()
    for key, gradient in parameter_gradients(model, model(images())).items():
        assert torch.isfinite(gradient).all(), key
        assert gradient.abs().max() > 0, f"{key} gets no gradient"


@every_mini
def test_forward_is_features_then_head_and_deterministic(name: str) -> None:
    model = build(name)
    logits = model(images())
    assert logits.shape == (3, 10)
    assert torch.equal(logits, model.forward_head(model.forward_features(images())))


@every_mini
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = build(name).double()
    together = model(images(4).double())
    for index in range(4):
        assert_close(model(images(4).double()[index : index + 1]), together[index : index + 1], 1e-9)


@every_mini
def test_low_precision_stays_near(name: str) -> None:
    model = build(name)
    expected = model(images()).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(images()).float().softmax(-1), expected, 0.1)
    assert torch.isfinite(model.bfloat16()(images().bfloat16())).all()


@every_mini
def test_weights_come_back_with_their_class(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), create_model(name).from_pretrained(tmp_path).eval()):
        assert type(loaded) is type(model)
        assert torch.equal(loaded(images()), model(images()))


@every_mini
def test_other_channels_and_classes(name: str) -> None:
    model = create_model(name, num_classes=3, channels=1)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in MINI if name != "vit_mini"])
def test_routing_stands_on_the_grid(name: str) -> None:
    model = build(name)
    routings = model.routing(images())
    assert routings, "a bottleneck must show where tokens go"
    for routing in routings:
        assert routing.grid is not None, routing.name
        assert routing.name in dict(model.named_modules())
        weights = routing.maps()
        assert weights.shape[0] == 3
        assert (weights >= 0).all()
        assert torch.isfinite(weights).all()
        assert weights.sum() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", list_models())
def test_state_dict_keys_are_what_they_were(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    snapshot = json.loads(KEYS.read_text())
    assert name in snapshot, f"add {name}: python -m tests.snapshots"
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == snapshot[name]


@every_mini
@pytest.mark.compiled
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images()), model(images()), 1e-5)


@every_mini
@pytest.mark.compiled
def test_exports_with_any_batch(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},), strict=False).module()
        assert_close(program(images(5)), model(images(5)), 1e-5)


def test_names_are_listed_by_pattern() -> None:
    assert list_models("vit_*") == ["vit_mini", "vit_small"]
    families = ("vit", "ats_vit", "soft_moe_vit", "sepvit", "slot_vit", "resampler_vit")
    assert all(len([name for name in list_models() if name.startswith(family)]) >= 2 for family in families)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"name: expected one of .*got 'vit_mni'\. Did you mean 'vit_mini'"):
        create_model("vit_mni")
    with pytest.raises(InvalidArgument, match=r"got 'num_class'\. Did you mean 'num_classes'"):
        create_model("vit_mini", num_class=3)
    with pytest.raises(InvalidArgument, match=r"heads: expected a divisor of dim = 64, got 5"):
        create_model("vit_mini", heads=5)
    with pytest.raises(InvalidArgument, match=r"stem: expected one of .* got 'covn'"):
        create_model("vit_mini", stem="covn")
    with pytest.raises(InvalidArgument, match="power of two"):
        create_model("vit_mini", patch_size=6, image_size=36)
    with pytest.raises(InvalidArgument, match="folder: expected a folder written by save_pretrained"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "Other"}')
    with pytest.raises(InvalidArgument, match=r"config\.json: expected 'architecture' among"):
        load_model(tmp_path)
    with pytest.raises(InvalidArgument, match=r"images: expected shape \[B, C, H, W\] with C = 3, got"):
        build("vit_mini")(torch.rand(2, 1, 32, 32))
    with pytest.raises(InvalidArgument, match="multiples of patch_size = 4"):
        build("vit_mini")(torch.rand(2, 3, 30, 32))


def test_other_image_sizes_get_interpolated_positions() -> None:
    model = build("vit_mini")
    assert torch.isfinite(model(torch.rand(1, 3, 48, 64))).all()
    positions = model.embedding._positions((8, 8))
    assert positions is model.embedding.positions
    coarse = model.embedding._positions((4, 4)).unflatten(1, (4, 4))
    blocks = nn.functional.avg_pool2d(positions.detach().transpose(1, 2).unflatten(2, (8, 8)), 2)
    # Halving a grid is close to averaging 2x2 blocks; a raster cut (upstream's silent mistake) is not.
    agreement = nn.functional.cosine_similarity(coarse.flatten(), blocks.permute(0, 2, 3, 1).flatten(), 0)
    assert agreement > 0.7
