"""The weights of separable attention, and the masks of its windows."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PointwiseWeights(NamedTuple):
    """What turns window tokens into the queries and keys of the attention between windows.

    Args:
        norm_weight, norm_bias: LayerNorm over the width of a head, for each head alone, or over all `inner` of them.
        query_key, query_key_bias: rows in the order (query, key), heads, width of a head.
        norm_eps: epsilon of that LayerNorm.
    """

    norm_weight: Float[Tensor, "normed"]
    norm_bias: Float[Tensor, "normed"]
    query_key: Float[Tensor, "two_inner inner"]
    query_key_bias: Float[Tensor, "two_inner"]
    norm_eps: float = 1e-5


class SeparableAttentionWeights(NamedTuple):
    """All weights of separable attention; `inner` is heads times the width of a head.

    Args:
        qkv: rows in the order (query, key, value), heads, width of a head.
        window_token: the token put before the tokens of a window: `[D]` shared by all windows, `[K, D]` one for each,
            or None: windows attend to their own tokens alone.
        pointwise: None where there is no attention between windows.
        out, out_bias: output projection.
        qkv_bias: None where queries, keys and values have no bias.
    """

    qkv: Float[Tensor, "three_inner D"]
    window_token: Float[Tensor, "*K D"] | None
    pointwise: PointwiseWeights | None
    out: Float[Tensor, "D inner"]
    out_bias: Float[Tensor, "D"]
    qkv_bias: Float[Tensor, "three_inner"] | None = None


def keys_of_windows(mask: Bool[Tensor, "B K n"], *, window_token: bool) -> Bool[Tensor, "B K L"]:
    """Which keys the tokens of a window attend to: its real tokens, and the window token where there is one.

    A window without any key would have no softmax. All its tokens are padding and what they become is dropped, so it
    attends to its padding.
    """
    if window_token:
        return torch.cat((torch.ones_like(mask[..., :1]), mask), -1)
    return mask | ~mask.any(-1, keepdim=True)


def several_windows(mask: Bool[Tensor, "B K n"]) -> Bool[Tensor, "B"]:
    """Which samples have a real token in more than one window."""
    return mask.any(-1).sum(-1) > 1
