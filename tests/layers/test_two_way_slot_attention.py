"""TwoWaySlotAttention: what upstream's form loses; what it shares with SlotAttention is tested there."""

import pytest
import torch
from slot_attention import SlotAttentionExperimental as Upstream
from torch.utils.flop_counter import FlopCounterMode

from narrows.checkpoints import from_upstream
from narrows.errors import NarrowsError
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
from tests.support import assert_close


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
