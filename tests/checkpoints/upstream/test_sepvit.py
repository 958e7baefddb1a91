import copy

import pytest
import torch
from torch import Tensor, nn
from vit_pytorch import sep_vit

from narrows.checkpoints import from_upstream
from narrows.models import UpstreamSepViT
from tests.support import assert_close, gradients, parameter_gradients


def upstream(**kwargs: object) -> nn.Module:
    """Small, and random everywhere: upstream starts norms at one and zero."""
    torch.manual_seed(0)
    module = sep_vit.SepViT(**{"num_classes": 5, "dim": 8, "depth": (1, 2), "heads": (1, 2), **kwargs}).eval()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith(".g")), std=0.2)
    return module


def in_narrows_layout(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream gradients under the names of narrows: a copy that holds them as weights is converted."""
    holder = copy.deepcopy(module)
    holder.load_state_dict(values)
    return dict(from_upstream(holder).named_parameters())


def assert_parity(module: nn.Module, images: Tensor) -> None:
    converted = from_upstream(module)
    assert isinstance(converted, UpstreamSepViT)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    output, expected = converted(ours), module(theirs)
    assert_close(output, expected)
    assert_close(*gradients(output, ours), *gradients(expected, theirs))

    expected_gradients = in_narrows_layout(module, dict(parameter_gradients(module, module(images))))
    found = parameter_gradients(converted, converted(images))
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected_gradients[name])
        # One window in the last stage: upstream gives no gradient, narrows zeros. Everywhere else there is one.
        silent = expected_gradients[name].abs().max() == 0
        assert (gradient.abs().max() < 1e-7) == silent, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 3},
        {"heads": (4, 1), "dim": 12},
        {"depth": (2,), "heads": (2,)},
        {"depth": (1, 1, 1), "heads": (1, 2, 3)},
        {"ff_mult": 2},
        {"ff_mult": 1.3, "dim": 7},
        {"channels": 1},
        {"channels": 5, "num_classes": 1},
        {"dropout": 0.3},
        {"window_size": 4, "dim_head": 16},
    ],
    ids=str,
)
def test_parity_over_the_options_of_upstream(options: dict[str, object]) -> None:
    module = upstream(**options)
    side = 28 * 2 ** (len(module.layers) - 1)
    assert_parity(module, torch.randn(2, module.layers[0][0].conv.in_channels, side, side))


def test_parity_at_224_pixels() -> None:
    assert_parity(upstream(depth=(1, 1, 2, 1), heads=(1, 2, 2, 1)), torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("size", [(112, 112), (112, 56), (53, 111)], ids=str)
def test_parity_at_sizes_where_the_last_stage_has_several_windows_or_ragged_edges(size: tuple[int, int]) -> None:
    """The attention between windows of the last stage, unused at 56 pixels, is at work here (S4)."""
    assert_parity(upstream(), torch.randn(1, 3, *size))


def test_upstream_ignores_window_size_and_head_dim_and_narrows_reads_what_it_built() -> None:
    """S1: asked for windows of 4 and 2 and heads of 64, upstream builds 7 and 32."""
    module = upstream(window_size=(4, 2), dim_head=64)
    assert [stage[2].layers[0][0].window_size for stage in module.layers] == [7, 7]
    converted = from_upstream(module)
    attention = [block.attention for stage in converted.stages for block in stage.blocks]
    assert {layer.window_size for layer in attention} == {7}
    assert {layer.qkv.out_features // layer.heads for layer in attention} == {3 * 32}


def test_large_activations_in_float16_are_right_where_the_norm_of_upstream_overflows() -> None:
    """S7: a variance above 65504 becomes infinite there, and the token zero."""
    module = upstream(depth=(1,), heads=(1,))
    theirs = module.layers[0][2].layers[0][1].net[0]
    ours = from_upstream(module).stages[0].blocks[0].feed_forward_norm
    x = 300 * torch.randn(2, 8, 7, 7).half()
    oracle = theirs.double()(x.double())
    norm = ours.half()(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (norm.double() - oracle).abs().max() < 0.01
    assert (theirs.half()(x).double() - oracle).abs().max() > 0.5


def test_half_precision_answers_in_half_precision() -> None:
    """S7: the norm of upstream, its weights in float32 as under autocast, answers bfloat16 with float32."""
    module = upstream()
    assert module.layers[0][2].layers[0][1].net[0](torch.randn(1, 8, 7, 7).bfloat16()).dtype == torch.float32
    converted = from_upstream(module)
    expected = converted(images := torch.randn(2, 3, 56, 56))
    for dtype in (torch.bfloat16, torch.float16):
        logits = copy.deepcopy(converted).to(dtype)(images.to(dtype))
        assert logits.dtype == dtype
        # Two blocks of some ten roundings each.
        assert (logits.float() - expected).abs().max() <= 20 * torch.finfo(dtype).eps * expected.abs().max()
