from typing import NamedTuple

import pytest
import soft_moe_pytorch as upstream
import torch
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, SoftMoE
from tests.support import assert_close, gradients

IMPLS = ("reference", "shared", "chunked")


def convert(module: nn.Module) -> SoftMoE | DynamicSlotsSoftMoE:
    converted = from_upstream(module)
    assert isinstance(converted, SoftMoE | DynamicSlotsSoftMoE)
    return converted


def randomized(module: nn.Module) -> nn.Module:
    """Gains that are not 1, so that a gain left out is seen."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.eval()


class Pair(NamedTuple):
    """A parameter of upstream, ours that holds it, and which expert's it is."""

    theirs: Tensor
    ours: Tensor
    expert: int | None

    def part(self, gradient: Tensor) -> Tensor:
        """The part of our parameter's gradient that belongs to upstream's."""
        if self.expert is None:
            return gradient
        return gradient[self.expert]


def pairs(ours: SoftMoE | DynamicSlotsSoftMoE, theirs: nn.Module) -> list[Pair]:
    found = []
    for name, parameter in theirs.named_parameters():
        if ".experts." in f".{name}":
            index, position, kind = name.split(".")[-3:]
            stacked = getattr(ours.experts.expand if position == "0" else ours.experts.contract, kind)
            found.append(Pair(parameter, stacked, int(index)))
        elif name == "norm.gamma":
            found.append(Pair(parameter, ours.norm_tokens.weight, None))
        elif name.endswith("gamma"):
            found.append(Pair(parameter, ours.norm_slots.weight, None))
        else:
            found.append(Pair(parameter, ours.slots if name == "slot_embeds" else ours.to_slots.weight, None))
    return found


def assert_parity(theirs: nn.Module, x: Tensor, mask: Tensor | None = None) -> None:
    """Outputs at real tokens and every gradient, of the input and of each parameter."""
    ours = convert(theirs)
    matched = pairs(ours, theirs)
    assert {id(pair.ours) for pair in matched} == {id(parameter) for parameter in ours.parameters()}
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(a, mask=mask) * (1 if mask is None else mask[..., None])
    wanted = gradients(expected, a, *(pair.theirs for pair in matched))
    for impl in IMPLS:
        ours.impl = impl
        output = ours(b, mask)
        assert_close(output, expected)
        got = gradients(output, b, *(pair.ours for pair in matched))
        assert_close(got[0], wanted[0])
        for pair, ours_gradient, theirs_gradient in zip(matched, got[1:], wanted[1:], strict=True):
            assert_close(pair.part(ours_gradient), theirs_gradient)


@pytest.mark.parametrize("geglu", [False, True], ids=["gelu", "geglu"])
@pytest.mark.parametrize("num_tokens", [1, 12, 13], ids="{} tokens".format)
@pytest.mark.parametrize(
    "options", [{"num_slots": 2}, {"seq_len": 14}, {"num_slots": 3, "use_layernorm": True}], ids=str
)
def test_soft_moe(options: dict[str, object], geglu: bool, num_tokens: int) -> None:
    theirs = upstream.SoftMoE(16, num_experts=4, geglu=geglu, expert_mult=3, **options)
    assert_parity(randomized(theirs), torch.randn(2, num_tokens, 16))


@pytest.mark.parametrize("geglu", [False, True], ids=["gelu", "geglu"])
@pytest.mark.parametrize("num_tokens", [1, 3, 12, 13], ids="{} tokens".format)
@pytest.mark.parametrize("num_experts", [1, 4, 5], ids="{} experts".format)
def test_dynamic_slots_soft_moe(num_experts: int, geglu: bool, num_tokens: int) -> None:
    theirs = upstream.DynamicSlotsSoftMoE(16, num_experts=num_experts, geglu=geglu, expert_mult=3)
    assert_parity(randomized(theirs), torch.randn(2, num_tokens, 16))


@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=str)
def test_images(size: tuple[int, int]) -> None:
    assert_parity(randomized(upstream.DynamicSlotsSoftMoE(16, num_experts=4)), torch.randn(2, 16, *size))
    assert_parity(randomized(upstream.SoftMoE(16, num_experts=4, num_slots=2)), torch.randn(2, 16, *size))


def test_a_mask_with_holes_where_slots_are_parameters() -> None:
    mask = torch.rand(2, 13) < 0.6
    assert_parity(randomized(upstream.SoftMoE(16, num_experts=4, num_slots=2)), torch.randn(2, 13, 16), mask)


def test_a_padded_batch_where_slots_are_dynamic() -> None:
    """Upstream counts segments by position, narrows by real token: the same as long as padding comes last."""
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    assert_parity(randomized(upstream.DynamicSlotsSoftMoE(16, num_experts=4)), torch.randn(2, 13, 16), mask)


def test_upstream_loses_segments_to_holes_and_narrows_does_not() -> None:
    theirs = randomized(upstream.DynamicSlotsSoftMoE(16, num_experts=4))
    ours, x, mask = convert(theirs), torch.randn(1, 16, 16), torch.arange(16)[None] % 2 == 0
    alone = theirs(x[:, ::2])
    assert_close(ours(x, mask)[:, ::2], alone)
    assert (theirs(x, mask=mask)[:, ::2] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("geglu", [False, True], ids=["gelu", "geglu"])
@pytest.mark.parametrize("dim", [7, 16, 48])
@pytest.mark.parametrize("mult", [0.3, 1, 2.7, 4])
def test_hidden_widths_survive_rounding(dim: int, mult: float, geglu: bool) -> None:
    theirs = upstream.DynamicSlotsSoftMoE(dim, num_experts=2, expert_mult=mult, geglu=geglu)
    assert_close(convert(theirs)(torch.ones(1, 3, dim)), theirs(torch.ones(1, 3, dim)))


def test_distributed_experts_are_refused() -> None:
    with pytest.raises(
        InvalidArgument, match="module: expected a SoftMoE whose experts are on one machine, got is_distributed=True"
    ):
        convert(upstream.SoftMoE(16, num_experts=2, num_slots=1, is_distributed=True))


def test_a_layer_without_slots_is_refused() -> None:
    """Upstream gives `seq_len // num_experts` slots: none here, and its output is all zeros (M12)."""
    theirs = upstream.SoftMoE(16, num_experts=4, seq_len=3)
    assert (theirs(torch.randn(1, 3, 16)) == 0).all()
    with pytest.raises(
        InvalidArgument, match="module: expected a SoftMoE with at least one slot for each expert, got 0 slots"
    ):
        convert(theirs)
