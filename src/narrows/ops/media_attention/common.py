"""What several implementations share: the visible latents written out, and steps that backward makes again."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from narrows.ops.media_attention.visible import VisibleMedia


def visible_latents(
    key: Float[Tensor, "B M N H E"], visible: VisibleMedia | None, mask: Bool[Tensor, "B M N"] | None
) -> Bool[Tensor, "B _ M N"]:
    """Which latents of which media a text token sees, `[B, T, M, N]`; where all see all, `[B, 1, M, N]`."""
    latents = (key.new_ones(key.shape[:3], dtype=torch.bool) if mask is None else mask)[:, None]
    return latents if visible is None else visible.media(key.shape[1])[..., None] & latents


def made_again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, of which backward keeps the arguments only and makes the rest again."""
    result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    assert isinstance(result, Tensor)
    return result
