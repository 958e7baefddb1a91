"""The experts' feed-forward networks, all at once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The weights of E networks of two linear maps; a gated network has 2H hidden features before its gates.

    The weight `[e]` and the bias `[e]` are those of expert e, as `nn.Linear` has them.

    Args:
        weight_in: `[E, H, D]` or `[E, 2H, D]`.
        bias_in: `[E, H]` or `[E, 2H]`.
        weight_out: `[E, D, H]`.
        bias_out: `[E, D]`.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor


def feed_forward(
    slots: Float[Tensor, "B E P D"], weights: ExpertWeights, *, gated: bool = False, dropout: float = 0.0
) -> Float[Tensor, "B E P D"]:
    r"""$W_2\,\mathrm{GELU}(W_1 x + b_1) + b_2$, or $W_2 (u \cdot \mathrm{GELU}(g)) + b_2$ with $[u, g] = W_1 x + b_1$.

    Every expert has as many slots as the next, so that one batched product serves all: the number of operations does
    not grow with E. `dropout` is the share of hidden values dropped, for training only.
    """
    batch, num_experts, slots_per_expert, dim = slots.shape
    # Features before rows: so the gradients of the weights come out in the layout of the weights.
    columns = slots.transpose(0, 1).reshape(num_experts, batch * slots_per_expert, dim).mT
    hidden = torch.baddbmm(weights.bias_in[..., None], weights.weight_in, columns)
    if gated:
        values, gates = hidden.chunk(2, dim=1)
        hidden = values * F.gelu(gates)
    else:
        hidden = F.gelu(hidden)
    hidden = F.dropout(hidden, dropout) if dropout else hidden
    mapped = torch.baddbmm(weights.bias_out[..., None], weights.weight_out, hidden)
    return mapped.mT.unflatten(1, (batch, slots_per_expert)).transpose(0, 1)
