"""Gated cross attention: text reads the media that stand before it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.initialisation import reset_submodules
from narrows.layers.perceiver_resampler import feed_forward
from narrows.ops.media_attention import (
    IMPLEMENTATIONS,
    Attend,
    LastMedium,
    VisibleMedia,
    media_attention,
    media_attention_weights,
)
from narrows.routing import Routing
from narrows.validation import check_choice, check_mask, check_positive, check_tensor, check_tokens, checked

LAST_MEDIUM = LastMedium()


def check_attend(attend: object) -> None:
    """Raise unless `attend` is a policy."""
    if not isinstance(attend, Attend):
        raise InvalidType("attend", expected="a policy, LastMedium() for instance", got=repr(attend))


class MediaKeysValues(NamedTuple):
    """Media as one `MaskedCrossAttention` reads them, projected: to be made once and read by any number of texts.

    Args:
        key: `[B, M, N, H, E]`.
        value: as `key`.
        mask: `[B, M]` or `[B, M, N]`, True at real media or latents, or None where all are.
    """

    key: Float[Tensor, "B M N H E"]
    value: Float[Tensor, "B M N H E"]
    mask: Bool[Tensor, "B M *N"] | None = None


class MaskedCrossAttention(nn.Module):
    r"""Text tokens read the latents of the media they may see (Flamingo, section 2.3).

    $$y_l = W_o \operatorname{attn}\bigl(q = W_q \operatorname{LN}(y_l),\; kv = W_{kv}\, x_{V(l)}\bigr)$$

    with V(l) the media that token l may see, as in `narrows.ops.media_attention.media_attention`. A token that may see
    none gets exactly 0.

    Args:
        dim: width D of the text.
        media_dim: width of the media latents; None: as the text.
        heads: number of heads.
        head_dim: width of a head; the inner width is heads * head_dim (upstream's and OpenFlamingo's 512 by default;
            the paper takes the width of the text).
        attend: which media text may see: `LastMedium()`, `LastMedia(count)`, `ConsecutiveGroup()`, `AllPrevious()`.
        impl: "auto" or an implementation of `media_attention`.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: shapes that do not belong together.
        InvalidType: `attend` is no policy.
        ImplementationUnavailable: on call, impl="segmented" where a token may see any number of media.

    >>> attention = MaskedCrossAttention(64, media_dim=32)
    >>> locations = torch.tensor([[False, True, False, True, False]])
    >>> read = attention(torch.randn(1, 5, 64), torch.randn(1, 2, 16, 32), locations)
    >>> bool((read[:, 0] == 0).all())
    True

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        media_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        attend: Attend = LAST_MEDIUM,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        media_dim = dim if media_dim is None else media_dim
        check_positive(dim=dim, media_dim=media_dim, heads=heads, head_dim=head_dim)
        check_attend(attend)
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        self.dim, self.media_dim, self.heads = dim, media_dim, heads
        self.attend, self.impl = attend, impl
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.to_q = nn.Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_kv = nn.Linear(media_dim, 2 * inner, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(inner, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)

    def forward(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"] | MediaKeysValues,
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        *,
        visible: VisibleMedia | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the text reads of the media, 0 where it sees none.

        Args:
            text: `[B, T, D]`.
            media: `[B, M, N, media_dim]`, N latents for each of M media; M may be 0. The m-th True of a row of
                `media_locations` is where its m-th medium stands. Text after a medium that is not in `media`, because
                there are more locations than media, does not see it, and does not see another in its place. Or what
                `keys_values` made of media.
            media_locations: `[B, T]`, True where a medium stands; the token there sees it already. None: all text sees
                all media.
            media_mask: `[B, M]` or `[B, M, N]`, True at real media or latents. The others, NaN included, reach no
                output and no gradient.
            visible: the media that each token sees, in place of `media_locations`: for a text that is not whole
                (decoding), documents packed into one row, or a rule of your own.
        """
        query, media, visible = self._project(text, media, media_locations, media_mask, visible)
        read = media_attention(query, media.key, media.value, visible, mask=media.mask, impl=self.impl)
        return self.to_out(read.flatten(2))

    def keys_values(
        self, media: Float[Tensor, "B M N C"], media_mask: Bool[Tensor, "B M *N"] | None = None
    ) -> MediaKeysValues:
        """The keys and values of media, which `forward` takes in their place."""
        check_tokens("media", media, dim=self.media_dim, layout="[B, M, N, D]")
        _check_media_mask(media_mask, media)
        if media_mask is not None:
            # Before the projection: its weight's gradient would take in 0 * NaN otherwise.
            media = media.masked_fill(~media_mask[(...,) + (None,) * (4 - media_mask.ndim)], 0.0)
        key, value = self.to_kv(media).unflatten(-1, (2, self.heads, -1)).unbind(3)
        return MediaKeysValues(key, value, media_mask)

    def routing(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"] | MediaKeysValues,
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        *,
        visible: VisibleMedia | None = None,
    ) -> Routing:
        """How much each text token reads of each medium, over all its latents: weights `[B, H, M, T]`.

        A column sums to 1, or to 0 where the token sees no medium. Takes what `forward` takes.
        """
        query, media, visible = self._project(text, media, media_locations, media_mask, visible)
        weights = media_attention_weights(query, media.key, visible, mask=media.mask)
        return Routing(weights.sum(-1).transpose(2, 3), "media")

    def seen(
        self,
        text: Float[Tensor, "B T D"],
        media_locations: Bool[Tensor, "B T"] | None,
        visible: VisibleMedia | None = None,
    ) -> VisibleMedia | None:
        """The media that each text token sees, from whichever of the two `forward` was given; None: all see all."""
        check_tokens("text", text, dim=self.dim, layout="[B, T, D]")
        if media_locations is None:
            return visible
        check_mask("media_locations", media_locations, text.shape[:2], layout="[B, T]")
        if visible is not None:
            raise InvalidArgument("visible", expected="None with media_locations", got="both")
        return self.attend.visible(media_locations)

    def _project(
        self,
        text: Tensor,
        media: Tensor | MediaKeysValues,
        media_locations: Tensor | None,
        media_mask: Tensor | None,
        visible: VisibleMedia | None,
    ) -> tuple[Tensor, MediaKeysValues, VisibleMedia | None]:
        """Queries of the text, keys and values of the media, and what the text sees of them."""
        visible = self.seen(text, media_locations, visible)
        if not isinstance(media, MediaKeysValues):
            media = self.keys_values(media, media_mask)
        elif media_mask is not None:
            raise InvalidArgument("media_mask", expected="None with keys and values, which have theirs", got="a mask")
        if media.key.shape[0] != text.shape[0]:
            raise InvalidArgument("media", expected=f"the batch of text, {text.shape[0]}", got=tuple(media.key.shape))
        return self.to_q(self.norm(text)).unflatten(-1, (self.heads, -1)), media, visible


class GatedCrossAttentionBlock(nn.Module):
    r"""Masked cross attention and a feed-forward, each behind a gate that starts closed (Flamingo, figure 4).

    $$y \leftarrow y + \tanh(\alpha)\operatorname{attn}(q = y,\; kv = x), \qquad
    y \leftarrow y + \tanh(\beta)\operatorname{ffw}(y)$$

    With $\alpha = \beta = 0$, as at the start by default, the block is the identity.

    Args:
        dim: width D of the text.
        media_dim: width of the media latents; None: as the text.
        heads: number of heads.
        head_dim: width of a head.
        attend: which media text may see: `LastMedium()`, `LastMedia(count)`, `ConsecutiveGroup()`, `AllPrevious()`.
        feed_forward_without_media: whether the feed-forward also applies to text that sees no medium (paper,
            OpenFlamingo, Idefics), or leaves it as it is (Llama 3.2).
        mlp_ratio: hidden width of the feed-forward, in D.
        activation: "gelu", or the paper's "squared_relu".
        gate_init: alpha and beta at the start. Beside 0 the block changes what a frozen language model says from the
            first step on, and its other parameters learn from that step on too, instead of once the gates have opened.
        impl: "auto" or an implementation of `media_attention`.
        device, dtype: where and in what precision parameters are made.

    >>> block = GatedCrossAttentionBlock(64)
    >>> text, media = torch.randn(1, 5, 64), torch.randn(1, 2, 16, 64)
    >>> torch.equal(block(text, media), text)
    True

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        media_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        attend: Attend = LAST_MEDIUM,
        feed_forward_without_media: bool = True,
        mlp_ratio: int | float = 4,
        activation: str = "gelu",
        gate_init: int | float = 0.0,
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
        self.feed_forward_without_media = feed_forward_without_media
        self.gate_init = float(gate_init)
        self.attn_gate = nn.Parameter(torch.full((1,), self.gate_init, device=device, dtype=dtype))
        self.ff = feed_forward(dim, mlp_ratio=mlp_ratio, activation=activation, device=device, dtype=dtype)
        self.ff_gate = nn.Parameter(torch.full((1,), self.gate_init, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw all parameters anew, and put the gates to `gate_init`."""
        reset_submodules(self)
        nn.init.constant_(self.attn_gate, self.gate_init)
        nn.init.constant_(self.ff_gate, self.gate_init)

    def forward(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"] | MediaKeysValues,
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        *,
        visible: VisibleMedia | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Text that has read its media. Takes what `MaskedCrossAttention.forward` takes."""
        visible = self.attn.seen(text, media_locations, visible)
        text = text + self.attn_gate.tanh() * self.attn(text, media, media_mask=media_mask, visible=visible)
        added = self.ff_gate.tanh() * self.ff(text)
        if not self.feed_forward_without_media:
            added = torch.where(_reads(media, media_mask, visible)[..., None], added, 0.0)
        return text + added

    def keys_values(
        self, media: Float[Tensor, "B M N C"], media_mask: Bool[Tensor, "B M *N"] | None = None
    ) -> MediaKeysValues:
        """The keys and values of media, which `forward` takes in their place."""
        return self.attn.keys_values(media, media_mask)

    def routing(
        self,
        text: Float[Tensor, "B T D"],
        media: Float[Tensor, "B M N C"] | MediaKeysValues,
        media_locations: Bool[Tensor, "B T"] | None = None,
        media_mask: Bool[Tensor, "B M *N"] | None = None,
        *,
        visible: VisibleMedia | None = None,
    ) -> Routing:
        """How much each text token reads of each medium, as `MaskedCrossAttention.routing`."""
        return self.attn.routing(text, media, media_locations, media_mask, visible=visible)


def _reads(
    media: Tensor | MediaKeysValues, media_mask: Tensor | None, visible: VisibleMedia | None
) -> Bool[Tensor, "B _"]:
    """Which text tokens see a latent at all, `[B, T]`; where all see all, `[B, 1]`."""
    if isinstance(media, MediaKeysValues):
        media, _, media_mask = media
    _check_media_mask(media_mask, media)
    if visible is not None:
        return visible.any(media.shape[1], media_mask)
    there = media.new_ones(media.shape[:2], dtype=torch.bool) if media_mask is None else media_mask
    return there.flatten(1).any(-1, keepdim=True)


def _check_media_mask(media_mask: Tensor | None, media: Tensor) -> None:
    """Raise unless it is a mask `[B, M]` of media, or `[B, M, N]` of their latents."""
    if media_mask is None:
        return
    check_tensor("media_mask", media_mask, expected="None or a boolean tensor [B, M] or [B, M, N]")
    if media_mask.ndim == 2:
        check_mask("media_mask", media_mask, media.shape[:2], layout="[B, M]")
    else:
        check_mask("media_mask", media_mask, media.shape[:3], layout="[B, M, N]")
