"""`torch.nn.Linear`, by the quickest kernel there is, alone and with a GELU after it."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from narrows.ops.linear import linear, linear_gelu


class Linear(nn.Linear):
    """`nn.Linear` for many tokens `[..., n, D]`: the same parameters and numbers, faster on a CPU in float32."""

    def forward(self, input: Float[Tensor, "*layout D"]) -> Float[Tensor, "*layout out"]:
        """`input @ weight.T + bias`."""
        return linear(input, self.weight, self.bias)


class FeedForwardSequential(nn.Sequential):
    """`nn.Sequential` that runs a linear map and the GELU after it as one where nobody has put anything in between."""

    def forward(self, input: Float[Tensor, "*layout D"]) -> Float[Tensor, "*layout out"]:
        """What the modules compute, one after another."""
        modules = pairwise((*self, nn.Identity()))
        for module, following in modules:
            if isinstance(module, nn.Linear) and is_plain(module) and _is_plain_gelu(following):
                input = linear_gelu(input, module.weight, module.bias)
                next(modules)
            else:
                input = module(input)
        return input


def is_plain(module: nn.Module) -> bool:
    """Whether the module is its weight and bias and nothing else: no adapter, hook, quantisation or wrapper."""
    return (
        type(module) in (nn.Linear, Linear)
        and _is_called_only(module)
        and not hasattr(module.weight, "__tensor_flatten__")  # a tensor that stands for others: quantised, sharded
    )


def _is_plain_gelu(module: nn.Module) -> bool:
    return type(module) is nn.GELU and module.approximate == "none" and _is_called_only(module)


def _is_called_only(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
