"""What keeps the logits of a soft mixture of experts in bounds. Computed in float32 or better."""

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.precision import at_least_float32


def unit_vectors(
    vectors: Float[Tensor, "*batch D"], scale: Float[Tensor, ""] | None = None
) -> Float[Tensor, "*batch D"]:
    r"""$s x / \sqrt{|x|^2 + 10^{-6}}$: the paper's normalisation (Section 2.3, Algorithm 2), smooth at 0.

    Logits of unit vectors stay within -scale and scale whatever the width, so that the softmax does not approach a
    one-hot vector as the width grows.
    """
    wide = at_least_float32(vectors)
    inverse = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    return (wide * (inverse if scale is None else inverse * scale)).to(vectors.dtype)


def rms_vectors(vectors: Float[Tensor, "*batch D"], gain: Float[Tensor, " D"]) -> Float[Tensor, "*batch D"]:
    r"""$\sqrt{D} g x / |x|$: vectors of mean square 1, times one learned gain for each channel."""
    wide = at_least_float32(vectors)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12)
    return (wide * inverse * gain).to(vectors.dtype)
