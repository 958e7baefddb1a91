"""The weights of separable attention."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class PointwiseWeights(NamedTuple):
    """What turns window tokens into the queries and keys of the attention between windows.

    Args:
        norm_weight, norm_bias: LayerNorm over the width of a head.
        query_key, query_key_bias: rows in the order (query, key), heads, width of a head.
    """

    norm_weight: Float[Tensor, "d"]
    norm_bias: Float[Tensor, "d"]
    query_key: Float[Tensor, "two_inner inner"]
    query_key_bias: Float[Tensor, "two_inner"]


class SeparableAttentionWeights(NamedTuple):
    """All weights of separable attention; `inner` is heads times the width of a head.

    Args:
        qkv: rows in the order (query, key, value), heads, width of a head; without bias.
        window_token: the token put before the tokens of every window.
        pointwise: None where there is no attention between windows.
        out, out_bias: output projection.
    """

    qkv: Float[Tensor, "three_inner D"]
    window_token: Float[Tensor, "D"]
    pointwise: PointwiseWeights | None
    out: Float[Tensor, "D inner"]
    out_bias: Float[Tensor, "D"]
