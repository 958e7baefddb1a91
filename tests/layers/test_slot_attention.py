"""SlotAttention: its implementations against loops, initial slots, calls, heads, precision, routing, errors."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_attention import MultiHeadSlotAttention as UpstreamMultiHead
from slot_attention import SlotAttention as Upstream
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from narrows.checkpoints import from_upstream
from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType, NarrowsError
from narrows.layers.initial_slots import GaussianSlots, LearnedSlots
from narrows.layers.slot_attention import IMPLEMENTATIONS, NormedSlotAttention, SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.support import assert_close, assert_within_budget_on_average, gradients

LAYERS = {
    "SlotAttention": SlotAttention,
    "TwoWaySlotAttention": TwoWaySlotAttention,
}
both_layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
Build = Callable[..., nn.Module]

FORMS: dict[str, dict[str, Any]] = {
    "one head": {},
    "biases": {"qkv_bias": True},
    "heads": {"heads": 2},
    "heads and output": {"heads": 2, "head_dim": 3, "qkv_bias": True},
    "joint heads": {"heads": 3, "head_dim": 3, "joint_heads": True},
    "normed state, no MLP": {"normed_state": True, "mlp_dim": 0},
}


def make(form: str, D: int = 6, K: int = 4, S: int = 4, **options: Any) -> SlotAttention:
    """A layer in float64, every parameter of which matters."""
    options = {"mlp_dim": 7, **FORMS[form], **options}
    kind = NormedSlotAttention if options.pop("normed_state", False) else SlotAttention
    layer = kind(D, num_slots=K, slot_dim=S, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return layer


def draw(B: int = 2, N: int = 9, D: int = 6, K: int = 4, S: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens and initial slots in float64."""
    return torch.randn(B, N, D).double(), torch.randn(B, K, S).double()


