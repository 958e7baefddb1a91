"""Attention of one image after another, as a textbook writes it."""

import torch
from jaxtyping import Float
from torch import Tensor, einsum
from torch.nn.functional import dropout as drop

from narrows.precision import at_least_float32, autocast_off


def reference(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: list[int],
    key_lengths: list[int],
    *,
    scale: float,
    dropout: float,
) -> Float[Tensor, "Tq H d"]:
    """All scores of an image, in float32 or better; the specification of `ragged_attention`."""
    queries, keys, values = query.split(query_lengths), key.split(key_lengths), value.split(key_lengths)
    with autocast_off(query):
        images = [_attend(*image, scale, dropout) for image in zip(queries, keys, values, strict=True)]
    return torch.cat(images).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    scores = einsum("qhd,khd->hqk", at_least_float32(query), at_least_float32(key)) * scale
    return einsum("hqk,khd->qhd", drop(scores.softmax(-1), dropout), at_least_float32(value))
