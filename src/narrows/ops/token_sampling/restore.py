"""Sampled tokens back on the full grid."""

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.token_sampling.common import SampledTokens
from narrows.validation import check_tokens


def restore(sampled: SampledTokens, fill: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Kept tokens at the positions they came from; every other position as in `fill`.

    Args:
        sampled: K tokens and their positions among N.
        fill: `[B, N, D]`, what dropped positions get: their last state, or zeros.

    Raises:
        InvalidArgument: `fill` has another batch or width than the tokens.
    """
    check_tokens("fill", fill, dim=sampled.tokens.shape[-1])
    if fill.shape[0] != sampled.tokens.shape[0]:
        raise InvalidArgument("fill", expected=f"a batch of {sampled.tokens.shape[0]}", got=fill.shape[0])
    # Slots that hold no token go to one row more, which is cut off.
    rows = sampled.ids.masked_fill(~sampled.mask, fill.shape[1])[..., None].expand_as(sampled.tokens)
    padded = torch.cat((fill, torch.zeros_like(fill[:, :1])), 1)
    return padded.scatter(1, rows, sampled.tokens.to(fill.dtype))[:, :-1]
