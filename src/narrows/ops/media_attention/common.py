"""Which latents each text token may see, written out."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def visible_latents(
    key: Float[Tensor, "B M N H E"],
    text_time: Int[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B M N"] | None,
    *,
    attend: str,
) -> Bool[Tensor, "B _ M N"]:
    """Which latents of which media a text token sees, `[B, T, M, N]`; without times, `[B, 1, M, N]` for all tokens."""
    visible = (key.new_ones(key.shape[:3], dtype=torch.bool) if mask is None else mask)[:, None]
    if text_time is None:
        return visible
    media_time = torch.arange(1, key.shape[1] + 1, device=key.device)
    compare = torch.eq if attend == "last" else torch.ge
    return compare(text_time[..., None], media_time)[..., None] & visible
