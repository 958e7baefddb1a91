"""Gated cross attention: text reads the media that stand before it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.linear import Linear
from narrows.layers.perceiver_resampler import feed_forward
from narrows.ops.media_attention import ATTEND, media_attention, media_attention_weights
from narrows.routing import Routing
from narrows.validation import check_choice, check_mask, check_positive, check_tokens


class MaskedCrossAttention(nn.Module):
    r"""Text tokens read the latents of their last medium, or of all media before them (Flamingo, section 2.3).

    $$y_l = W_o \operatorname{attn}\bigl(q = W_q \operatorname{LN}(y_l),\; kv = W_{kv}\, x_{V(l)}\bigr)$$

    with V(l) the media that token l may see, as in `narrows.ops.media_attention.media_attention`. A token that may see
    none gets exactly 0.

    Args:
        dim: width D of the text.
        media_dim: width of the media latents; None: as the text.
        heads: number of heads.
        head_dim: width of a head; the inner width is heads * head_dim (upstream's and OpenFlamingo's 512 by default;
            the paper takes the width of the text).
        attend: "last": text sees the medium just before it. "previous": it sees every medium before it.
        impl: "auto" or an implementation of `media_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: an unknown policy, shapes that do not belong together.
        ImplementationUnavailable: on call, impl="segmented" with attend="previous" or without media_locations.

    >>> attention = MaskedCrossAttention(64, media_dim=32)
    >>> locations = torch.tensor([[False, True, False, True, False]])
    >>> read = attention(torch.randn(1, 5, 64), torch.randn(1, 2, 16, 32), locations)
    >>> bool((read[:, 0] == 0).all())
    True

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    def __init__(
        self,
        dim: int,
        *,
        media_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        attend: str = "last",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        media_dim = dim if media_dim is None else media_dim
        check_positive(dim=dim, media_dim=media_dim, heads=heads, head_dim=head_dim)
        check_choice("attend", attend, ATTEND)
        self.dim, self.media_dim, self.heads = dim, media_dim, heads
        self.attend, self.impl = attend, impl
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.to_q = Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_kv = Linear(media_dim, 2 * inner, bias=False, device=device, dtype=dtype)
        self.to_out = Linear(inner, dim, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"],
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the text reads of the media, 0 where it sees none.

        Args:
            text: `[B, T, D]`.
            media: `[B, M, N, media_dim]`, N latents for each of M media; M may be 0. The m-th True of a row of
                `media_locations` is where its m-th medium stands. Text after a medium that is not in `media`, because
                there are more locations than media, does not see it, and does not see another in its place.
            media_locations: `[B, T]`, True where a medium stands; the token there sees it already. None: all text sees
                all media.
            media_mask: `[B, M]` or `[B, M, N]`, True at real media or latents. The others, NaN included, reach no
                output and no gradient.
        """
        query, key, value, mask = self._project(text, media, media_locations, media_mask)
        time = None if media_locations is None else media_locations.cumsum(-1)
        read = media_attention(query, key, value, time, mask=mask, attend=self.attend, impl=self.impl)
        return self.to_out(read.flatten(2))

    def routing(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"],
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
    ) -> Routing:
        """How much each text token reads of each medium, over all its latents: weights `[B, H, M, T]`.

        A column sums to 1, or to 0 where the token sees no medium. Takes what `forward` takes.
        """
        query, key, _, mask = self._project(text, media, media_locations, media_mask)
        time = None if media_locations is None else media_locations.cumsum(-1)
        weights = media_attention_weights(query, key, time, mask=mask, attend=self.attend)
        return Routing(weights.sum(-1).transpose(2, 3), "media")

    def _project(
        self, text: Tensor, media: Tensor, locations: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query `[B, T, H, E]`, key and value `[B, M, N, H, E]`, and the mask of the latents `[B, M, N]`."""
        check_tokens("text", text, dim=self.dim, layout="[B, T, D]")
        check_tokens("media", media, dim=self.media_dim, layout="[B, M, N, D]")
        if media.shape[0] != text.shape[0]:
            raise InvalidArgument("media", expected=f"the batch of text, {text.shape[0]}", got=tuple(media.shape))
        check_mask("media_locations", locations, text.shape[:2], layout="[B, T]")
        if mask is not None and mask.ndim == 2:
            check_mask("media_mask", mask, media.shape[:2], layout="[B, M]")
            mask = mask[..., None].expand(media.shape[:3])
        check_mask("media_mask", mask, media.shape[:3], layout="[B, M, N]")
        if mask is not None:
            # Before the projection: its weight's gradient would take in 0 * NaN otherwise.
            media = media.masked_fill(~mask[..., None], 0.0)
        query = self.to_q(self.norm(text)).unflatten(-1, (self.heads, -1))
        key, value = self.to_kv(media).unflatten(-1, (2, self.heads, -1)).unbind(3)
        return query, key, value, mask


class GatedCrossAttentionBlock(nn.Module):
    r"""Masked cross attention and a feed-forward, each behind a gate that starts closed (Flamingo, figure 4).

    $$y \leftarrow y + \tanh(\alpha)\operatorname{attn}(q = y,\; kv = x), \qquad
    y \leftarrow y + \tanh(\beta)\operatorname{ffw}(y)$$

    With $\alpha = \beta = 0$, as at the start, the block is the identity. The feed-forward also applies to text that
    sees no medium, as in the paper.

    Args:
        dim: width D of the text.
        media_dim: width of the media latents; None: as the text.
        heads: number of heads.
        head_dim: width of a head.
        attend: "last" or "previous", which media text may see.
        mlp_ratio: hidden width of the feed-forward, in D.
        activation: "gelu", or the paper's "squared_relu".
        impl: "auto" or an implementation of `media_attention`.
        device, dtype: where and in what precision parameters are made.

    >>> block = GatedCrossAttentionBlock(64)
    >>> text, media = torch.randn(1, 5, 64), torch.randn(1, 2, 16, 64)
    >>> torch.equal(block(text, media), text)
    True

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    def __init__(
        self,
        dim: int,
        *,
        media_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        attend: str = "last",
        mlp_ratio: int | float = 4,
        activation: str = "gelu",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim,
            media_dim=media_dim,
            heads=heads,
            head_dim=head_dim,
            attend=attend,
            impl=impl,
            device=device,
            dtype=dtype,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.ff = feed_forward(dim, mlp_ratio=mlp_ratio, activation=activation, device=device, dtype=dtype)
        self.ff_gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"],
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Text that has read its media. Takes what `MaskedCrossAttention.forward` takes."""
        text = text + self.attn_gate.tanh() * self.attn(text, media, media_locations, media_mask)
        return text + self.ff_gate.tanh() * self.ff(text)

    def routing(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"],
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
    ) -> Routing:
        """How much each text token reads of each medium, as `MaskedCrossAttention.routing`."""
        return self.attn.routing(text, media, media_locations, media_mask)
