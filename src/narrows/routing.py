"""The one record of where tokens went: `Routing`."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import SymInt, Tensor

from narrows.errors import InvalidArgument, InvalidType


@dataclass(frozen=True)
class Routing:
    r"""Which token feeds which carrier.

    Every mechanism of narrows makes N tokens pass through K carriers; `weights[b, h, k, n]` is the share of token n
    that carrier k reads in head h. What the weights sum to is the mechanism's own affair (slot attention: over the
    carriers for each token; soft mixture of experts: over the tokens for each carrier).

    Args:
        weights: `[B, H, K, N]`, not negative, 0 at masked tokens.
        carriers: what a carrier is called, in the plural: "slots", "expert slots", "windows", "latents", "kept tokens".
        grid: `(height, width)` of the tokens that stand on a grid, or None.
        prefix: how many tokens before the grid stand on no grid (a class token).
        name: where in a model it was recorded, as `named_modules` spells it.
        joint_heads: whether heads share what the weights sum to (one softmax over carriers and heads together), so that
            a carrier's share of a token is the sum over the heads. Otherwise every head divides the token anew, and the
            share is their mean.
    """

    weights: Float[Tensor, "B H K N"]
    carriers: str
    grid: tuple[int, int] | None = None
    prefix: int = 0
    name: str = ""
    joint_heads: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Tensor) or not self.weights.is_floating_point():
            got = getattr(self.weights, "dtype", type(self.weights).__name__)
            raise InvalidType("weights", expected="a floating-point tensor [B, H, K, N]", got=got)
        if self.weights.ndim != 4:
            raise InvalidArgument("weights", expected="shape [B, H, K, N]", got=tuple(self.weights.shape))
        for name, kind in (("carriers", str), ("name", str), ("joint_heads", bool)):
            if not isinstance(value := getattr(self, name), kind):
                raise InvalidType(name, expected=f"a {kind.__name__}", got=repr(value))
        if not _is_count(self.prefix) or self.prefix < 0:
            raise InvalidArgument("prefix", expected="a number of tokens, 0 or more", got=repr(self.prefix))
        if not (self.grid is None or _is_grid(self.grid)):
            raise InvalidArgument("grid", expected="(height, width), two positive integers", got=repr(self.grid))
        if self.grid is not None and self.prefix + self.grid[0] * self.grid[1] != self.weights.shape[-1]:
            raise InvalidArgument(
                "grid",
                expected=f"height * width + prefix equal to the {self.weights.shape[-1]} tokens",
                got=f"grid {self.grid} and prefix {self.prefix}",
            )

    @property
    def num_carriers(self) -> int:
        """K, the number of carriers."""
        return self.weights.shape[2]

    def with_grid(self, grid: tuple[int, int], *, prefix: int = 0) -> "Routing":
        """The same routing, its tokens placed on a grid of `(height, width)` after `prefix` tokens off it."""
        return replace(self, grid=grid, prefix=prefix)

    def maps(self) -> Float[Tensor, "B K h w"]:
        """The weights as one picture for each carrier, `[B, K, height, width]`; heads averaged, or added if joint."""
        if self.grid is None:
            raise InvalidArgument("grid", expected="a routing whose tokens stand on a grid", got=None)
        weights = self.weights.sum(1) if self.joint_heads else self.weights.mean(1)
        return weights[..., self.prefix :].unflatten(-1, self.grid)

    def detach(self) -> "Routing":
        """The same routing in float32 on the CPU, cut from the graph: what pictures and reports want."""
        return replace(self, weights=self.weights.detach().float().cpu())


def _is_count(value: object) -> bool:
    return isinstance(value, int | SymInt) and not isinstance(value, bool)


def _is_grid(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_count(side) and side > 0 for side in value)
