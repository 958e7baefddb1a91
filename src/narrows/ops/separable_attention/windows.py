"""Feature maps cut into windows and put together again."""

from jaxtyping import Shaped
from torch import Tensor

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
