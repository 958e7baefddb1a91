"""The Perceiver resampler: any number of media tokens in, a fixed number of latents out."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.layers.initialisation import detached_under_no_grad, draw_, reset_submodules
from narrows.ops.perceiver_resampler import (
    IMPLEMENTATIONS,
    perceiver_attention,
    perceiver_attention_weights,
    time_embeddings,
)
from narrows.ops.recomputation import checkpointed
from narrows.precision import is_transformed
from narrows.routing import Routing
from narrows.validation import (
    check_choice,
    check_mask,
    check_positive,
    check_tensor,
    check_tokens,
    checked,
    why_not_plain,
)


class SquaredReLU(nn.Module):
    """The square of the positive part, the paper's activation."""

    def forward(self, x: Float[Tensor, "*layout D"]) -> Float[Tensor, "*layout D"]:
        """`relu(x) ** 2`."""
        return F.relu(x).square()


ACTIVATIONS = {"gelu": nn.GELU, "squared_relu": SquaredReLU}


def feed_forward(
    dim: int,
    *,
    mlp_ratio: int | float,
    activation: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """LayerNorm, Linear, activation, Linear, without biases: the feed-forward of every Flamingo block."""
    check_choice("activation", activation, tuple(ACTIVATIONS))
    if round(dim * mlp_ratio) < 1:
        raise InvalidArgument("mlp_ratio", expected="a positive number of token widths", got=mlp_ratio)
    hidden = round(dim * mlp_ratio)
    return nn.Sequential(
        nn.LayerNorm(dim, device=device, dtype=dtype),
        nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype),
        ACTIVATIONS[activation](),
        nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype),
    )


