import copy
from collections.abc import Callable

import pytest
import torch
import vit_pytorch.ats_vit
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument
from narrows.models import ATSViT
from tests.support import assert_close, gradients, parameter_gradients

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 24}


def upstream(**kwargs: object) -> nn.Module:
    """Small, its norms and biases random: upstream starts them at one and zero."""
    torch.manual_seed(0)
    module = vit_pytorch.ats_vit.ViT(**{**SIZES, "max_tokens_per_depth": (16, 6, 6), "dim_head": 8, **kwargs}).eval()
    for parameter in (p for p in module.parameters() if p.ndim == 1):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def in_narrows_layout(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream gradients under the names of narrows: a copy that holds them as weights is converted."""
    holder = copy.deepcopy(module)
    holder.load_state_dict(values)
    return dict(from_upstream(holder).named_parameters())


def assert_parity(module: nn.Module, images: Tensor) -> None:
    converted = from_upstream(module)
    assert isinstance(converted, ATSViT)

    def seeded(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(images)

    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    output, expected = seeded(converted, ours), seeded(module, theirs)
    assert_close(output, expected)
    assert_close(*gradients(output, ours), *gradients(expected, theirs))

    expected_gradients = in_narrows_layout(module, dict(parameter_gradients(module, seeded(module, images))))
    found = parameter_gradients(converted, seeded(converted, images))
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected_gradients[name])
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens_per_depth": (6, 6, 6)},
        {"max_tokens_per_depth": (20, 16, 3)},
        {"max_tokens_per_depth": (16, 16, 16)},
        {"depth": 1, "max_tokens_per_depth": (1,)},
        {"channels": 1, "num_classes": 1},
        {"heads": 3, "dim_head": 5, "mlp_dim": 7},
        {"patch_size": 4, "max_tokens_per_depth": (33, 33, 33)},
        {"dropout": 0.3, "emb_dropout": 0.2},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_upstream_for_the_same_seed(options: dict[str, object]) -> None:
    module = upstream(**options)
    assert_parity(module, torch.randn(4, options.get("channels", 3), 32, 32))


@pytest.mark.parametrize("seed", range(3))
def test_several_samplings_in_a_row(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Upstream draws noise as wide as the tokens that are left; given the first columns of ours it does the same."""
    draw = vit_pytorch.ats_vit.sample_gumbel
    arriving = {12: 16, 8: 12, 4: 8}
    sampled = []

    def as_wide_as_the_capacity(shape: torch.Size, **kwargs: object) -> Tensor:
        sampled.append(shape[1])
        return draw((*shape[:2], arriving[shape[1]]), **kwargs)[..., : shape[2]]

    monkeypatch.setattr(vit_pytorch.ats_vit, "sample_gumbel", as_wide_as_the_capacity)
    module = upstream(max_tokens_per_depth=(12, 8, 4))
    torch.manual_seed(seed)
    assert_parity(module, torch.randn(1, 3, 32, 32))
    assert len(set(sampled)) > 1, "fewer than two blocks sampled"


def test_dropout_rates_carry_over() -> None:
    converted = from_upstream(upstream(dropout=0.3, emb_dropout=0.2))
    rates = {name: module.p for name, module in converted.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("embedding_dropout") == 0.2
    assert set(rates.values()) == {0.3}
    assert {block.attention.dropout for block in converted.blocks} == {0.3}


def test_a_grid_that_is_not_square_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match="module: expected square patches on a square grid, got 8 patches of 8 x 8"
    ):
        from_upstream(upstream(image_size=(32, 16), max_tokens_per_depth=(8, 8, 8)))
    with pytest.raises(InvalidArgument, match="got 16 patches of 8 x 4"):
        from_upstream(upstream(image_size=(32, 16), patch_size=(8, 4)))
