"""The attention of the Perceiver resampler, and the time embeddings of what it reads."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.attention import attention
from narrows.ops.dispatch import Implementation, resolve
from narrows.precision import at_least_float32, autocast_off
from narrows.validation import check_mask, check_tokens


def perceiver_attention(
    query: Float[Tensor, "B H K E"],
    key: Float[Tensor, "B H S E"],
    value: Float[Tensor, "B H S E"],
    *,
    mask: Bool[Tensor, "B _"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B H K E"]:
    r"""Latents read the media tokens and each other: `attn(q=x, kv=concat[x_f, x])` of Flamingo, figure 5.

    $$\operatorname{softmax}\!\left(\frac{Q(x)\, K([x_f; x])^\top}{\sqrt E}\right) V([x_f; x])$$

    Args:
        query: $Q(x)$, `[B, H, K, E]`, of the K latents.
        key: $K([x_f; x])$, `[B, H, S, E]`, of the N media tokens and after them of the K latents: S = N + K.
        value: $V([x_f; x])$, as `key`.
        mask: `[B, N]`, True at real media tokens, or `[B, S]`, and at the latents. Latents of a sample without any
            token read only each other.
        impl: "auto" takes "fused".

    Raises:
        InvalidArgument: shapes that do not belong together, an unknown implementation.
        InvalidType: a mask that is not boolean.
    """
    readable = _readable(query, key, mask)
    if value.shape != key.shape:
        raise InvalidArgument("value", expected=f"the shape of key {tuple(key.shape)}", got=tuple(value.shape))
    return resolve("perceiver_attention", impl, IMPLEMENTATIONS, auto="fused")(query, key, value, readable)


def perceiver_attention_weights(
    query: Float[Tensor, "B H K E"],
    key: Float[Tensor, "B H S E"],
    *,
    mask: Bool[Tensor, "B _"] | None = None,
) -> Float[Tensor, "B H K N"]:
    """The share of each media token in what a latent reads. What a row lacks to 1 the latents read of each other."""
    weights = _weights(query, key, _readable(query, key, mask))
    return weights[..., : key.shape[2] - query.shape[2]]


def reference(
    query: Float[Tensor, "B H K E"],
    key: Float[Tensor, "B H S E"],
    value: Float[Tensor, "B H S E"],
    readable: Bool[Tensor, "B 1 1 S"] | None,
) -> Float[Tensor, "B H K E"]:
    """All scores, in float32 or better; the specification of `perceiver_attention`."""
    with autocast_off(query):
        return (_weights(query, key, readable) @ at_least_float32(value)).to(query.dtype)


def _weights(query: Tensor, key: Tensor, readable: Tensor | None) -> Tensor:
    """Softmax over media tokens and latents."""
    with autocast_off(query):
        scores = at_least_float32(query) @ at_least_float32(key).transpose(-1, -2) * query.shape[-1] ** -0.5
        if readable is not None:
            scores = scores.masked_fill(~readable, -float("inf"))
        return scores.softmax(-1)


def _readable(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which of media tokens and latents may be read, `[B, 1, 1, S]`, after checks of all shapes."""
    check_tokens("query", query, layout="[B, H, K, E]")
    check_tokens("key", key, layout="[B, H, S, E]")
    (batch, heads, num_latents, width), length = query.shape, key.shape[2]
    if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, width) or length < num_latents:
        raise InvalidArgument(
            "key",
            expected=f"shape [B, H, S, E] with B, H, E of query {tuple(query.shape)}, and S at least its K",
            got=tuple(key.shape),
        )
    if mask is None:
        return None
    if mask.shape[1:] != (length,):
        check_mask("mask", mask, (batch, length - num_latents))
        mask = torch.cat((mask, mask.new_ones(batch, num_latents)), 1)
    check_mask("mask", mask, (batch, length), layout="[B, S]")
    return mask[:, None, None]


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "all scores, in float32 or better"),
    "fused": Implementation(attention, "fused attention"),
}


def time_embeddings(
    table: Float[Tensor, "L D"], num_frames: int, count: Int[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch F D"]:
    r"""The embedding of each of F frames, of which the first `count` are real, or all where `count` is None.

    Up to L frames take the rows of the table as they are; more share its length and take them by linear interpolation
    (Flamingo, appendix A.1: trained on 8 frames, run on 30). Frame f stands at

    $$t_f = f \cdot \min\!\left(1, \frac{L - 1}{\text{count} - 1}\right)$$

    so that the first and the last real frame stand at the ends of the table. What follows the last real frame stretches
    nothing: a padded clip is embedded as it is alone.
    """
    length, device = table.shape[0], table.device
    if count is None:
        # `torch.tensor` would copy the number from the host, which a CUDA graph cannot capture.
        count = torch.full((), num_frames, dtype=torch.long, device=device)
    frame = torch.arange(num_frames, device=device, dtype=at_least_float32(table).dtype)
    stretch = ((length - 1) / (count.to(frame.dtype) - 1).clamp(min=1)).clamp(max=1)
    position = (frame * stretch[..., None]).clamp(max=length - 1)
    before = position.long()
    after = (before + 1).clamp(max=length - 1)
    weight = (position - before).to(table.dtype)
    return torch.lerp(table[before], table[after], weight[..., None])
