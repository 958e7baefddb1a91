"""The experts of a mixture: many small networks as one batched network, or any modules one after another."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.soft_moe import ExpertWeights, feed_forward
from narrows.validation import check_choice, check_positive

STACKED = ("gelu", "geglu")


class StackedExperts(nn.Module):
    """Feed-forward experts held as stacked weights and run as two batched products, however many there are.

    Expert e has the weights `weight_in[e]` and `weight_out[e]` and the biases `bias_in[e]` and `bias_out[e]`, as
    `nn.Linear` has them.

    Args:
        dim: D, width of the slots.
        num_experts: E.
        kind: "gelu": `Linear, GELU, Linear`; "geglu": the first map makes values and gates, `values * GELU(gates)`.
        mult: hidden width in multiples of `dim`; a gated expert has 2/3 of it, which is as many parameters.
        dropout: share of hidden values dropped in training.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        kind: str = "gelu",
        mult: float = 4.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_experts=num_experts)
        check_choice("kind", kind, STACKED)
        if not 0 <= dropout < 1:
            raise InvalidArgument("dropout", expected="a share from 0 to below 1", got=dropout)
        self.gated, self.dropout = kind == "geglu", dropout
        hidden = int(dim * mult * 2 / 3) if self.gated else int(dim * mult)
        if hidden < 1:
            raise InvalidArgument("expert_mult", expected="a multiple of dim that leaves a hidden width", got=mult)
        features = 2 * hidden if self.gated else hidden
        self.weight_in = nn.Parameter(torch.empty(num_experts, features, dim, device=device, dtype=dtype))
        self.bias_in = nn.Parameter(torch.empty(num_experts, features, device=device, dtype=dtype))
        self.weight_out = nn.Parameter(torch.empty(num_experts, dim, hidden, device=device, dtype=dtype))
        self.bias_out = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as `nn.Linear` would for each expert."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, slots: Float[Tensor, "B E P D"]) -> Float[Tensor, "B E P D"]:
        """Run every expert on its own slots."""
        weights = ExpertWeights(self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        return feed_forward(slots, weights, gated=self.gated, dropout=self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        num_experts, dim, hidden = self.weight_out.shape
        return (
            f"{num_experts} x ({dim} -> {hidden} -> {dim}), {'geglu' if self.gated else 'gelu'}, dropout={self.dropout}"
        )


class ExpertList(nn.ModuleList):
    """Any modules as experts, run one after another: the number of operations grows with their number."""

    def forward(self, slots: Float[Tensor, "B E P D"]) -> Float[Tensor, "B E P D"]:
        """Give expert e the slots `[B, P, D]` that are its own."""
        return torch.stack([expert(own) for expert, own in zip(self, slots.unbind(1), strict=True)], dim=1)


def make_experts(
    experts: str | Callable[[int], nn.Module],
    dim: int,
    num_experts: int,
    *,
    mult: float,
    dropout: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StackedExperts | ExpertList:
    """Experts from what a layer's constructor takes: a kind of stacked expert, or a function of the expert's number."""
    if isinstance(experts, str):
        check_choice("experts", experts, STACKED)
        return StackedExperts(dim, num_experts, kind=experts, mult=mult, dropout=dropout, device=device, dtype=dtype)
    if isinstance(experts, nn.Module) or not callable(experts):
        raise InvalidType(
            "experts",
            expected=f"one of {STACKED} or a function from the number of an expert to its module",
            got=type(experts).__name__,
            hint="From a list of modules: experts=modules.__getitem__.",
        )
    check_positive(num_experts=num_experts)
    return ExpertList(experts(index) for index in range(num_experts))
