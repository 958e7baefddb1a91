"""TwoWaySlotAttention: its implementations against loops, what upstream's form loses; what it shares with SlotAttention
is tested there."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_attention import SlotAttentionExperimental as Upstream
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from narrows.checkpoints import from_upstream
from narrows.costs import peak_memory
from narrows.errors import ImplementationUnavailable, NarrowsError
from narrows.layers.slot_attention import IMPLEMENTATIONS
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.layers.test_slot_attention import called, draw, feed_forward, gru_step, linear, normalize, ragged
from tests.support import assert_close, assert_within_budget_on_average, gradients

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
both_normalizations = pytest.mark.parametrize("per", ["slots", "tokens"])


def make(D: int = 6, K: int = 4, S: int = 4, M: int = 7, T: int = 2, **options: Any) -> TwoWaySlotAttention:
    """A layer in float64, every parameter of which matters."""
    layer = TwoWaySlotAttention(D, num_slots=K, slot_dim=S, mlp_dim=M, num_iterations=T, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return layer


def away_from_the_kink(layer: TwoWaySlotAttention) -> TwoWaySlotAttention:
    """A layer in which no rounding takes a unit across ReLU's kink, where the gradient of any formula jumps."""
    for side in (layer.slots_read, layer.tokens_read):
        side.mlp.expand.bias.data.copy_(6 * side.mlp.expand.bias.data.sign())
    return layer