class PerceiverAttention(nn.Module):
    r"""One attention of the resampler: latents read media tokens and each other (Flamingo, figure 5).

    $$\operatorname{softmax}\!\left(\frac{Q(x)\, K([x_f; x])^\top}{\sqrt E}\right) V([x_f; x])\, W_o$$

    with latents x and media tokens $x_f$ normalised, each by its own LayerNorm.

    Args:
        dim: width D of latents and media tokens.
        heads: number of heads.
        head_dim: width of a head.
        impl: "auto" or an implementation of `perceiver_attention`.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads, head_dim=head_dim)
        self.heads, self.impl = heads, impl
        inner = heads * head_dim
        self.norm_media = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm_latents = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.to_q = nn.Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(inner, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)

    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        media: Float[Tensor, "B N _"],
        mask: Bool[Tensor, "B _"] | None = None,
        *,
        projected: bool = False,
    ) -> Float[Tensor, "B K D"]:
        """What the latents read.

        Args:
            latents: x, `[B, K, D]`.
            media: $x_f$, `[B, N, D]`.
            mask: `[B, N]`, True at real media tokens, or `[B, N + K]`, and at the latents. Latents of a sample without
                any token read only each other.
            projected: whether `media` are keys and values already, `[B, N, 2 H E]`, as `to_kv` makes them.
        """
        query, key, value = self._project(latents, media, projected)
        read = perceiver_attention(query, key, value, mask=mask, impl=self.impl)
        return self.to_out(read.transpose(1, 2).flatten(2))

    def attention_weights(
        self,
        latents: Float[Tensor, "B K D"],
        media: Float[Tensor, "B N _"],
        mask: Bool[Tensor, "B _"] | None = None,
        *,
        projected: bool = False,
    ) -> Float[Tensor, "B H K N"]:
        """The share of each media token in what a latent reads. Takes what `forward` takes."""
        query, key, _ = self._project(latents, media, projected)
        return perceiver_attention_weights(query, key, mask=mask)

    def _project(self, latents: Tensor, media: Tensor, projected: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, K, E]` of the latents, keys and values `[B, H, N + K, E]` of media tokens and latents."""
        latents = self.norm_latents(latents)
        query = self.to_q(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if projected:
            key_value = torch.cat((media, self.to_kv(latents)), 1)
        else:
            key_value = self.to_kv(torch.cat((self.norm_media(media), latents), 1))
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value


class PerceiverBlock(nn.Module):
    """One layer of the resampler: an attention and a feed-forward, each added to the latents."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int | float = 4,
        activation: str = "gelu",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attn = PerceiverAttention(dim, heads=heads, head_dim=head_dim, impl=impl, device=device, dtype=dtype)
        self.ff = feed_forward(dim, mlp_ratio=mlp_ratio, activation=activation, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)

    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        media: Float[Tensor, "B N _"],
        mask: Bool[Tensor, "B _"] | None = None,
        *,
        projected: bool = False,
    ) -> Float[Tensor, "B K D"]:
        """Latents that have read media tokens. Takes what `PerceiverAttention.forward` takes."""
        latents = latents + self.attn(latents, media, mask, projected=projected)
        return latents + self.ff(latents)


class PerceiverResampler(nn.Module):
    r"""Resample each medium, an image or a clip of any length, to `num_latents` latents (Flamingo, figure 5).

    $$x \leftarrow x + \operatorname{attn}(q = x,\; kv = [x_f; x]), \qquad x \leftarrow x + \operatorname{ffw}(x)$$

    `depth` times from learned latents x, with $x_f$ the tokens of all frames of a medium plus the embedding of their
    frame, flattened. A LayerNorm follows (upstream and OpenFlamingo; the paper has none).

    The layout of the media says what they are, and each medium gives one set of latents:

    | media | meaning | latents |
    | --- | --- | --- |
    | `[B, N, D]` | one image per sample | `[B, K, D]` |
    | `[B, M, N, D]` | M images per sample | `[B, M, K, D]` |
    | `[B, M, F, N, D]` | M clips of F frames per sample; one clip is `[B, 1, F, N, D]` | `[B, M, K, D]` |

    Args:
        dim: width D of media tokens and latents.
        depth: number of attentions, each with a feed-forward.
        num_latents: K.
        heads: number of heads.
        head_dim: width of a head; the inner width is heads * head_dim, whatever D.
        mlp_ratio: hidden width of the feed-forward, in D.
        activation: "gelu", or the paper's "squared_relu".
        num_time_embeddings: how many time embeddings are learned. More frames than that interpolate them linearly.
        time_axis: what the embeddings count. "frames": the frames of a clip, an image being a clip of one frame
            (paper), so that a medium means the same wherever it stands. "media": the media of a sample (upstream).
        impl: "reference", "fused", or "folded": the media are standardised once for all layers, the scale and shift of
            each layer's `norm_media` go into the weight of its `to_kv`, and one product makes the keys and values of
            all layers. "auto" takes "folded" where both are plain in every layer, "fused" otherwise.
        device, dtype: where and in what precision parameters are made.

    Raises:
        InvalidArgument: media that are of none of the three layouts, or a mask that is not of theirs.
        ImplementationUnavailable: on call, impl="folded" where something in a layer is not plain.

    >>> resampler = PerceiverResampler(64, depth=2, num_latents=16)
    >>> resampler(torch.randn(1, 3, 8, 49, 64)).shape  # 3 clips of 8 frames
    torch.Size([1, 3, 16, 64])

    Paper: Alayrac et al. 2022, Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_latents: int = 64,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int | float = 4,
        activation: str = "gelu",
        num_time_embeddings: int = 8,
        time_axis: str = "frames",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, num_latents=num_latents, num_time_embeddings=num_time_embeddings)
        check_choice("time_axis", time_axis, ("frames", "media"))
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS, "folded"))
        self.dim, self.time_axis, self.impl = dim, time_axis, impl
        self.latents = nn.Parameter(torch.empty(num_latents, dim, device=device, dtype=dtype))
        self.time_embeddings = nn.Parameter(torch.empty(num_time_embeddings, dim, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            PerceiverBlock(
                dim,
                heads=heads,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                activation=activation,
                impl="fused" if impl == "folded" else impl,
                device=device,
                dtype=dtype,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self._draw()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)
        self._draw()

    def _draw(self) -> None:
        for parameter in (self.latents, self.time_embeddings):
            draw_(parameter, partial(nn.init.trunc_normal_, std=0.02))

    def forward(
        self,
        media: Float[Tensor, "B *layout N D"],
        mask: Bool[Tensor, "B *layout N"] | None = None,
        *,
        on_weights: Callable[[Float[Tensor, "B H K N"]], object] | None = None,
    ) -> Float[Tensor, "B *medium K D"]:
        """Latents `[B, K, D]` or `[B, M, K, D]`.

        Args:
            media: in one of the three layouts above.
            mask: in the layout of media without D, True at real tokens; a frame or a medium that is not there has none.
                Latents of a medium without any token read only each other: all such media give the same.
            on_weights: called with the weights of the last layer, as `routing` gives them.
        """
        tokens, readable = self._tokens(media, mask)
        folded = self.implementation() == "folded"
        latents = detached_under_no_grad(self.latents).expand(tokens.shape[0], -1, -1)
        for number, (layer, read) in enumerate(zip(self.layers, self._keys_values(tokens, folded), strict=True), 1):
            assert isinstance(layer, PerceiverBlock)
            if on_weights is not None and number == len(self.layers):
                on_weights(layer.attn.attention_weights(latents, read, readable, projected=folded))
            latents = layer(latents, read, readable, projected=folded)
        latents = self.norm(latents)
        return latents if media.ndim == 3 else latents.unflatten(0, media.shape[:2])

    def routing(
        self, media: Float[Tensor, "B *layout N D"], mask: Bool[Tensor, "B *layout N"] | None = None
    ) -> Routing:
        """What the latents read in the last layer: weights `[B, H, K, N]` for one image per sample.

        With M media each is a sample of the routing, `[B * M, H, K, F * N]`, medium m of sample b at b * M + m and its
        frames one after the other. A row sums to 1 less what the latents read of each other.
        """
        found: list[Tensor] = []
        self(media, mask, on_weights=found.append)  # As a call, in which an offloaded layer has its parameters.
        return Routing(found[0], "latents")

    def implementation(self) -> str:
        """Which implementation `forward` takes as the layer is now: "reference", "fused" or "folded".

        Hooks, LoRA, quantised weights, pruning and the like on the `norm_media` or `to_kv` of any layer, and norms that
        differ in their eps, leave "fused", which calls them. impl="folded" raises then, as `forward` does.
        """
        if self.impl in ("reference", "fused"):
            return self.impl
        reason = self._why_not_folded()
        if reason is None:
            return "folded"
        if self.impl == "auto":
            return "fused"
        raise ImplementationUnavailable(
            f"PerceiverResampler: impl='folded' cannot run here: {reason}. Use impl='fused' or impl='auto'."
        )

    def _why_not_folded(self) -> str | None:
        """What must be called as it is, or None where LayerNorms of the media may go into their projections."""
        all_eps, kinds = [], set()
        for number, layer in enumerate(self.layers):
            name = f"layers.{number}.attn"
            attention = getattr(layer, "attn", None)
            if type(layer) is not PerceiverBlock or type(attention) is not PerceiverAttention:
                return f"layers.{number} is no PerceiverBlock with a PerceiverAttention"
            norm, to_kv = attention.norm_media, attention.to_kv
            for kind, child_name, child in ((nn.LayerNorm, "norm_media", norm), (nn.Linear, "to_kv", to_kv)):
                if type(child) is not kind:
                    return f"{name}.{child_name} is a {type(child).__module__}.{type(child).__qualname__}"
            if reason := why_not_plain(((f"{name}.norm_media", norm), (f"{name}.to_kv", to_kv))):
                return reason
            all_eps.append(norm.eps)
            tensors = (norm.weight, norm.bias, to_kv.weight, to_kv.bias)
            kinds.add(tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if len(set(all_eps)) > 1:
            return f"the eps of norm_media differ between layers: {all_eps}"
        return None if len(kinds) == 1 else "norm_media or to_kv differ between layers in shape, dtype or bias"

    def _tokens(self, media: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens of each medium with their time, `[B * M, F * N, D]`, and the mask of them and of latents."""
        layouts = {3: "[B, N, D]", 4: "[B, M, N, D]", 5: "[B, M, F, N, D]"}
        check_tensor("media", media, expected=f"a tensor, one of {list(layouts.values())}")
        if media.ndim not in layouts:
            raise InvalidArgument("media", expected=f"one of {list(layouts.values())}", got=tuple(media.shape))
        layout = layouts[media.ndim]
        check_tokens("media", media, dim=self.dim, layout=layout)
        check_mask("mask", mask, tuple(media.shape[:-1]), layout=layout.replace(", D", ""))
        clips = media[(slice(None),) * (media.ndim - 2) + (None,) * (5 - media.ndim)]
        readable = None if mask is None else mask.reshape(clips.shape[:-1])
        clips = clips + self._time(clips, readable)
        if readable is not None:
            clips = clips.masked_fill(~readable[..., None], 0.0)
            readable = F.pad(readable.flatten(0, 1).flatten(1), (0, len(self.latents)), value=True)
        return clips.flatten(0, 1).flatten(1, 2), readable

    def _keys_values(self, tokens: Float[Tensor, "B N D"], folded: bool) -> Iterator[Tensor]:
        r"""What each layer reads: the tokens, or, folded, their keys and values in each layer, `[B, N, 2 H E]`.

        Every layer's LayerNorm of the tokens has the same statistics, which are taken once, and what it does after
        them goes into the weight: $(x \odot \gamma + \beta) W^\top = x (W \gamma)^\top + W \beta$.
        """
        layers: list[PerceiverAttention] = [layer.attn for layer in self.layers if isinstance(layer, PerceiverBlock)]
        if not folded:
            yield from [tokens] * len(self.layers)
            return
        standardised = F.layer_norm(tokens, tokens.shape[-1:], eps=layers[0].norm_media.eps)
        if not _in_one_product(tokens):
            for layer in layers:
                yield F.linear(standardised, *_fold(*_affine([layer])))
            return
        # Folded weights are kept for backward in any case; what they are made of need not be.
        fold = _fold if is_transformed(tokens) else partial(checkpointed, _fold)
        projected = F.linear(standardised, *fold(*_affine(layers)))
        yield from projected.unflatten(-1, (len(layers), -1)).unbind(-2)

    def _time(self, clips: Tensor, readable: Tensor | None) -> Tensor:
        """Time embeddings, to be added to clips `[B, M, F, N, D]`."""
        of_frames = self.time_axis == "frames"
        steps = clips.shape[2] if of_frames else clips.shape[1]
        # torch.export leaves a number open that may be more than there are embeddings.
        if isinstance(steps, int) and steps <= len(self.time_embeddings):
            embeddings = self.time_embeddings[:steps]
        else:
            count = None
            if readable is not None:
                real = readable.any(-1) if of_frames else readable.flatten(2).any(-1)
                count = (real * torch.arange(1, steps + 1, device=clips.device)).amax(-1)
            embeddings = time_embeddings(self.time_embeddings, steps, count)
        return embeddings[..., None, :] if of_frames else embeddings[..., None, None, :]


def _in_one_product(tokens: Tensor) -> bool:
    """Whether one product makes the keys and values of all layers: it saves launches, and fits no cache of a CPU."""
    return tokens.device.type != "cpu"


def _affine(layers: Sequence[PerceiverAttention]) -> list[Tensor | None]:
    """Of every layer W, then b, then scale, then shift."""
    maps, norms = [layer.to_kv for layer in layers], [layer.norm_media for layer in layers]
    return [getattr(part, name) for parts in (maps, norms) for name in ("weight", "bias") for part in parts]


def _fold(*parameters: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight `[L O, D]` and bias `[L O]` of L maps after their LayerNorms, from what `_affine` gives."""
    count, stacked = len(parameters) // 4, []
    for start in range(0, 4 * count, count):
        found = [parameter for parameter in parameters[start : start + count] if parameter is not None]
        stacked.append(torch.stack(found) if len(found) > 1 else found[0][None] if found else None)
    weight, bias, scale, shift = stacked
    assert weight is not None
    if shift is not None:
        offset = (weight @ shift[..., None]).squeeze(-1)
        bias = offset if bias is None else bias + offset
    weight = weight if scale is None else weight * scale[:, None]
    return weight.flatten(0, 1), None if bias is None else bias.flatten()
