"""SepViT in timm's registry, and what timm asks of its own models."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

timm = pytest.importorskip("timm")

from timm.models._features import FeatureGetterNet  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402

import narrows.timm  # noqa: E402
from narrows.models import SepViT, create_model  # noqa: E402
from tests.models.small_sepvit import images  # noqa: E402
from tests.support import assert_close  # noqa: E402

NAMES = ["sepvit_base", "sepvit_lite", "sepvit_small", "sepvit_tiny"]
LITE = {"dims": (8, 16, 16, 32), "heads": 2, "depths": (1, 2, 2, 1), "img_size": 64}


def lite(**kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("sepvit_lite", **LITE, **kwargs).eval()


def run(script: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


# Two processes for all that fresh ones are asked: starting one takes longer than everything else here.
def test_models_are_registered_where_timm_comes_after_and_twice() -> None:
    script = (
        "from importlib import reload; import narrows.timm, timm; first = timm.list_models('sepvit*'); "
        "reload(narrows.timm); print(first); print(timm.list_models('sepvit*'))"
    )
    assert run(script) == f"{NAMES}\n{NAMES}"


def test_narrows_alone_loads_no_timm_and_its_models_are_opened_by_name_like_those_of_timm(tmp_path) -> None:
    model = narrows.create_model("sepvit_lite", num_classes=3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    printed = run(
        "import sys; finders = list(sys.meta_path); import narrows; assert sys.meta_path == finders; "
        "narrows.create_model('sepvit_tiny', device='meta'); print('timm' in sys.modules); "
        "import timm; print(timm.list_models('sepvit*')); "
        "from narrows.hub.models import open_model; "
        f"opened = open_model('timm:sepvit_lite', checkpoint={str(tmp_path / 'weights.safetensors')!r}); "
        "print(type(opened.module).__name__, opened.num_classes); "
        "import narrows.timm; print(timm.list_models('sepvit*'))"
    )
    assert printed.split("\n") == ["False", "[]", "SepViT 3", str(NAMES)]


def test_names_and_entries_of_the_registry() -> None:
    assert timm.list_models("sepvit*") == NAMES == [name for name in narrows.list_models("sepvit_*") if name in NAMES]
    assert timm.list_pretrained("sepvit*") == []
    for name in NAMES:
        model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
        assert isinstance(model, SepViT)
        cfg = model.pretrained_cfg
        assert (cfg["architecture"], cfg["num_classes"], cfg["input_size"]) == (name, 1000, (3, 224, 224))
        assert cfg.get("url") is None
        assert cfg.get("hf_hub_id") is None
        keys = model.state_dict()
        assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= keys.keys()
        assert {(value.device.type, value.dtype) for value in keys.values()} == {("meta", torch.bfloat16)}
        assert {key: value.shape for key, value in keys.items()} == {
            key: value.shape for key, value in create_model(name, device="meta").state_dict().items()
        }
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sepvit_lite"):
        timm.create_model("sepvit_lite", pretrained=True)


def test_forward_head_and_pool_as_timm_tests_them() -> None:
    model, x = lite(), images(64, 64)
    logits = model(x)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 32)
    assert torch.equal(model.forward_head(features), logits)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert lite(num_classes=0, global_pool="")(x).shape == features.shape
    assert lite(num_classes=0)(x).shape == (2, 32)
    assert lite(in_chans=1, drop_rate=0.1, drop_path_rate=0.1)(images(64, 64, channels=1)).shape == (2, 1000)


def test_backward_gives_every_parameter_a_finite_gradient() -> None:
    model = lite(num_classes=42).train()
    model(images(64, 64)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("indices", [None, (0, 2), (-1,)], ids=str)
def test_features_only(indices: tuple[int, ...] | None) -> None:
    options = {} if indices is None else {"out_indices": indices}
    torch.manual_seed(0)
    backbone = timm.create_model("sepvit_lite", features_only=True, in_chans=1, **options, **LITE).eval()
    torch.manual_seed(0)
    ours = create_model("sepvit_lite", features_only=True, in_chans=1, **options, **LITE).eval()
    assert isinstance(backbone, FeatureGetterNet)
    assert backbone.feature_info.channels() == ours.feature_info.channels()
    assert backbone.feature_info.reduction() == ours.feature_info.reduction()
    maps = backbone(images(64, 96, channels=1))
    for found, expected in zip(maps, ours(images(64, 96, channels=1)), strict=True):
        assert torch.equal(found, expected)
    assert [feature_map.shape[1] for feature_map in maps] == backbone.feature_info.channels()
    assert backbone.feature_info.info[0].keys() >= {"num_chs", "reduction", "module"}


def test_intermediates_equal_forward() -> None:
    model, x = lite(), images(64, 64)
    final, intermediates = model.forward_intermediates(x)
    assert_close(final, model.forward_features(x), 1e-6)
    assert [tuple(each.shape[1:]) for each in intermediates] == [(8, 16, 16), (16, 8, 8), (16, 4, 4), (32, 2, 2)]
    model.prune_intermediate_layers([0, 1, 2])
    assert model(x).isfinite().all()


def test_gradient_checkpointing_and_layer_wise_learning_rates() -> None:
    model, x = lite().train(), images(64, 64)
    expected = model(x)
    model.set_grad_checkpointing()
    assert_close(model(x), expected, 1e-6)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=model.no_weight_decay()
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = [block for stage in model.stages for block in stage.blocks]
    scales = [scale_of[id(model.stages[0].embedding.weight)]]
    scales += [scale_of[id(block.attention.qkv.weight)] for block in blocks] + [scale_of[id(model.head.weight)]]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(scales)
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay_of[id(model.stages[0].blocks[0].attention.window_token)] == 0


def test_a_checkpoint_of_one_registry_loads_in_the_other(tmp_path) -> None:
    model = lite()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = lite(checkpoint_path=tmp_path / "weights.pth")
    assert torch.equal(loaded(images(64, 64)), model(images(64, 64)))
