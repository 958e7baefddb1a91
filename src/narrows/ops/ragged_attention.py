"""Attention of images that each have their own number of tokens, without padding."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, einsum
from torch.nn.functional import dropout as drop

from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType
from narrows.ops.attention import attention, varlen_attention, why_not_varlen
from narrows.ops.dispatch import Implementation, resolve, why_no_cuda
from narrows.precision import at_least_float32, autocast_off, compute_dtype
from narrows.validation import check_tokens


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
    """One image after another, all its scores, in float32 or better: the specification of `ragged_attention`."""
    images = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    attended = []
    with autocast_off(query):
        for image in images:
            image_query, image_key, image_value = map(at_least_float32, image)
            scores = einsum("qhd,khd->hqk", image_query, image_key) * scale
            attended.append(einsum("hqk,khd->qhd", drop(scores.softmax(-1), dropout), image_value))
    return torch.cat(attended).to(query.dtype)


def grouped(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: list[int],
    key_lengths: list[int],
    *,
    scale: float,
    dropout: float,
) -> Float[Tensor, "Tq H d"]:
    """The reference by one fused attention for all images of equal lengths, which keeps no scores and needs no mask.

    Lengths that all differ make as many calls as there are images.
    """
    queries, keys, values = query.split(query_lengths), key.split(key_lengths), value.split(key_lengths)
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for image, lengths in enumerate(zip(query_lengths, key_lengths, strict=True)):
        groups[lengths].append(image)
    attended = list(queries)
    for (num_queries, _), images in groups.items():
        if num_queries == 0:
            continue
        group = (_stacked(tokens, images) for tokens in (queries, keys, values))
        read = attention(*group, scale=scale, dropout=dropout).transpose(1, 2)
        for image, tokens in zip(images, read, strict=True):
            attended[image] = tokens
    return torch.cat(attended)


def _stacked(tokens: Sequence[Tensor], images: list[int]) -> Tensor:
    """`[images, H, n, d]`; a single image is not copied."""
    chosen = [tokens[image] for image in images]
    return (chosen[0][None] if len(chosen) == 1 else torch.stack(chosen)).transpose(1, 2)


def varlen(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: list[int],
    key_lengths: list[int],
    *,
    scale: float,
    dropout: float,
) -> Float[Tensor, "Tq H d"]:
    """All images in one kernel for sequences of variable length."""
    if reason := _why_not_varlen(query, key, value, dropout):
        raise ImplementationUnavailable(
            f"ragged_attention: impl='varlen' cannot run here: {reason}. Use impl='grouped' or impl='auto'."
        )
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
        for lengths in (query_lengths, key_lengths)
    )
    most = max(query_lengths), max(key_lengths)
    return varlen_attention(query, key, value, query_starts, key_starts, *most, scale=scale)


def _why_not_varlen(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    return "it drops no weights" if dropout else why_not_varlen(query, key, value)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "one image after another, all scores"),
    "grouped": Implementation(grouped, "images of equal lengths together, by fused attention"),
    "varlen": Implementation(varlen, "one kernel for all images; bfloat16 and float16 on CUDA", why_no_cuda),
}


def ragged_attention(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: Int[Tensor, "B"],
    key_lengths: Int[Tensor, "B"],
    *,
    scale: float,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "Tq H d"]:
    r"""The queries of each image attend to the keys of the same image; images lie one after another, without padding.

    $$o_i = \sum_{j \in I(i)} \operatorname{softmax}_{j \in I(i)}(s\, q_i \cdot k_j)\, v_j$$

    with $I(i)$ the keys of the image of query i. An image may have fewer queries than keys: tokens that are dropped
    after this attention are still read by it.

    Lengths decide shapes, so they are read back to the host: this is no function for a graph of static shapes.

    Args:
        query: `[Tq, H, d]`, rows of all images.
        key: `[Tk, H, d]`, rows of all images.
        value: `[Tk, H, d]`.
        query_lengths: `[B]`, queries of each image, 0 allowed. On the CPU they save a synchronisation.
        key_lengths: `[B]`, keys of each image; 0 only for an image without queries.
        scale: s.
        dropout: probability at which weights are dropped.
        impl: "auto" takes "varlen" in bfloat16 and float16 on CUDA without dropout, "grouped" otherwise.

    Raises:
        InvalidArgument: shapes or lengths that do not belong together, an unknown implementation.
        InvalidType: tokens that are not floating-point, lengths that are not integers.
        ImplementationUnavailable: impl="varlen" with arguments that its kernel does not take.
    """
    query, key, value = (tokens.to(compute_dtype(tokens)) for tokens in (query, key, value))
    _check(query, key, value)
    lengths = _lengths("query_lengths", query_lengths, query), _lengths("key_lengths", key_lengths, key)
    if len(lengths[0]) != len(lengths[1]):
        raise InvalidArgument("key_lengths", expected=f"one for each of {len(lengths[0])} images", got=len(lengths[1]))
    if any(queries > 0 and keys == 0 for queries, keys in zip(*lengths, strict=True)):
        raise InvalidArgument("key_lengths", expected="a key for every image with queries", got=lengths[1])
    auto = "grouped" if _why_not_varlen(query, key, value, dropout) else "varlen"
    run = resolve("ragged_attention", impl, IMPLEMENTATIONS, auto=auto)
    if query.numel() == 0:
        return query.clone()  # nothing, in a graph that backward passes through
    return run(query, key, value, *lengths, scale=scale, dropout=dropout)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tokens in {"query": query, "key": key}.items():
        check_tokens(name, tokens, layout="[T, H, d]")
    if key.shape[1:] != query.shape[1:]:
        raise InvalidArgument(
            "key", expected=f"shape [Tk, H, d] with H, d of query {tuple(query.shape)}", got=tuple(key.shape)
        )
    if value.shape != key.shape:
        raise InvalidArgument("value", expected=f"the shape of key {tuple(key.shape)}", got=tuple(value.shape))


def _lengths(name: str, lengths: Tensor, tokens: Tensor) -> list[int]:
    """The lengths, which add up to the number of `tokens`."""
    if lengths.dtype == torch.bool or lengths.is_floating_point():
        raise InvalidType(name, expected="integers [B]", got=f"dtype {lengths.dtype}")
    if lengths.ndim != 1:
        raise InvalidArgument(name, expected="shape [B]", got=tuple(lengths.shape))
    counts: list[int] = lengths.tolist()
    if sum(counts) != len(tokens) or min(counts, default=0) < 0:
        raise InvalidArgument(name, expected=f"counts that add up to {len(tokens)} rows", got=counts)
    return counts
