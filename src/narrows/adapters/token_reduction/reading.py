"""How much attention each token gets from whoever reads the image."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from narrows.adapters.token_reduction.layout import Layout
from narrows.precision import at_least_float32, autocast_off


def read_by_one(
    query: Float[Tensor, "B 1 H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb n"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The row of the attention matrix of one query of each image; `bias` as in `attend`."""
    with autocast_off(key):
        # A sum of products reads the keys once, where a batched product would first copy them.
        query = layout.spread(at_least_float32(query[:, 0]))
        logits = layout.lines((at_least_float32(key) * query).sum(-1)).transpose(1, 2) * scale
        return _weights(logits, layout, bias)


def read_by_logits(
    logits: Float[Tensor, "R r H"], layout: Layout, *, bias: Shaped[Tensor, "Bb Hb q m"] | None = None
) -> Float[Tensor, "B 1 n"]:
    """The row of the attention matrix that these logits give, the mean over heads; nothing of what no token reads."""
    with autocast_off(logits):
        lines = layout.lines(at_least_float32(logits)).transpose(1, 2)
        readable = None if bias is None else bias.amax((1, 2))[:, None]
        return _weights(lines, layout, readable).mean(1, keepdim=True)


def read_by_all(
    query: Float[Tensor, "R r H d"],
    key: Float[Tensor, "R r H d"],
    layout: Layout,
    *,
    scale: float,
    bias: Shaped[Tensor, "Bb Hb q m"] | None = None,
) -> Float[Tensor, "B H n"]:
    """The mean over the rows of the attention matrix of all queries, one head after another to save memory."""
    mask = layout.mask
    with autocast_off(key):
        queries, keys = at_least_float32(layout.lines(query)), at_least_float32(layout.lines(key))
        asking = None if mask is None else (mask / mask.sum(1, keepdim=True)).to(queries.dtype)[..., None]
        heads = []
        for head in range(queries.shape[2]):
            logits = queries[:, :, head] @ keys[:, :, head].transpose(1, 2) * scale
            of_head = None if bias is None else bias[:, head % bias.shape[1]]
            weights = _weights(logits, layout, of_head)
            heads.append(weights.mean(1) if asking is None else (weights * asking).sum(1))
    return torch.stack(heads, 1)


def _weights(logits: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """Softmax of `[B, x, n]` over the tokens of each image."""
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if layout.mask is None:
        return logits.softmax(-1)
    return logits.masked_fill(~layout.mask[:, None], -torch.inf).softmax(-1)
