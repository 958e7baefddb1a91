"""The experts' feed-forward networks, all at once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The weights of E networks of two linear maps; a gated network has 2H columns between them.

    Args:
        weight_in: `[E, D, H]` or `[E, D, 2H]`.
        bias_in: `[E, H]` or `[E, 2H]`.
        weight_out: `[E, H, D]`.
        bias_out: `[E, D]`.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor


def feed_forward(
    slots: Float[Tensor, "B E P D"], weights: ExpertWeights, *, gated: bool = False, dropout: float = 0.0
) -> Float[Tensor, "B E P D"]:
    r"""$\mathrm{GELU}(x W_1 + b_1) W_2 + b_2$, or $(u \cdot \mathrm{GELU}(g)) W_2 + b_2$ with $[u, g] = x W_1 + b_1$.

    Every expert has as many slots as the next, so that one batched product serves all: the number of operations does
    not grow with E. `dropout` is the share of hidden values dropped, for training only.
    """
    batch, num_experts, slots_per_expert, dim = slots.shape
    rows = slots.transpose(0, 1).reshape(num_experts, batch * slots_per_expert, dim)
    hidden = torch.baddbmm(weights.bias_in[:, None], rows, weights.weight_in)
    if gated:
        values, gates = hidden.chunk(2, dim=-1)
        hidden = values * F.gelu(gates)
    else:
        hidden = F.gelu(hidden)
    hidden = F.dropout(hidden, dropout) if dropout else hidden
    rows = torch.baddbmm(weights.bias_out[:, None], hidden, weights.weight_out)
    return rows.view(num_experts, batch, slots_per_expert, dim).transpose(0, 1)
