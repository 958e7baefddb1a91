"""`torch.nn.Linear`, by the quickest kernel there is."""

from jaxtyping import Float
from torch import Tensor, nn

from narrows.ops.linear import linear


class Linear(nn.Linear):
    """`nn.Linear` for many tokens `[..., n, D]`: the same parameters and numbers, faster on a CPU in float32."""

    def forward(self, input: Float[Tensor, "*layout D"]) -> Float[Tensor, "*layout out"]:
        """`input @ weight.T + bias`."""
        return linear(input, self.weight, self.bias)
