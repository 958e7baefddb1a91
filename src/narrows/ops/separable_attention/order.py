"""Feature maps cut into windows, and the order in which a stage keeps its tokens, so that its windows are views."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument


def to_windows(feature_map: Shaped[Tensor, "B H W D"], window_size: int) -> Shaped[Tensor, "B Y X n D"]:
    """Cut `[B, H, W, D]` into Y x X square windows of n = `window_size` ** 2 tokens each: `[B, Y, X, n, D]`.

    Raises:
        InvalidArgument: the windows do not divide the feature map.
    """
    height, width = feature_map.shape[1:3]
    if height % window_size or width % window_size:
        nearest = [max(1, round(side / window_size)) * window_size for side in (height, width)]
        raise InvalidArgument(
            "feature_map",
            expected=f"height and width that are multiples of window_size = {window_size}",
            got=f"{height} x {width}",
            hint=f"The nearest usable size is {nearest[0]} x {nearest[1]}.",
        )
    windows = feature_map.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return windows.transpose(2, 3).flatten(3, 4).contiguous()


def from_windows(windows: Shaped[Tensor, "B Y X n D"], window_size: int) -> Shaped[Tensor, "B H W D"]:
    """The inverse of `to_windows`: `[B, Y, X, n, D]` back to `[B, H, W, D]`."""
    return windows.unflatten(3, (window_size, window_size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


@dataclass(frozen=True)
class WindowOrder:
    """The order of the tokens of a `height` x `width` feature map that is read in windows of several sizes.

    Where the largest window divides the map, tokens are *nested*: all tokens of a largest window stand together, inside
    it all tokens of each next smaller one, down to single tokens in raster order. Windows of every size are then
    reshapes of `[B, N, D]`, which move nothing. Where it does not, tokens stay in raster order, and windows are copies
    of the map with padding at its right and lower border; whatever works token by token never sees that padding.

    Args:
        height, width: of the feature map, in tokens.
        window_sizes: sides of the windows, from the smallest to the largest, each a divisor of the next.
    """

    height: int
    width: int
    window_sizes: tuple[int, ...]

    @property
    def nested(self) -> bool:
        """Whether windows are views."""
        return self.height % self.window_sizes[-1] == 0 and self.width % self.window_sizes[-1] == 0

    def arrange(self, feature_map: Shaped[Tensor, "B H W D"]) -> Shaped[Tensor, "B N D"]:
        """The tokens of a feature map in this order."""
        return self._split(feature_map).flatten(1, -2)

    def add(self, tokens: Shaped[Tensor, "B N D"], feature_map: Shaped[Tensor, "B H W D"]) -> Shaped[Tensor, "B N D"]:
        """`tokens + arrange(feature_map)` in one pass over memory."""
        split = self._split(feature_map)
        return (tokens.unflatten(1, split.shape[1:-1]) + split).flatten(1, -2)

    def _split(self, feature_map: Shaped[Tensor, "B H W D"]) -> Shaped[Tensor, "B *nested D"]:
        """A view with the axes of nested windows, from the largest down to single tokens, rows before columns."""
        if not self.nested:
            return feature_map
        steps = self._steps()
        split = feature_map.unflatten(2, (-1, *steps)).unflatten(1, (-1, *steps))
        depth = 1 + len(steps)
        pairs = [axis for level in range(1, depth + 1) for axis in (level, level + depth)]
        return split.permute(0, *pairs, -1)

    def restore(self, tokens: Shaped[Tensor, "B N D"]) -> Shaped[Tensor, "B H W D"]:
        """The feature map of tokens in this order."""
        if not self.nested:
            return tokens.unflatten(1, (self.height, self.width))
        steps = self._steps()
        pairs = [step for step in steps for _ in range(2)]
        split = tokens.unflatten(1, (self.height // self.window_sizes[-1], self.width // self.window_sizes[-1], *pairs))
        depth = 1 + len(steps)
        rows, columns = range(1, 2 * depth, 2), range(2, 2 * depth + 1, 2)
        return split.permute(0, *rows, *columns, -1).flatten(1 + depth, 2 * depth).flatten(1, depth)

    def windows(self, tokens: Shaped[Tensor, "B N D"], size: int) -> Shaped[Tensor, "B K n D"]:
        """The windows of `size` x `size` tokens: a view, or a copy with zeros for padding."""
        if self.nested:
            return tokens.unflatten(1, (-1, size**2))
        rows, columns = self.grid(size)
        missing = (0, 0, 0, columns * size - self.width, 0, rows * size - self.height)
        return to_windows(F.pad(self.restore(tokens), missing), size).flatten(1, 2)

    def tokens(self, windows: Shaped[Tensor, "B K n D"], size: int) -> Shaped[Tensor, "B N D"]:
        """The inverse of `windows`; padding is dropped."""
        if self.nested:
            return windows.flatten(1, 2)
        padded = from_windows(windows.unflatten(1, self.grid(size)), size)
        return padded[:, : self.height, : self.width].flatten(1, 2)

    def grid(self, size: int) -> tuple[int, int]:
        """How many windows of `size` x `size` tokens cover the map, down and across."""
        return -(-self.height // size), -(-self.width // size)

    def arrange_windows(self, of_windows: Shaped[Tensor, "Y X D"], size: int) -> Shaped[Tensor, "K D"]:
        """What belongs to the windows of a grid, `[Y, X, D]`, in the order in which `windows` returns them."""
        if not self.nested:
            return of_windows.flatten(0, 1)
        larger = tuple(other // size for other in self.window_sizes if other >= size)
        return WindowOrder(*self.grid(size), larger).arrange(of_windows[None])[0]

    def window_mask(
        self, tokens: Shaped[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None, size: int
    ) -> Bool[Tensor, "B K n"] | None:
        """Which tokens of the windows of `tokens` `[B, N, D]` are real, `[B, K, n]`; None where all are."""
        if mask is None:
            if self.nested:
                return None
            real = torch.ones(1, self.height * self.width, 1, dtype=torch.bool, device=tokens.device)
            return self.windows(real, size).squeeze(-1).expand(tokens.shape[0], -1, -1)
        return self.windows(mask.unsqueeze(-1), size).squeeze(-1)

    def _steps(self) -> tuple[int, ...]:
        """How many of the next smaller windows lie side by side in a window, from the largest down to tokens."""
        sizes = (1, *self.window_sizes)
        return tuple(larger // smaller for smaller, larger in zip(sizes, self.window_sizes, strict=False))[::-1]
