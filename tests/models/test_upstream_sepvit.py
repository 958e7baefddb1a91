from itertools import pairwise
from math import ceil

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from vit_pytorch import sep_vit

from narrows.errors import InvalidArgument, InvalidType
from narrows.models.upstream_sepvit import PRESETS, UpstreamSepViT
from tests.support import assert_close, parameter_gradients


def small(**kwargs: object) -> UpstreamSepViT:
    """Grids of 8 x 8 and 4 x 4 at 16 pixels, windows of 4: four windows, then one."""
    arguments = {
        "image_size": 16, "num_classes": 5, "patch_stride": 2, "window_size": 4,
        "dims": (8, 16), "depths": (1, 2), "heads": (1, 2), "head_dim": 8, **kwargs,
    }  # fmt: skip
    return UpstreamSepViT(**arguments).eval()


def test_one_value_or_one_for_each_stage() -> None:
    """Upstream takes no list of heads, and neither window size nor head width at all (S1, S5)."""
    with pytest.raises(TypeError):
        sep_vit.SepViT(num_classes=5, dim=8, depth=(1, 1), heads=[1, 2])
    model = small(heads=[3, 5], window_size=[2, 4], head_dim=[4, 6], mlp_ratio=[2.0, 1.5])
    for stage, expected in zip(model.stages, [(3, 2, 4, 16), (5, 4, 6, 24)], strict=True):
        for block in stage.blocks:
            attention = block.attention
            head_dim = attention.out.in_features // attention.heads
            assert (attention.heads, attention.window_size, head_dim, block.feed_forward[0].out_features) == expected
    assert {block.attention.heads for stage in small(heads=2).stages for block in stage.blocks} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": (1, 2, 3)}, r"heads: expected one value, or 2: one for each of the stages .*, got \(1, 2, 3\)"),
        ({"window_size": [4]}, r"window_size: expected one value, or 2: .*, got \[4\]"),
        ({"head_dim": (8, 8, 8)}, r"head_dim: expected one value, or 2: "),
        ({"depths": (1,)}, r"depths: expected one value, or 2: "),
        ({"mlp_ratio": (4.0,)}, r"mlp_ratio: expected one value, or 2: "),
        ({"mlp_ratio": 0.0}, r"mlp_ratio: expected positive values, got 0.0"),
        ({"heads": (1, 0)}, r"heads: expected positive values, got \(1, 0\)"),
        ({"num_classes": 0}, r"num_classes: expected a positive integer, got 0"),
        ({"patch_stride": 0}, r"patch_stride: expected a positive integer, got 0"),
        ({"dims": ()}, r"dims: expected at least one stage, got \(\)"),
        ({"dropout": 1.5}, r"dropout: expected a share in \[0, 1\), got 1.5"),
        ({"image_size": 20}, r"image_size: .* got 20 x 20\. The nearest usable size is 16 x 16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages_of_the_constructor(arguments: dict[str, object], message: str) -> None:
    """Upstream raises a bare assertion without a message (S5)."""
    with pytest.raises(InvalidArgument, match=message):
        small(**arguments)


def test_widths_are_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidType, match=r"heads: expected a positive integer, got 1.5"):
        small(heads=(1, 1.5))


@pytest.mark.parametrize(
    ("size", "nearest"), [((256, 288), "224 x 224"), ((384, 100), "448 x 224"), ((224, 225), "224 x 224")]
)
def test_a_size_that_windows_do_not_divide_is_told_the_nearest_that_they_do(
    size: tuple[int, int], nearest: str
) -> None:
    """Upstream stops at a bare assertion in some stage (S2)."""
    with pytest.raises(AssertionError):
        sep_vit.SepViT(num_classes=5, dim=8, depth=(1, 1, 1, 1), heads=1)(torch.zeros(1, 3, *size))
    model = small(image_size=224, patch_stride=4, window_size=7, dims=(8,) * 4, depths=(1,) * 4, heads=1)
    with pytest.raises(InvalidArgument) as error:
        model(torch.zeros(1, 3, *size))
    message = str(error.value)
    assert message.startswith("images: expected a size whose grid windows of (7, 7, 7, 7) tokens divide")
    assert f"got {size[0]} x {size[1]}. The nearest usable size is {nearest}." in message


def test_every_size_runs_or_is_refused_and_the_nearest_is_the_nearest() -> None:
    model = small(image_size=None, window_size=(3, 2))
    usable = [side for side in range(1, 80) if ceil(side / 2) % 3 == 0 and ceil(side / 4) % 2 == 0]
    with torch.no_grad():
        for side in range(1, 60):
            images = torch.zeros(1, 3, side, usable[0])
            if side in usable:
                assert model(images).shape == (1, 5)
                continue
            with pytest.raises(InvalidArgument) as error:
                model(images)
            nearest = min([other for other in usable if other % 2 == 0], key=lambda other: (abs(other - side), other))
            assert f"nearest usable size is {nearest} x {usable[0]}." in str(error.value), side