def plain(
    layer: TwoWaySlotAttention,
    tokens: Tensor,
    slots: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample after another, on its real tokens alone, in whatever precision they have."""

    def logits_and_values(readers: Tensor, read: Tensor, side: nn.Module) -> tuple[Tensor, Tensor]:
        q, read = linear(normalize(readers, side.norm_readers), side.to_q), normalize(read, side.norm_read)
        return q @ linear(read, side.to_k).T / q.shape[-1] ** 0.5 / temperature, linear(read, side.to_v)

    def update(readers: Tensor, u: Tensor, side: nn.Module) -> Tensor:
        readers = gru_step(u, readers, side.gru)
        return gru_step(feed_forward(readers, side.mlp), readers, side.mlp_gru)

    results = []
    for b in range(len(tokens)):
        keep = torch.ones(tokens.shape[1], dtype=torch.bool) if mask is None else mask[b]
        x, s = normalize(tokens[b, keep], layer.norm_tokens), slots[b]
        for _ in range(layer.num_iterations):
            logits, v = logits_and_values(s, x, layer.slots_read)
            attention = logits.softmax(0)
            s = update(s, (attention + 1e-8) / (attention + 1e-8).sum(1, keepdim=True) @ v, layer.slots_read)
            logits, v = logits_and_values(x, s, layer.tokens_read)
            weights = logits.softmax(1)
            if layer.token_normalization == "tokens":
                weights = (weights + 1e-8) / (weights + 1e-8).sum(0, keepdim=True)
            x = update(x, weights @ v, layer.tokens_read)
        full_x, full_a = x.new_zeros(tokens.shape[1:]), x.new_zeros(len(s), tokens.shape[1])
        full_x[keep], full_a[:, keep] = x, attention
        results.append((s, full_x, full_a))
    return tuple(torch.stack(part) for part in zip(*results, strict=True))


def outputs_and_gradients(layer: nn.Module, function: Any, tokens: Tensor, slots: Tensor) -> list[Tensor]:
    """Slots, tokens, attention, and the gradients of tokens, slots and parameters for a projection of the three."""
    tokens, slots = tokens.detach().requires_grad_(), slots.detach().requires_grad_()
    outputs = function(tokens, slots)
    parameters = [p for name, p in layer.named_parameters() if "initial_slots" not in name]
    total = torch.cat([output.flatten() for output in outputs]).double()
    of_tokens, of_slots, *of_parameters = gradients(total, tokens, slots, *parameters)
    of_parameters = torch.cat([gradient.flatten() for gradient in of_parameters])
    return [*(output.detach() for output in outputs), of_tokens, of_slots, of_parameters]


@every_implementation
@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_implementation_is_the_formula(impl: str, per: str, masked: bool, bias: bool) -> None:
    layer = make(token_normalization=per, qkv_bias=bias, impl=impl)
    (tokens, slots), mask = draw(), ragged(2, 9) if masked else None
    ours, theirs = layer(tokens, mask, slots, temperature=0.7), plain(layer, tokens, slots, mask, 0.7)
    for value, expected in zip(ours, theirs, strict=True):
        assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@both_normalizations
def test_gradcheck(impl: str, per: str) -> None:
    layer, mask = make(D=3, K=2, S=2, M=3, T=1, token_normalization=per, impl=impl), ragged(2, 4)
    tokens, slots = draw(N=4, D=3, K=2, S=2)

    def function(tokens: Tensor, slots: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(tokens, mask, slots))

    parameters = [p for name, p in layer.named_parameters() if "initial_slots" not in name]
    assert torch.autograd.gradcheck(function, (tokens.requires_grad_(), slots.requires_grad_(), *parameters))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    N=st.sampled_from([1, 2, 7, 16, 17, 31]),
    D=st.sampled_from([1, 5, 8, 17]),
    K=st.sampled_from([1, 2, 7, 9]),
    S=st.sampled_from([1, 4, 13]),
    M=st.sampled_from([1, 6, 40]),
    bias=st.booleans(),
    masked=st.booleans(),
    strided=st.booleans(),
    per=st.sampled_from(["slots", "tokens"]),
    T=st.integers(1, 3),
)
def test_implementations_agree(
    B: int, N: int, D: int, K: int, S: int, M: int, bias: bool, masked: bool, strided: bool, per: str, T: int
) -> None:
    torch.manual_seed(N * D * K * S)
    layer, (tokens, slots) = make(D, K, S, M, T, token_normalization=per, qkv_bias=bias), draw(B, N, D, K, S)
    mask = torch.rand(B, N) > 0.5 if masked else None
    if strided:
        tokens, slots = tokens.mT.contiguous().mT, slots.repeat_interleave(2, 1)[:, ::2]
    results = [outputs_and_gradients(layer, called(layer, i, mask), tokens, slots) for i in IMPLEMENTATIONS]
    for fast in results[1:]:
        for value, expected in zip(fast, results[0], strict=True):
            assert_close(value, expected, 1e-10)


@pytest.mark.parametrize("impl", ["mixed", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_normalizations
def test_no_less_exact_than_the_plain_formula(impl: str, dtype: torch.dtype, per: str) -> None:
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        layer = make(D=16, K=5, S=12, M=[16, 40][seed // 4], qkv_bias=True, token_normalization=per)
        low = away_from_the_kink(layer).to(dtype)
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
@both_normalizations
def test_a_mask_is_a_truncation_and_hides_even_nan(impl: str, per: str) -> None:
    layer, (tokens, slots) = make(token_normalization=per, impl=impl), draw()
    expected = layer(tokens[:, :6], slots=slots)
    tokens[:, 6:] = torch.nan
    mask = (torch.arange(9) < 6).expand(2, 9)
    padded = outputs_and_gradients(layer, called(layer, impl, mask), tokens, slots)
    assert_close(padded[0], expected.slots, 1e-10)
    assert_close(padded[1][:, :6], expected.tokens, 1e-10)
    assert_close(padded[2][..., :6], expected.attention, 1e-10)
    assert padded[1][:, 6:].abs().max() == padded[2][..., 6:].abs().max() == padded[3][:, 6:].abs().max() == 0
    assert all(torch.isfinite(gradient).all() for gradient in padded[3:])


@every_implementation
@both_normalizations
@pytest.mark.parametrize("empty", ["all masked", "no tokens"])
def test_slots_of_a_sample_without_tokens_have_read_zeros(impl: str, per: str, empty: str) -> None:
    layer, (tokens, slots) = make(qkv_bias=True, token_normalization=per), draw()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    if empty == "no tokens":
        tokens, mask = tokens[:, :0], None
    results = outputs_and_gradients(layer, called(layer, impl, mask), tokens, slots)
    blind = deepcopy(layer)
    nn.init.zeros_(blind.slots_read.to_v.weight)
    nn.init.zeros_(blind.slots_read.to_v.bias)
    assert_close(results[0], blind(torch.zeros(2, 1, 6).double(), slots=slots).slots, 1e-10)
    assert all(torch.isfinite(result).all() for result in results)


@every_implementation
@both_normalizations
def test_tokens_of_a_sample_without_slots_have_read_zeros(impl: str, per: str) -> None:
    layer, (tokens, slots) = make(qkv_bias=True, token_normalization=per, impl=impl), draw()
    alone = layer(tokens, slots=slots, slot_mask=torch.zeros(2, 4, dtype=torch.bool))
    blind = deepcopy(layer)
    nn.init.zeros_(blind.tokens_read.to_v.weight)
    nn.init.zeros_(blind.tokens_read.to_v.bias)
    assert_close(alone.tokens, blind(tokens, slots=slots).tokens, 1e-10)
    assert not alone.slots.any()
    assert not alone.attention.any()


@every_implementation
def test_order_of_tokens_and_of_slots(impl: str) -> None:
    layer, (tokens, slots) = make(impl=impl), draw()
    expected = layer(tokens, slots=slots)
    of_tokens, of_slots = torch.randperm(9), torch.randperm(4)
    moved = layer(tokens[:, of_tokens], slots=slots[:, of_slots])
    assert_close(moved.slots, expected.slots[:, of_slots], 1e-10)
    assert_close(moved.tokens, expected.tokens[:, of_tokens], 1e-10)
    assert_close(moved.attention, expected.attention[:, of_slots][..., of_tokens], 1e-10)


@every_implementation
def test_what_tokens_read_does_not_vanish_with_their_number(impl: str) -> None:
    """Upstream divides by the sum over all tokens: the slots' part in a token's update shrinks as 1/N."""

    def influence(N: int, per: str) -> float:
        torch.manual_seed(0)
        layer = make(D=16, S=16, K=7, T=1, token_normalization=per, impl=impl)
        tokens, slots = draw(B=1, N=1, D=16, S=16, K=7)
        tokens = tokens.expand(-1, N, -1)
        blind = deepcopy(layer)
        nn.init.zeros_(blind.tokens_read.to_v.weight)
        seeing, unseeing = (each(tokens, slots=slots).tokens for each in (layer, blind))
        return (seeing - unseeing).norm(dim=-1).mean().item()

    assert influence(1024, "slots") == pytest.approx(influence(16, "slots"), rel=1e-6)
    assert influence(1024, "tokens") < influence(16, "tokens") / 32


def test_what_is_not_plain_is_not_folded() -> None:
    layer, tokens = TwoWaySlotAttention(16, num_slots=4, mlp_dim=40), torch.randn(2, 9, 16)
    called_anyway = ["norm_tokens", "slots_read.to_q", "slots_read.gru", "slots_read.mlp.norm", "tokens_read.to_v"]
    for name in called_anyway:
        layer.get_submodule(name).register_forward_hook(lambda *_: None)
    assert layer.implementation(tokens) == "absorbed"
    for name in (
        "slots_read.to_k",
        "slots_read.norm_read",
        "tokens_read.to_q",
        "tokens_read.mlp",
        "tokens_read.mlp.norm",
        "tokens_read.mlp.contract",
        "tokens_read.gru",
    ):
        handle = layer.get_submodule(name).register_forward_hook(lambda *_: None)
        layer.impl = "auto"
        assert layer.implementation(tokens) == "mixed"
        layer.impl = "absorbed"
        with pytest.raises(ImplementationUnavailable, match=f"impl='absorbed' cannot run here: {name} has hooks"):
            layer(tokens)
        handle.remove()
    layer(tokens)
    folding = TwoWaySlotAttention(16, num_slots=4, mlp_dim=20)  # 3 D M < D M + 3 D D: the two maps are one
    assert folding.implementation(tokens) == "absorbed"
    folding.tokens_read.mlp.contract.register_forward_hook(lambda *_: None)
    assert folding.implementation(tokens) == "mixed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_takes_at_most_half_of_upstreams_memory(dtype: torch.dtype) -> None:
    upstream, tokens = Upstream(8, 128).to(dtype), torch.randn(1, 4096, 128, dtype=dtype)

    def peak(module: nn.Module) -> int:
        return peak_memory(lambda: torch.cat([x.flatten() for x in module(tokens)[:2]]).sum().backward())

    assert peak(from_upstream(upstream)) < 0.5 * peak(upstream)


@pytest.mark.parametrize("impl", ["mixed", "absorbed"])
@pytest.mark.parametrize("hidden", [5, 40])
def test_second_derivatives(impl: str, hidden: int) -> None:
    layer, (tokens, slots) = make(D=5, S=4, M=hidden, qkv_bias=True), draw(D=5, S=4)
    mask = ragged(2, 9)

    def second(impl: str) -> Tensor:
        """The gradient of a projection of the gradients."""
        inputs = [tokens.requires_grad_(), slots.requires_grad_()]
        inputs += [parameter for name, parameter in layer.named_parameters() if "initial_slots" not in name]
        outputs = torch.cat([x.flatten() for x in called(layer, impl, mask)(tokens, slots)])
        along = torch.linspace(-1, 2, len(outputs), dtype=torch.float64)
        first = torch.autograd.grad(outputs @ along, inputs, create_graph=True)
        return torch.cat([x.flatten() for x in gradients(torch.cat([x.flatten() for x in first]), *inputs)])

    assert_close(second(impl), second("reference"), 1e-10)


def test_what_tokens_read_does_not_vanish_as_upstreams_does() -> None:
    """Other slots, other tokens: at any number of tokens by default, ever less in upstream's form."""

    def influence(normalization: str, num_tokens: int) -> float:
        torch.manual_seed(0)
        layer = TwoWaySlotAttention(16, num_slots=7, num_iterations=1, token_normalization=normalization)
        slots = torch.randn(2, 7, 16)
        one, other = layer(torch.randn(1, num_tokens, 16).expand(2, -1, -1), slots=slots).tokens
        return ((one - other).norm() / one.norm()).item()

    assert influence("slots", 4096) > 0.5 * influence("slots", 64)
    assert influence("tokens", 4096) < 0.1 * influence("tokens", 64)


def test_masked_tokens_come_out_as_zeros_and_padding_is_ignored_where_upstream_reads_it() -> None:
    upstream = Upstream(4, 8)
    layer, tokens = from_upstream(upstream), torch.randn(2, 20, 8)
    padded, mask = torch.nn.functional.pad(tokens, (0, 0, 0, 44)), (torch.arange(64) < 20).expand(2, 64)
    torch.manual_seed(0)
    alone, tokens_alone = upstream(tokens)
    torch.manual_seed(0)
    assert (upstream(padded)[0] - alone).norm() > 0.05 * alone.norm()
    torch.manual_seed(0)
    output = layer(padded, mask)
    assert_close(output.slots, alone)
    assert_close(output.tokens[:, :20], tokens_alone)
    assert output.tokens[:, 20:].abs().max() == 0


@pytest.mark.parametrize("hidden", [128, 512])
def test_fewer_operations_than_upstream(hidden: int) -> None:
    upstream = Upstream(16, 128, hidden_dim=hidden)
    layer, tokens = from_upstream(upstream), torch.randn(1, 1024, 128)
    operations = []
    for module in (upstream, layer):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            module(tokens)
        operations.append(flops.get_total_flops())
    # Of 15 + 2M/D products of a token with D x D, 9 + 2M/D are left, or 6 + 4M/D where the MLP's last map is absorbed.
    assert operations[0] > (1.5 if hidden == 128 else 1.3) * operations[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_normalization": "none"}, r"token_normalization: expected one of \('slots', 'tokens'\), got 'none'"),
        ({"num_iterations": 0}, "num_iterations: expected a positive integer, got 0"),
        ({"mlp_dim": 0}, "mlp_dim: expected a positive integer, got 0"),
    ],
    ids=str,
)
def test_messages_of_the_constructor(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        TwoWaySlotAttention(8, num_slots=4, **arguments)
