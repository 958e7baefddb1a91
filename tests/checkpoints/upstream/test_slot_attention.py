"""Parity with the PyPI package slot-attention: outputs and every gradient, over the options its classes have."""

from typing import Any

import pytest
import torch
from slot_attention import MultiHeadSlotAttention, SlotAttentionExperimental
from slot_attention import SlotAttention as Upstream
from torch import Tensor, nn

from narrows.checkpoints import from_upstream
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.support import assert_close, gradients

UPSTREAM = {
    "SlotAttention": lambda: Upstream(5, 24),
    "SlotAttention-options": lambda: Upstream(3, 160, iters=2, eps=1e-3, hidden_dim=200),
    "MultiHeadSlotAttention": lambda: MultiHeadSlotAttention(5, 24),
    "MultiHeadSlotAttention-options": lambda: MultiHeadSlotAttention(
        3, 20, heads=3, dim_head=7, iters=2, eps=1e-3, hidden_dim=9
    ),
    "SlotAttentionExperimental": lambda: SlotAttentionExperimental(5, 24),
    "SlotAttentionExperimental-options": lambda: SlotAttentionExperimental(3, 160, iters=2, eps=1e-3, hidden_dim=8),
}


def flat(output: Any) -> Tensor:
    """Slots, and tokens where there are any, as one vector."""
    parts = (output,) if isinstance(output, Tensor) else output
    return torch.cat([part.flatten() for part in parts])


def upstream_names(module: nn.Module, converted: nn.Module) -> dict[str, str]:
    """For each of our parameters the upstream parameter with the same numbers; all of both are used once."""
    theirs = {name: parameter.detach().flatten() for name, parameter in module.named_parameters()}
    pairs = {
        ours: [name for name, value in theirs.items() if torch.equal(value, parameter.detach().flatten())]
        for ours, parameter in converted.named_parameters()
    }
    assert all(len(names) == 1 for names in pairs.values()), pairs
    assert {names[0] for names in pairs.values()} == set(theirs)
    return {ours: names[0] for ours, names in pairs.items()}


@pytest.mark.parametrize("impl", ["reference", "absorbed"])
@pytest.mark.parametrize("num_slots", [None, 4])
@pytest.mark.parametrize("name", UPSTREAM)
def test_same_outputs_and_gradients(name: str, num_slots: int | None, impl: str) -> None:
    torch.manual_seed(1)  # With 0 a hidden unit stands so near the kink of its ReLU that rounding decides the gradient.
    module = UPSTREAM[name]()
    for parameter in module.parameters():  # no two alike, LayerNorms away from 1 and 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    converted = from_upstream(module)
    converted.impl = impl
    tokens = torch.randn(2, 33, converted.norm_tokens.normalized_shape[0], requires_grad=True)
    torch.manual_seed(0)
    theirs = flat(module(tokens, num_slots=num_slots))
    torch.manual_seed(0)
    output = converted(tokens, num_slots=num_slots)
    ours = flat(output._replace(attention=output.attention[:0]))
    assert_close(ours, theirs)

    names = upstream_names(module, converted)
    our_parameters, their_parameters = dict(converted.named_parameters()), dict(module.named_parameters())
    our_gradients = gradients(ours, tokens, *our_parameters.values())
    their_gradients = gradients(theirs, tokens, *(their_parameters[names[name]] for name in our_parameters))
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert_close(our.reshape(their.shape), their)


def test_what_is_converted_into_what() -> None:
    converted = {name: from_upstream(build()) for name, build in UPSTREAM.items()}
    for name, layer in converted.items():
        assert isinstance(layer, TwoWaySlotAttention if "Experimental" in name else SlotAttention)
    assert converted["SlotAttentionExperimental"].token_normalization == "tokens"
    assert converted["MultiHeadSlotAttention"].heads == 4
    assert converted["MultiHeadSlotAttention-options"].to_out.in_features == 21