def test_wrong_images_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for shape in [(1, 4, 16, 16), (3, 16, 16)]:
        with pytest.raises(InvalidArgument, match=r"images: expected shape \[B, C, H, W\] with C = 3, got shape"):
            small()(torch.zeros(shape))


def test_every_parameter_has_a_gradient_at_the_size_the_model_is_built_for() -> None:
    """Upstream leaves eight tensors of its last stage without one at 224 pixels (S4)."""
    upstream = sep_vit.SepViT(num_classes=5, dim=8, depth=(1, 1), heads=(1, 1))
    upstream(torch.randn(1, 3, 56, 56)).sum().backward()
    untrained = {name for name, parameter in upstream.named_parameters() if parameter.grad is None}
    assert {name.split(".")[6] for name in untrained} == {"window_tokens_to_qk"}

    model = small()
    for name, gradient in parameter_gradients(model, model(torch.randn(2, 3, 16, 16))).items():
        assert gradient.abs().max() > 0, name
    assert [stage.blocks[0].attention.window_query_key is None for stage in model.stages] == [False, True]


def test_a_model_built_for_any_size_never_leaves_a_parameter_out_of_the_graph() -> None:
    """At one window the attention between windows gets zeros, not None: data-parallel training does not stop (S4)."""
    model = small(image_size=None)
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    last = model.stages[-1].blocks[0].attention.window_query_key
    assert last.weight.grad.abs().max() < 1e-8
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert last.weight.grad.abs().max() > 1e-8


def test_rectangles_and_other_sizes_than_the_model_is_built_for() -> None:
    model, images = small().double(), torch.randn(2, 3, 32, 48).double()
    features = model.forward_features(images)
    assert features.shape == (2, 8, 12, 16)
    assert_close(model(images), model.head(model.norm(features.mean((1, 2)))), 1e-12)


def test_windows_are_kept_through_the_blocks_of_a_stage() -> None:
    """Upstream copies into windows and back in every block (S9)."""
    model, seen = small(depths=(1, 3)), []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(1, 3, 16, 16))
    assert [tuple(inputs.shape) for inputs, _ in seen] == [(1, 2, 2, 16, 8)] + 3 * [(1, 1, 1, 16, 16)]
    assert all(after is before for (_, before), (after, _) in pairwise(seen[1:]))


def test_conditional_position_encoding_tells_places_apart() -> None:
    """Without it a constant image inside its border would give every token the same."""
    features = small(image_size=None).forward_features(torch.ones(1, 3, 32, 32))[0]
    assert not torch.allclose(features[0, 0], features[4, 4], atol=1e-4)


def test_the_routing_of_a_model_has_one_record_for_each_block() -> None:
    model = small()
    routings = model.routing(torch.randn(2, 3, 16, 32))
    assert [routing.name for routing in routings] == [
        "stages.0.blocks.0.attention", "stages.1.blocks.0.attention", "stages.1.blocks.1.attention",
    ]  # fmt: skip
    assert [routing.grid for routing in routings] == [(8, 16), (4, 8), (4, 8)]
    assert [routing.num_carriers for routing in routings] == [8, 2, 2]
    assert model.token_grid(torch.zeros(1, 3, 15, 32)) == (8, 16)


def test_window_tokens_are_spared_weight_decay() -> None:
    model = small()
    parameters = dict(model.named_parameters())
    assert {parameters[name] for name in model.no_weight_decay()} == {
        block.attention.window_token for stage in model.stages for block in stage.blocks
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_at_their_size(name: str) -> None:
    preset = PRESETS[name]
    model = UpstreamSepViT(**preset).eval()
    side = preset["image_size"]
    logits = model(torch.randn(1, 3, side, side))
    assert logits.shape == (1, preset["num_classes"])
    assert logits.isfinite().all()


def test_the_lite_preset_is_upstream_without_what_upstream_never_trains() -> None:
    """S6: 4.01 M parameters in upstream; the two blocks of the last stage hold no unused 0.26 M."""
    with torch.device("meta"):
        upstream = sep_vit.SepViT(num_classes=1000, dim=32, depth=(1, 2, 6, 2), heads=(1, 2, 4, 8))
        model = UpstreamSepViT(**PRESETS["sepvit_upstream_lite"])
    unused = sum(
        parameter.numel()
        for name, parameter in upstream.named_parameters()
        if ".3.2.layers" in name and "to_qk." in name
    )

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert round(size(upstream) / 1e6, 2) == 4.01
    assert size(model) == size(upstream) - unused


def test_a_few_steps_learn_to_tell_corners_apart() -> None:
    torch.manual_seed(0)
    model = small(num_classes=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(4, (size,))
        images = 0.3 * torch.randn(size, 3, 16, 16)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, label // 2 * 8 : label // 2 * 8 + 8, label % 2 * 8 : label % 2 * 8 + 8] += 1
        return images, labels

    for _ in range(120):
        images, labels = batch(32)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = batch(200)
    assert (model.eval()(images).argmax(1) == labels).double().mean() > 0.95
