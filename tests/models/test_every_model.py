"""What every model of the registry promises. Small ones run; usual sizes are built without memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from narrows.errors import InvalidArgument
from narrows.layers.soft_moe import StackedLinear
from narrows.models import ATSViT, ImageClassifier, create_model, list_models, load_model
from tests.models import small_sepvit
from tests.support import assert_close, gradients, parameter_gradients

KEYS = Path(__file__).parents[1] / "snapshots" / "model_state_dict_keys.json"
SMALL = {"sepvit_lite": {**small_sepvit.SMALL, "num_classes": 10, "depths": (1, 2)}}
MODELS = [*list_models("*_mini"), *SMALL]  # one of each class

every_model = pytest.mark.parametrize("name", MODELS)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def construct(name: str, **kwargs: Any) -> ImageClassifier:
    return create_model(name, **{**SMALL.get(name, {}), **kwargs})


def build(name: str) -> ImageClassifier:
    torch.manual_seed(0)
    return construct(name).eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@every_model
def test_every_parameter_learns(name: str) -> None:
    model = build(name).train()
    for key, gradient in parameter_gradients(model, model(images())).items():
        assert torch.isfinite(gradient).all(), key
        assert gradient.abs().max() > 0, f"{key} gets no gradient"


@every_model
def test_forward_is_features_then_head_and_deterministic(name: str) -> None:
    model = build(name)
    logits = model(images())
    assert logits.shape == (3, 10)
    assert torch.equal(logits, model.forward_head(model.forward_features(images())))


@every_model
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = build(name).double()
    together = model(images(4).double())
    for index in range(4):
        assert_close(model(images(4).double()[index : index + 1]), together[index : index + 1], 1e-9)


@every_model
def test_low_precision_stays_near(name: str) -> None:
    model = build(name)
    expected = model(images()).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(images()).float().softmax(-1), expected, 0.1)
    assert torch.isfinite(model.bfloat16()(images().bfloat16())).all()


@every_model
def test_weights_come_back_with_their_class(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), type(model).from_pretrained(tmp_path).eval()):
        assert type(loaded) is type(model)
        assert torch.equal(loaded(images()), model(images()))


@every_model
def test_other_channels_and_classes(name: str) -> None:
    model = construct(name, num_classes=3, channels=1)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_mini"])
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
    model = create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(value.device.type, value.dtype) for value in model.state_dict().values()} == {("meta", torch.bfloat16)}
    snapshot = json.loads(KEYS.read_text())
    assert name in snapshot, f"add {name}: python -m tests.snapshots"
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == snapshot[name]


@every_model
def test_lora_on_every_linear_map_changes_the_output_trains_and_merges(name: str) -> None:
    model, x = build(name).double(), images().double()
    for parameter in model.parameters():  # window tokens begin at zero, where nothing of them is seen
        nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    plain = model(x)
    maps = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    stacked = [f"{key}.weight" for key, module in model.named_modules() if isinstance(module, StackedLinear)]
    config = peft.LoraConfig(r=2, target_modules=maps, target_parameters=stacked or None, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    outputs = adapted.double().eval()(x)
    assert (outputs - plain).abs().max() > 1e-6
    adapters = {key: value for key, value in adapted.named_parameters() if "lora_" in key}
    assert len(adapters) == 2 * len(maps + stacked)
    for key, gradient in zip(adapters, gradients(outputs, *adapters.values()), strict=True):
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
    assert_close(adapted.merge_and_unload()(x), outputs, 1e-9)


@every_model
def test_hooks_of_every_submodule_fire(name: str) -> None:
    model, fired = build(name), set()
    called = {key: m for key, m in model.named_modules() if key and type(m).forward is not nn.Module.forward}
    for key, module in called.items():
        module.register_forward_hook(lambda *_, key=key: fired.add(key))
    if isinstance(model, ATSViT):  # its blocks hand on more than tokens, one after another
        del called["blocks"]
    model(images())
    assert fired == called.keys()


@every_model
def test_torch_func_transforms_a_model(name: str) -> None:
    model, x = build(name).double(), images(2).double()
    parameters = dict(model.named_parameters())

    def loss(x: Tensor, parameters: dict[str, Tensor] = parameters) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    u, v = torch.randn_like(x), torch.randn_like(x)
    assert_close(jvp(loss, (x,), (u,))[1], (grad(loss)(x) * u).sum(), 1e-9)
    along_u, along_v = jvp(grad(loss), (x,), (u,))[1], jvp(grad(loss), (x,), (v,))[1]
    assert_close((along_u * v).sum(), (along_v * u).sum(), 1e-9)
    per_image = vmap(grad(lambda p, image: loss(image[None], p)), (None, 0))(parameters, x)
    for key, gradient in grad(lambda p: loss(x, p))(parameters).items():
        assert_close(per_image[key].sum(0), gradient, 1e-9)


@every_model
def test_autocast_leaves_float64_alone(name: str) -> None:
    model = build(name).double()
    expected = model(images().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(images().double()), expected, 1e-12)


@every_model
def test_an_empty_batch_runs_forward_and_backward(name: str) -> None:
    model = build(name)
    logits = model(images(0))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@every_model
@low_precision
def test_models_can_be_made_in_low_precision(name: str, dtype: torch.dtype) -> None:
    explicit = construct(name, dtype=dtype)
    torch.set_default_dtype(dtype)
    try:
        by_default = construct(name)
    finally:
        torch.set_default_dtype(torch.float32)
    moved = construct(name).to(dtype)
    moved.reset_parameters()
    for model in (explicit, by_default, moved):
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert torch.isfinite(model.eval()(images().to(dtype))).all()


@every_model
def test_the_meta_device_gives_shapes(name: str) -> None:
    assert construct(name, device="meta").eval()(images().to("meta")).shape == (3, 10)


@every_model
def test_resetting_gives_the_distribution_of_construction(name: str) -> None:
    """As FSDP makes large models: on the meta device, then `to_empty` and `reset_parameters`."""
    draws = 8
    made: dict[str, list[Tensor]] = {}
    reset: dict[str, list[Tensor]] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        for key, value in construct(name).state_dict().items():
            made.setdefault(key, []).append(value)
        model = construct(name, device="meta").to_empty(device="cpu")
        for value in model.state_dict().values():
            value.fill_(torch.nan)
        torch.manual_seed(seed + draws)
        model.reset_parameters()
        for key, value in model.state_dict().items():
            reset.setdefault(key, []).append(value)
    for key in made:
        ours, theirs = torch.stack(reset[key]), torch.stack(made[key])
        deviation = theirs.std().item()
        if (theirs == theirs[0]).all():
            assert torch.equal(ours, theirs), key
            continue
        # Six standard errors of a mean and of a standard deviation, of distributions with tails no heavier than normal.
        error = 6 * deviation * (2 / ours.numel()) ** 0.5
        assert abs(ours.mean().item() - theirs.mean().item()) <= error, key
        assert abs(ours.std().item() - deviation) <= error, key


@every_model
def test_device_and_dtype_are_not_saved(name: str, tmp_path: Path) -> None:
    construct(name, device="cpu", dtype=torch.float64).save_pretrained(tmp_path)
    assert not {"device", "dtype"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}


def counted(model: Callable[[Tensor], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(2))
    return counter.get_total_flops()


@every_model
def test_the_counter_of_torch_counts_a_model(name: str) -> None:
    model = build(name)
    with FlopCounterMode(display=False) as counter:
        model(images(2))
    assert counted(model) == counter.get_total_flops() > 0


@every_model
@pytest.mark.compiled
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, expected = compiled(images()), model(images())
    assert_close(logits, expected, 1e-5)
    expected_gradients = parameter_gradients(model, expected)
    for key, gradient in parameter_gradients(model, logits).items():
        assert_close(gradient, expected_gradients[key], 1e-4)


@every_model
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_the_counter_of_torch_counts_a_compiled_model(name: str) -> None:
    """Below its counter torch runs what is compiled eagerly, with a module in between."""
    torch._dynamo.reset()
    model = build(name)
    assert counted(torch.compile(model, backend="aot_eager")) == counted(model)


@every_model
@pytest.mark.compiled
def test_exports_with_any_batch(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},), strict=False).module()
        for count in (1, 5):
            assert_close(program(images(count)), model(images(count)), 1e-5)


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
