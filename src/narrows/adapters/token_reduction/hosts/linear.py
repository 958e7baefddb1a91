"""Linear layers of a host: whole or in part, and by the quickest kernel where nobody has put anything in between."""

from jaxtyping import Float
from torch import Tensor, nn

from narrows.layers.linear import is_plain
from narrows.ops.linear import linear


def apply(module: nn.Module, rows: Float[Tensor, "R n D"]) -> Float[Tensor, "R n E"]:
    """`module(rows)`."""
    return linear(rows, module.weight, module.bias) if is_plain(module) else module(rows)  # pyright: ignore[reportArgumentType]


def apply_part(module: nn.Module, rows: Float[Tensor, "R n D"], start: int, stop: int) -> Float[Tensor, "R n E"]:
    """`module(rows)[..., start:stop]`, the rest left out where it can be."""
    if not is_plain(module):
        return module(rows)[..., start:stop]
    weight, bias = module.weight, module.bias
    return linear(rows, weight[start:stop], None if bias is None else bias[start:stop])  # pyright: ignore