def ragged(B: int, N: int) -> Tensor:
    """A mask with holes; the first sample has one token only."""
    mask = torch.rand(B, N) > 0.4
    mask[0], mask[:, N // 2] = False, True
    return mask


def linear(x: Tensor, module: nn.Module) -> Tensor:
    return x @ module.weight.T if module.bias is None else x @ module.weight.T + module.bias


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gru_step(u: Tensor, s: Tensor, cell: nn.Module) -> Tensor:
    i_r, i_z, i_n = (u @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    h_r, h_z, h_n = (s @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    new, z = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n), torch.sigmoid(i_z + h_z)
    return (1 - z) * new + z * s


def feed_forward(x: Tensor, mlp: nn.Module) -> Tensor:
    return linear(linear(normalize(x, mlp.norm), mlp.expand).relu(), mlp.contract)


def plain(
    layer: nn.Module, tokens: Tensor, slots: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The textbook formula for one sample after another, on its real tokens alone, in whatever precision they have."""
    H = layer.heads
    all_slots, all_attention = [], []
    for b in range(len(tokens)):
        keep = torch.ones(tokens.shape[1], dtype=torch.bool) if mask is None else mask[b]
        x, s = normalize(tokens[b, keep], layer.norm_tokens), slots[b]
        k, v = linear(x, layer.to_k).chunk(H, -1), linear(x, layer.to_v).chunk(H, -1)
        for _ in range(layer.num_iterations):
            normed = normalize(s, layer.norm_slots)
            q = linear(normed, layer.to_q).chunk(H, -1)
            logits = torch.stack([q[h] @ k[h].T / q[h].shape[-1] ** 0.5 / temperature for h in range(H)])
            shape = logits.shape
            attention = logits.flatten(0, 1).softmax(0).view(shape) if layer.joint_heads else logits.softmax(1)
            mean = (attention + 1e-8) / (attention + 1e-8).sum(-1, keepdim=True)
            u = torch.cat([mean[h] @ v[h] for h in range(H)], -1)
            before = normed if layer.normed_state else s
            s = gru_step(u if layer.to_out is None else linear(u, layer.to_out), before, layer.gru)
            s = s if layer.mlp is None else s + feed_forward(s, layer.mlp)
        full = torch.zeros(shape[1], tokens.shape[1], dtype=s.dtype)
        full[:, keep] = attention.sum(0) if layer.joint_heads else attention.mean(0)
        all_slots.append(s)
        all_attention.append(full)
    return torch.stack(all_slots), torch.stack(all_attention)


def outputs_and_gradients(layer: nn.Module, function: Any, tokens: Tensor, slots: Tensor) -> list[Tensor]:
    """All outputs, and the gradients of tokens, slots and parameters, for a projection of the outputs."""
    tokens, slots = tokens.detach().requires_grad_(), slots.detach().requires_grad_()
    outputs = function(tokens, slots)
    parameters = [p for name, p in layer.named_parameters() if "initial_slots" not in name]
    total = torch.cat([output.flatten() for output in outputs]).double()
    of_tokens, of_slots, *of_parameters = gradients(total, tokens, slots, *parameters)
    of_parameters = torch.cat([gradient.flatten() for gradient in of_parameters])
    return [*(output.detach() for output in outputs), of_tokens, of_slots, of_parameters]


def called(layer: nn.Module, impl: str, mask: Tensor | None = None) -> Any:
    """The layer as a function of tokens and slots."""
    layer.impl = impl
    return lambda tokens, slots: layer(tokens, mask, slots)


@every_implementation
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_implementation_is_algorithm_1(impl: str, form: str, masked: bool) -> None:
    layer, (tokens, slots) = make(form, impl=impl), draw()
    mask = ragged(2, 9) if masked else None
    ours, theirs = layer(tokens, mask, slots, temperature=0.7), plain(layer, tokens, slots, mask, 0.7)
    for value, expected in zip(ours, theirs, strict=True):
        assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("form", ["heads and output", "joint heads"])
def test_gradcheck(impl: str, form: str) -> None:
    layer = make(form, D=3, K=2, S=3, num_iterations=2, impl=impl)
    tokens, slots = draw(N=5, D=3, K=2, S=3)
    mask = ragged(2, 5)

    def function(tokens: Tensor, slots: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(tokens, mask, slots))

    parameters = [p for name, p in layer.named_parameters() if "initial_slots" not in name]
    assert torch.autograd.gradcheck(function, (tokens.requires_grad_(), slots.requires_grad_(), *parameters))


@pytest.mark.parametrize("impl", ["mixed", "absorbed"])
def test_twice_differentiable(impl: str) -> None:
    layer = make("joint heads", D=3, K=2, S=2, num_iterations=2, impl=impl)
    tokens, slots = draw(B=1, N=4, D=3, K=2, S=2)
    mask = ragged(1, 4)

    def function(tokens: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(tokens, mask, slots))

    assert torch.autograd.gradgradcheck(function, (tokens.requires_grad_(), slots.requires_grad_()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(list(FORMS)),
    B=st.integers(1, 3),
    N=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 64]),
    D=st.sampled_from([1, 5, 8, 17]),
    K=st.sampled_from([1, 2, 3, 7, 9]),
    S=st.sampled_from([2, 4, 14]),
    masked=st.booleans(),
    strided=st.booleans(),
    T=st.integers(1, 4),
)
def test_implementations_agree(
    form: str, B: int, N: int, D: int, K: int, S: int, masked: bool, strided: bool, T: int
) -> None:
    torch.manual_seed(N * D * K * S)
    layer, (tokens, slots) = make(form, D, K, S, num_iterations=T), draw(B, N, D, K, S)
    mask = torch.rand(B, N) > 0.5 if masked else None
    if strided:
        tokens, slots = tokens.mT.contiguous().mT, slots.repeat_interleave(2, 1)[:, ::2]
    results = [outputs_and_gradients(layer, called(layer, i, mask), tokens, slots) for i in IMPLEMENTATIONS]
    for fast in results[1:]:
        for value, expected in zip(fast, results[0], strict=True):
            assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("impl", ["mixed", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_no_less_exact_than_the_plain_formula(impl: str, dtype: torch.dtype, form: str) -> None:
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        low = make(form, D=16, K=5, S=12).to(dtype)
        tokens, slots = (x.to(dtype) for x in draw(N=63, D=16, K=5, S=12))
        mask = ragged(2, 63) if seed % 2 else None
        exact = deepcopy(low).double()
        draws.append(
            (
                outputs_and_gradients(low, called(low, impl, mask), tokens, slots),
                outputs_and_gradients(low, partial(plain, low, mask=mask), tokens, slots),
                outputs_and_gradients(exact, partial(plain, exact, mask=mask), tokens.double(), slots.double()),
            )
        )
    assert_within_budget_on_average(draws)


@every_implementation
def test_a_mask_is_a_truncation_and_hides_even_nan(impl: str) -> None:
    layer, (tokens, slots) = make("heads"), draw()
    alone = outputs_and_gradients(layer, called(layer, impl), tokens[:, :6], slots)
    tokens[:, 6:] = torch.nan
    mask = (torch.arange(9) < 6).expand(2, 9)
    padded = outputs_and_gradients(layer, called(layer, impl, mask), tokens, slots)
    assert_close(padded[0], alone[0], 1e-10)
    assert torch.equal(padded[1][..., 6:], torch.zeros(2, 4, 3))
    assert_close(padded[1][..., :6], alone[1], 1e-10)
    assert all(torch.isfinite(gradient).all() for gradient in padded[2:])
    assert padded[2][:, 6:].abs().max() == 0


@every_implementation
@pytest.mark.parametrize("empty", ["all masked", "no tokens"])
def test_slots_of_a_sample_without_tokens_have_read_zeros(impl: str, empty: str) -> None:
    layer, (tokens, slots) = make("biases"), draw()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    if empty == "no tokens":
        tokens, mask = tokens[:, :0], None
    results = outputs_and_gradients(layer, called(layer, impl, mask), tokens, slots)
    blind = deepcopy(layer)
    nn.init.zeros_(blind.to_v.weight)
    nn.init.zeros_(blind.to_v.bias)
    assert_close(results[0], blind(torch.zeros(2, 1, 6).double(), slots=slots).slots, 1e-10)
    assert all(torch.isfinite(result).all() for result in results)


@every_implementation
def test_order_of_tokens_and_of_slots(impl: str) -> None:
    layer, (tokens, slots) = make("joint heads", impl=impl), draw()
    expected = layer(tokens, slots=slots)
    of_tokens, of_slots = torch.randperm(9), torch.randperm(4)
    moved = layer(tokens[:, of_tokens], slots=slots[:, of_slots])
    assert_close(moved.slots, expected.slots[:, of_slots], 1e-10)
    assert_close(moved.attention, expected.attention[:, of_slots][..., of_tokens], 1e-10)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_slot_that_wins_nothing_stays_finite_where_eps_underflows(impl: str, dtype: torch.dtype) -> None:
    """Upstream adds 1e-8 in float16, where it is 0: such a slot divides 0 by 0."""
    layer, (tokens, slots) = make("biases", num_iterations=1), draw()
    with torch.no_grad():
        layer.to_k.weight.zero_()
        layer.to_k.bias.fill_(100)
        layer.to_q.weight.zero_()
        layer.to_q.bias.zero_()
        layer.to_q.weight[:, 0] = 100  # the slot with the largest first channel takes every token
    low = layer.to(dtype)
    tokens, slots = tokens.to(dtype), slots.to(dtype)
    results = outputs_and_gradients(low, called(low, impl), tokens, slots)
    assert results[1].amin() == 0
    assert all(torch.isfinite(result).all() for result in results)
    exact = deepcopy(low).double()
    oracle, _ = plain(exact, tokens.double(), slots.double())
    textbook = deepcopy(low).float()
    lost = (plain(textbook, tokens.float(), slots.float())[0] - oracle).abs().max().item()
    assert_close(results[0], oracle, 8 * torch.finfo(dtype).eps + lost)


def test_auto_absorbs_while_it_pays() -> None:
    layer, tokens, slots = SlotAttention(12, num_slots=4), torch.randn(2, 50, 12), torch.randn(2, 4, 12)
    assert layer.implementation(tokens) == layer.implementation(tokens, slots) == "absorbed"  # T * K * H = 12 = D
    assert layer.implementation(tokens, num_iterations=4) == "mixed"
    assert layer.implementation(tokens, num_slots=5) == layer.implementation(tokens, slots.repeat(1, 2, 1)) == "mixed"

    def same(impl: str, T: int) -> bool:
        outputs = []
        for one in ("auto", impl):
            layer.impl = one
            outputs.append(layer(tokens, slots=slots, num_iterations=T).attention)
        return torch.equal(*outputs)

    assert same("absorbed", 3)
    assert not same("mixed", 3)
    assert same("mixed", 4)
    assert not same("absorbed", 4)


def test_what_is_not_plain_is_not_folded() -> None:
    layer, tokens = SlotAttention(16, num_slots=4), torch.randn(2, 9, 16)
    assert layer.implementation(tokens) == "absorbed"
    handle = layer.to_k.register_forward_hook(lambda *_: None)
    assert layer.implementation(tokens) == "mixed"
    layer.impl = "absorbed"
    with pytest.raises(ImplementationUnavailable, match="impl='absorbed' cannot run here: to_k has hooks"):
        layer(tokens)
    handle.remove()
    layer(tokens)
    layer.norm_tokens = nn.RMSNorm(16)
    with pytest.raises(ImplementationUnavailable, match=r"norm_tokens is a torch\.nn\.modules\.normalization\.RMSNorm"):
        layer.implementation(tokens)
    layer.to_q.register_forward_hook(lambda *_: None)  # is called in any case
    layer.impl, layer.norm_tokens = "auto", nn.LayerNorm(16, elementwise_affine=False)
    assert layer.implementation(tokens) == "absorbed"
    slots = torch.randn(2, 4, 16)
    absorbed = layer(tokens, slots=slots)
    layer.impl = "reference"
    assert_close(absorbed.slots, layer(tokens, slots=slots).slots)


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
@every_implementation
def test_a_float32_layer_reads_bfloat16_tokens_where_upstream_raises(build: Build, impl: str) -> None:
    layer, tokens, slots = build(8, num_slots=4, impl=impl), torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 4, 8)
    output, expected = layer(tokens, slots=slots), layer(tokens.float(), slots=slots)
    assert output.slots.dtype == output.attention.dtype == torch.float32
    for value, float32 in zip(output, expected, strict=True):
        assert_close(value.float(), float32, 16 * torch.finfo(torch.bfloat16).eps)
    with pytest.raises(RuntimeError):
        Upstream(4, 8)(tokens)


@both_layers
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tokens_are_converted_to_the_dtype_of_the_layer(build: Build, impl: str, dtype: torch.dtype) -> None:
    for own in (torch.bfloat16, torch.float32, torch.float64):
        layer = build(8, num_slots=4, impl=impl, dtype=own)
        tokens, slots = torch.randn(2, 9, 8).to(dtype), torch.randn(2, 4, 8)
        output, expected = layer(tokens, slots=slots), layer(tokens.to(own), slots=slots)
        assert torch.equal(output.slots, expected.slots)
        assert output.slots.dtype == output.attention.dtype == own
        if isinstance(layer, TwoWaySlotAttention):
            assert output.tokens.dtype == dtype
            assert torch.equal(output.tokens, expected.tokens.to(dtype))


@every_implementation
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
    tokens, upstream = torch.randn(2, 20, 8), Upstream(4, 8)
    layer = from_upstream(upstream)
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
        ({"num_slots": 2.0}, "num_slots: expected an integer or None, got 2.0"),
        ({"num_iterations": 0}, "num_iterations: expected a positive integer, got 0"),
        ({"slot_dim": -1}, "slot_dim: expected a positive integer, got -1"),
        ({"mlp_dim": -1}, "mlp_dim: expected a positive integer, got -1"),
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
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"slots": torch.zeros(2, 3, 7)}, r"slots: expected shape \[B, K, S\] with D = 8, got shape \(2, 3, 7\)"),
        ({"slots": torch.zeros(1, 3, 8)}, "slots: expected as many samples as tokens, 2, got 1"),
        ({"slots": torch.zeros(2, 3, 8), "num_slots": 4}, "num_slots: expected None or the 3 slots given, got 4"),
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"tokens": torch.zeros(2, 7, 3, 3)}, r"tokens: expected images \[B, 8, H, W\], got shape \(2, 7, 3, 3\)"),
        (
            {"tokens": torch.zeros(2, 8, 3, 3), "mask": torch.ones(2, 9).bool()},
            r"mask: expected shape \[B, H, W\] = \(2, 3, 3\), got shape \(2, 9\)",
        ),
        ({"slot_mask": torch.ones(2, 3).bool()}, r"slot_mask: expected shape \[B, K\] = \(2, 4\), got shape \(2, 3\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages_of_a_call(build: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        build(8, num_slots=4)(**{"tokens": torch.zeros(2, 9, 8), **arguments})


@both_layers
def test_routing_is_forward_from_the_same_start(build: Build) -> None:
    layer, tokens = build(8, num_slots=5), torch.randn(2, 12, 8)
    for start in ({"slots": torch.randn(2, 5, 8)}, {"generator": 3}):

        def fresh(start: dict[str, Any] = start) -> dict[str, Any]:
            return start if "slots" in start else {"generator": torch.Generator().manual_seed(3)}

        more = {"num_iterations": 2, "slot_mask": torch.rand(2, 5) > 0.3, "mask": torch.rand(2, 12) > 0.3}
        routing, attention = layer.routing(tokens, **fresh(), **more), layer(tokens, **fresh(), **more).attention
        assert torch.equal(routing.with_grid((3, 4)).maps().flatten(2), attention)
    assert not torch.equal(layer.routing(tokens).weights, layer.routing(tokens).weights)
    assert "give both the same `slots`, or a `generator`" in layer.routing.__doc__.replace("\n        ", " ")


@pytest.mark.parametrize("joint_heads", [False, True])
@pytest.mark.parametrize("head_dim", [None, 3])
def test_maps_are_the_masks_of_forward_whatever_the_heads(joint_heads: bool, head_dim: int | None) -> None:
    layer = SlotAttention(8, num_slots=5, heads=2, head_dim=head_dim, joint_heads=joint_heads)
    images, slots = torch.randn(2, 8, 3, 4), torch.randn(2, 5, 8)
    maps = layer.routing(images, slots=slots).maps()
    assert_close(maps.flatten(2), layer(images, slots=slots).attention)
    assert_close(maps.sum(1), torch.ones(2, 3, 4))


@both_layers
@every_implementation
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_is_its_pixels_row_by_row(build: Build, impl: str, masked: bool) -> None:
    layer, images, slots = build(8, num_slots=4, impl=impl), torch.randn(2, 8, 3, 5), torch.randn(2, 4, 8)
    mask = torch.rand(2, 3, 5) > 0.4 if masked else None
    output = layer(images, mask, slots)
    expected = layer(images.flatten(2).mT, None if mask is None else mask.flatten(1), slots)
    assert torch.equal(output.slots, expected.slots)
    assert torch.equal(output.attention, expected.attention)
    if isinstance(layer, TwoWaySlotAttention):
        assert torch.equal(output.tokens, expected.tokens.mT.unflatten(2, (3, 5)))
    routing = layer.routing(images, mask, slots)
    assert routing.grid == (3, 5)
    assert_close(routing.maps().flatten(2), output.attention)
    assert layer.routing(images.flatten(2).mT).grid is None


@both_layers
@every_implementation
@pytest.mark.parametrize("masked", [False, True])
def test_masked_slots_are_as_if_they_were_not_there(build: Build, impl: str, masked: bool) -> None:
    layer, tokens = build(8, num_slots=5, impl=impl).double(), torch.randn(3, 9, 8).double()
    slots, mask = torch.randn(3, 5, 8).double(), ragged(3, 9) if masked else None
    slot_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    slots[1, 0] = torch.nan
    slots.requires_grad_()
    output = layer(tokens, mask, slots, slot_mask=slot_mask)
    for b in range(2):
        real = slot_mask[b]
        alone = layer(tokens[b : b + 1], None if mask is None else mask[b : b + 1], slots[b : b + 1, real])
        assert_close(output.slots[b, real], alone.slots[0], 1e-10)
        assert_close(output.attention[b, real], alone.attention[0], 1e-10)
        if isinstance(layer, TwoWaySlotAttention):
            assert_close(output.tokens[b], alone.tokens[0], 1e-10)
    assert not output.slots[~slot_mask].any()
    assert not output.attention[~slot_mask].any()
    sum(part.square().sum() for part in output).backward()
    assert torch.isfinite(slots.grad).all()
    assert not slots.grad[~slot_mask].any()
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slots_masked_under_one_softmax_over_all_heads(impl: str) -> None:
    layer, (tokens, slots) = make("joint heads", K=5, impl=impl), draw(K=5)
    slot_mask = torch.tensor([[0, 1, 0, 1, 1]]).bool().expand(2, 5)
    output, alone = layer(tokens, slots=slots, slot_mask=slot_mask), layer(tokens, slots=slots[:, [1, 3, 4]])
    assert_close(output.slots[:, [1, 3, 4]], alone.slots, 1e-10)
    assert_close(output.attention[:, [1, 3, 4]], alone.attention, 1e-10)


@both_layers
def test_iterations_of_a_call(build: Build) -> None:
    layer, tokens, slots = build(8, num_slots=4), torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    short = build(8, num_slots=4, num_iterations=1)
    short.load_state_dict(layer.state_dict())
    once, expected = layer(tokens, slots=slots, num_iterations=1), short(tokens, slots=slots)
    for value, wanted in zip(once, expected, strict=True):
        assert torch.equal(value, wanted)
    if isinstance(layer, SlotAttention):  # the second iteration is the first from its slots
        assert_close(
            layer(tokens, slots=slots, num_iterations=2).slots, layer(tokens, slots=once.slots, num_iterations=1).slots
        )
    assert not torch.equal(layer(tokens, slots=slots).slots, once.slots)
    with pytest.raises(InvalidArgument, match="num_iterations: expected a positive integer, got 0"):
        layer(tokens, num_iterations=0)


@both_layers
@every_implementation
def test_temperature_sharpens(build: Build, impl: str) -> None:
    layer, tokens, slots = build(8, num_slots=4, impl=impl), torch.randn(2, 9, 8), torch.randn(2, 4, 8)

    def attention(temperature: float) -> Tensor:
        return layer(tokens, slots=slots, num_iterations=1, temperature=temperature).attention

    assert_close(attention(1e4), torch.full((2, 4, 9), 0.25), 1e-3)
    assert_close(attention(1e-4).amax(1), torch.ones(2, 9))
    assert_close(attention(0.5), (2 * attention(1.0).log()).softmax(1))


class FixedSlots(nn.Module):
    """The least that initial slots must be; knows neither number nor width."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 8)

    def forward(
        self, batch: int, slots: Tensor | None = None, num_slots: int | None = None, generator: Any = None
    ) -> Tensor:
        return self.map(torch.eye(3)).expand(batch, -1, -1) if slots is None else slots


@both_layers
def test_initial_slots_are_a_module_of_anyones(build: Build) -> None:
    mine = FixedSlots()
    before = mine.map.weight.clone()
    layer, tokens = build(8, initial_slots=mine), torch.randn(2, 9, 8)
    assert torch.equal(mine.map.weight, before)  # construction does not draw anew what it is given
    assert layer(tokens).slots.shape == (2, 3, 8)
    assert torch.equal(layer(tokens).slots, layer(tokens).slots)
    layer.reset_parameters()
    assert not torch.equal(mine.map.weight, before)
    learned = LearnedSlots(5, 8)
    layer = build(8, initial_slots=learned)
    assert layer.initial_slots is learned
    assert layer(tokens).slots.shape == (2, 5, 8)
    assert build(8, num_slots=5, initial_slots=learned)(tokens).slots.shape == (2, 5, 8)


@both_layers
def test_initial_slots_must_be_as_many_and_as_wide_as_asked_for(build: Build) -> None:
    for initial_slots in (LearnedSlots(5, 8), GaussianSlots(5, 8)):
        with pytest.raises(InvalidArgument, match="num_slots: expected 5, as the initial_slots have, got 7"):
            build(8, num_slots=7, initial_slots=initial_slots)
        with pytest.raises(InvalidArgument, match="slot_dim: expected 8, as the initial_slots have, got 6"):
            build(8, slot_dim=6, initial_slots=initial_slots)
    with pytest.raises(InvalidArgument, match="num_slots: expected a positive integer, or initial_slots, got None"):
        build(8)


@pytest.mark.compiled  # jaxtyping would speak first
@both_layers
def test_any_integer_is_a_number_of_slots(build: Build) -> None:
    tokens = torch.randn(2, 9, 8)
    of_numpy = build(np.int64(8), num_slots=np.int64(4), slot_dim=np.int16(6), num_iterations=np.int8(2))
    assert torch.compile(of_numpy, fullgraph=True, backend="eager")(tokens).slots.shape == (2, 4, 6)
    layer = build(8, num_slots=4)
    for number in (np.int32(3), np.uint8(3), torch.tensor(3)):
        assert layer(tokens, num_slots=number).slots.shape == (2, 3, 8)
    for number in (True, np.True_, 3.0, "3"):
        with pytest.raises(InvalidType, match="num_slots: expected a positive integer, got"):
            layer(tokens, num_slots=number)


@both_layers
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tokens_in_low_precision(build: Build, impl: str, dtype: torch.dtype) -> None:
    """As near to exact among 65,536 tokens as among 1,024."""
    torch.manual_seed(0)
    exact = build(8, num_slots=4, impl="reference").double()
    low = deepcopy(exact).to(dtype)
    low.impl = impl
    exact.load_state_dict(low.state_dict())
    tokens, slots = torch.randn(1, 65536, 8).to(dtype), torch.randn(1, 4, 8).to(dtype)

    def error(num_tokens: int) -> float:
        output = low(tokens[:, :num_tokens], slots=slots).slots
        return (output.double() - exact(tokens[:, :num_tokens], slots=slots).slots).abs().max().item()

    assert error(65536) <= 2 * error(1024) + 4 * torch.finfo(dtype).eps


@pytest.mark.compiled
@both_layers
def test_exports_with_any_number_of_slots(build: Build) -> None:
    layer, tokens = build(16, num_slots=4).eval(), torch.randn(2, 9, 16)
    batch, tokens_axis, number = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "tokens", "number"))
    arguments = {"tokens": tokens, "slots": torch.randn(2, 4, 16)}
    shapes = {"tokens": {0: batch, 1: tokens_axis}, "slots": {0: batch, 1: number}}
    with torch.no_grad():
        program = torch.export.export(layer, (), kwargs=arguments, dynamic_shapes=shapes).module()
        for num_slots in (2, 7, 30):
            others = {"tokens": torch.randn(3, 12, 16), "slots": torch.randn(3, num_slots, 16)}
            for value, expected in zip(program(**others), layer(**others), strict=True):
                assert_close(value, expected)

        arguments, shapes = (
            {"tokens": tokens, "num_slots": 4},
            {"tokens": {0: batch}, "num_slots": torch.export.Dim.DYNAMIC},
        )
        program = torch.export.export(layer, (), kwargs=arguments, dynamic_shapes=shapes).module()
        for num_slots in (2, 7):
            torch.manual_seed(5)
            output = program(tokens=tokens, num_slots=num_slots)
            torch.manual_seed(5)
            for value, expected in zip(output, layer(tokens, num_slots=num_slots), strict=True):
                assert_close(value, expected)


@pytest.mark.compiled
@both_layers
def test_compiles_with_slots_that_a_generator_drew(build: Build) -> None:
    torch._dynamo.reset()
    layer, tokens = build(16, num_slots=4).eval(), torch.randn(2, 9, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(tokens, generator=torch.Generator().manual_seed(3))
    slots = layer.initial_slots(2, generator=torch.Generator().manual_seed(3))
    slot_mask = torch.ones(2, 4, dtype=torch.bool)
    for value, wanted in zip(compiled(tokens, slots=slots, slot_mask=slot_mask), expected, strict=True):
        assert_close(value, wanted)
    with pytest.raises(torch._dynamo.exc.Unsupported):  # torch cannot; it says so itself
        compiled(tokens, generator=torch.Generator().manual_seed(3))


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
