"""Fused attention that can also be differentiated forward, differentiated twice and vectorised by `torch.func`."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from narrows.precision import is_transformed


def attention(
    query: Float[Tensor, "*batch Q d"],
    key: Float[Tensor, "*batch N d"],
    value: Float[Tensor, "*batch N e"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "*batch Q e"]:
    r"""$\mathrm{softmax}(s\, q k^\top)\, v$ by `torch.nn.functional.scaled_dot_product_attention`.

    PyTorch chooses the kernel. Its fused kernels have no forward derivative, no second derivative and no batching rule:
    inside a transformation of `torch.func`, and for dual tensors, the form in plain operations takes their place.

    Args:
        query: `[..., Q, d]`.
        key: `[..., N, d]`.
        value: `[..., N, e]`.
        mask: broadcasts to `[..., Q, N]`, True where a query may read a key. Every row must have one.
        dropout: probability at which weights are dropped; 0 in evaluation.
        scale: s; `d ** -0.5` if None.
    """
    if is_transformed(query, key, value):
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
