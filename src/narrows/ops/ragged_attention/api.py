"""The public function for attention of images that each have their own number of tokens."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.ragged_attention.grouped import grouped
from narrows.ops.ragged_attention.reference import reference
from narrows.ops.ragged_attention.varlen import suits, varlen, why_not
from narrows.validation import check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference, "one image after another, all scores"),
    "grouped": Implementation(grouped, "images of equal lengths together, by fused attention"),
    "varlen": Implementation(varlen, "one kernel for all images; bfloat16 and float16 on CUDA", why_not),
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

    with $I(i)$ the keys of the image of query i. An image may have fewer queries than keys: tokens that are dropped are
    read once more, and read no longer.

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
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # as fused attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value)
    lengths = _lengths("query_lengths", query_lengths, query), _lengths("key_lengths", key_lengths, key)
    if len(lengths[0]) != len(lengths[1]):
        raise InvalidArgument("key_lengths", expected=f"one for each of {len(lengths[0])} images", got=len(lengths[1]))
    if any(queries > 0 and keys == 0 for queries, keys in zip(*lengths, strict=True)):
        raise InvalidArgument("key_lengths", expected="a key for every image with queries", got=lengths[1])
    auto = "varlen" if suits(query, dropout) else "grouped"
    run = resolve("ragged_attention", impl, IMPLEMENTATIONS, auto=auto)
    if query.numel() == 0:
        return torch.zeros_like(query)
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
