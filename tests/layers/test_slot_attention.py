"""SlotAttention: initial slots, calls, heads, mixed precision, routing, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slot_attention import MultiHeadSlotAttention as UpstreamMultiHead
from slot_attention import SlotAttention as Upstream
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from narrows.checkpoints import from_upstream
from narrows.errors import InvalidArgument, NarrowsError
from narrows.layers.slot_attention import LearnedSlots, SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.support import assert_close

LAYERS = {
    "SlotAttention": SlotAttention,
    "TwoWaySlotAttention": TwoWaySlotAttention,
}
both_layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
Build = Callable[..., nn.Module]


@both_layers
def test_initial_slots_are_one_normal_sample_around_the_shared_mean(build: Build) -> None:
    layer, tokens = build(8, num_slots=5, slot_dim=6), torch.randn(2, 9, 8)
    torch.manual_seed(11)
    seeded = layer(tokens)
    generated = layer(tokens, generator=torch.Generator().manual_seed(11))
    torch.manual_seed(11)
    noise = torch.randn(2, 5, 6)
    slots = layer.initial_slots.mean + layer.initial_slots.log_scale.exp() * noise
    given = layer(tokens, slots=slots)
    for a, b, c in zip(seeded, generated, given, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(layer(tokens).slots, layer(tokens).slots)  # published: evaluation draws too


@both_layers
def test_one_seed_gives_the_same_slots_in_every_precision(build: Build) -> None:
    layer, tokens = build(8, num_slots=5).double(), torch.randn(2, 9, 8)
    expected = layer(tokens.double(), generator=torch.Generator().manual_seed(3)).slots
    layer.float()
    assert_close(layer(tokens, generator=torch.Generator().manual_seed(3)).slots, expected.float())


def test_parameters_are_drawn_as_published() -> None:
    """Glorot mean and scale of the shape [1, D], not a unit normal mean as upstream has."""
    torch.manual_seed(0)
    layer = SlotAttention(64, num_slots=7)
    bound = math.sqrt(6 / 65)
    for parameter in (layer.initial_slots.mean, layer.initial_slots.log_scale):
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert Upstream(7, 64).slots_mu.std() > 3 * layer.initial_slots.mean.std()
    assert_close(layer.gru.weight_hh.T @ layer.gru.weight_hh, torch.eye(64))
    assert layer.to_q.bias is layer.to_k.bias is layer.to_v.bias is None
    before = layer.to_q.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.to_q.weight)


@both_layers
def test_num_slots_may_change_from_call_to_call(build: Build) -> None:
    layer, tokens = build(8, num_slots=5, slot_dim=6).double(), torch.randn(2, 9, 8).double()
    slots = torch.randn(2, 3, 6).double()
    assert layer(tokens, num_slots=2).slots.shape == (2, 2, 6)
    assert layer(tokens, slots=slots, num_slots=3).attention.shape == (2, 3, 9)
    single = layer(tokens, num_slots=1)  # one slot takes every token
    assert_close(single.attention, torch.ones(2, 1, 9).double())


@both_layers
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(build: Build) -> None:
    layer, tokens, slots = build(8, num_slots=4).double(), torch.randn(3, 9, 8).double(), torch.randn(3, 4, 8).double()
    together = layer(tokens, slots=slots)
    for index in range(3):
        alone = layer(tokens[index : index + 1], slots=slots[index : index + 1])
        for a, b in zip(alone, together, strict=True):
            assert_close(a, b[index : index + 1], 1e-10)


@pytest.mark.parametrize("joint_heads", [False, True])
@pytest.mark.parametrize("head_dim", [None, 3])
def test_attention_divides_each_real_token_among_the_slots(joint_heads: bool, head_dim: int | None) -> None:
    layer = SlotAttention(8, num_slots=5, heads=4, head_dim=head_dim, joint_heads=joint_heads)
    tokens, mask = torch.randn(2, 9, 8), torch.rand(2, 9) > 0.4
    slots = torch.randn(2, 5, 8)
    attention = layer(tokens, mask, slots).attention
    weights = layer.routing(tokens, mask, slots).weights
    assert (attention >= 0).all()
    assert_close(attention.sum(1), mask.float())
    assert weights.shape == (2, 4, 5, 9)
    assert_close(weights.sum((1, 2)), mask.float() * (1 if joint_heads else 4))
    assert_close(weights.sum(1) if joint_heads else weights.mean(1), attention)


def test_two_way_routing_is_the_attention() -> None:
    layer, tokens, slots = TwoWaySlotAttention(8, num_slots=5), torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    mask = torch.rand(2, 9) > 0.4
    output, routing = layer(tokens, mask, slots), layer.routing(tokens, mask, slots)
    assert routing.carriers == "slots"
    assert torch.equal(routing.weights.squeeze(1), output.attention)
    assert_close(output.attention.sum(1), mask.float())


@both_layers
@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_a_float32_layer_reads_bfloat16_tokens_where_upstream_raises(build: Build, impl: str) -> None:
    layer, tokens, slots = build(8, num_slots=4, impl=impl), torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 4, 8)
    output, expected = layer(tokens, slots=slots), layer(tokens.float(), slots=slots)
    assert output.slots.dtype == output.attention.dtype == torch.float32
    for value, float32 in zip(output, expected, strict=True):
        assert_close(value.float(), float32, 16 * torch.finfo(torch.bfloat16).eps)
    with pytest.raises(RuntimeError):
        Upstream(4, 8)(tokens)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
def test_a_float16_layer_stays_finite_where_upstream_divides_zero_by_zero(impl: str) -> None:
    torch.manual_seed(0)
    upstream = Upstream(4, 8).half()
    with torch.no_grad():  # one slot takes all, the others' attention underflows
        upstream.to_q.weight *= 100
        upstream.to_k.weight.zero_()
        upstream.to_k.bias.fill_(100)
    layer = from_upstream(upstream)
    layer.impl = impl
    tokens = torch.randn(2, 9, 8).half().requires_grad_()
    assert upstream(tokens).isnan().any()
    output = layer(tokens)
    assert output.attention.amax(2).amin() == 0
    output.slots.sum().backward()
    for tensor in (*output, tokens.grad, *(parameter.grad for parameter in layer.parameters())):
        assert torch.isfinite(tensor).all()


def test_padding_is_ignored_where_upstream_reads_it() -> None:
    upstream = Upstream(4, 8)
    layer, tokens = from_upstream(upstream), torch.randn(2, 20, 8)
    padded, mask = nn.functional.pad(tokens, (0, 0, 0, 44)), (torch.arange(64) < 20).expand(2, 64)

    def seeded(module: nn.Module, *inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        output = module(*inputs)
        return output if isinstance(output, Tensor) else output.slots

    alone = seeded(upstream, tokens)
    assert (seeded(upstream, padded) - alone).norm() > 0.05 * alone.norm()
    assert_close(seeded(layer, padded, mask), alone)


@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_operations_and_less_saved_than_upstream(heads: int) -> None:
    upstream = Upstream(7, 64) if heads == 1 else UpstreamMultiHead(7, 64, heads=2, dim_head=32)
    layer, tokens = from_upstream(upstream), torch.randn(1, 1369, 64, requires_grad=True)

    def cost(module: nn.Module) -> tuple[int, int]:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = module(tokens)
            (output if isinstance(output, Tensor) else output.slots).sum().backward()
        return flops.get_total_flops(), sum(saved.values())

    (our_flops, our_bytes), (their_flops, their_bytes) = cost(layer), cost(upstream)
    assert our_flops < their_flops
    assert our_bytes < their_bytes / 1.5


@pytest.mark.compiled  # jaxtyping would speak first
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"num_slots": 2.0}, "num_slots: expected a positive integer, got 2.0"),
        ({"num_iterations": 0}, "num_iterations: expected a positive integer, got 0"),
        ({"slot_dim": -1}, "slot_dim: expected a positive integer, got -1"),
        ({"mlp_dim": 0}, "mlp_dim: expected a positive integer, got 0"),
        ({"heads": 3}, "heads: expected a divisor of slot_dim = 8, got 3. Or give head_dim."),
        ({"head_dim": 0}, "head_dim: expected a positive integer, got 0"),
    ],
    ids=str,
)
def test_messages_of_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        SlotAttention(8, **{"num_slots": 4, **arguments})


@pytest.mark.compiled  # jaxtyping would speak first
@both_layers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(2, 9)}, r"tokens: expected shape \[B, N, D\] with D = 8, got shape \(2, 9\)"),
        ({"tokens": torch.zeros(2, 9, 8).long()}, r"tokens: expected a floating-point tensor \[B, N, D\] with D = 8"),
        ({"mask": torch.ones(2, 9)}, "mask: expected a boolean tensor, True at real tokens, got dtype torch.float32"),
        ({"slots": torch.zeros(2, 3, 7)}, r"slots: expected shape \[B, K, S\] with D = 8, got shape \(2, 3, 7\)"),
        ({"slots": torch.zeros(1, 3, 8)}, "slots: expected as many samples as tokens, 2, got 1"),
        ({"slots": torch.zeros(2, 3, 8), "num_slots": 4}, "num_slots: expected None or the 3 slots given, got 4"),
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages_of_a_call(build: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        build(8, num_slots=4)(**{"tokens": torch.zeros(2, 9, 8), **arguments})


def test_learned_slots_are_deterministic_and_learn() -> None:
    layer = SlotAttention(12, num_slots=4, slot_dim=16, initial_slots=LearnedSlots(4, 16))
    tokens = torch.randn(2, 9, 12)
    first, second = layer(tokens).slots, layer(tokens).slots
    assert torch.equal(first, second)
    first.square().sum().backward()
    assert (layer.initial_slots.slots.grad.abs().sum(1) > 0).all()
    given = torch.randn(2, 6, 16)
    assert not torch.equal(layer(tokens, slots=given).slots[:, :4], first)
    with pytest.raises(InvalidArgument, match="num_slots: expected None or the 4 learned, got 5"):
        layer(tokens, num_slots=5)
