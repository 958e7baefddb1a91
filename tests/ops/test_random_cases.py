"""Operations on random shapes from 0, masks, dtypes and layouts in memory, against their formulas in float64."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import ImplementationUnavailable
from narrows.ops import media_attention as media
from narrows.ops import perceiver_resampler as perceiver
from narrows.ops import ragged_attention as ragged
from narrows.ops import separable_attention as separable
from narrows.ops import slot_attention as slots
from narrows.ops import soft_moe as moe
from narrows.ops import token_sampling as sampling
from narrows.ops.attention import attention
from tests.random_cases import assert_rounded, dtypes, exact, laid_out, layouts, random_cases, seeds

# Shape checks would take most of the time; they have run on the same calls elsewhere.
pytestmark = pytest.mark.compiled

Call = tuple[Callable[..., Any], dict[str, Any]]

sizes = st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 5), st.sampled_from((1, 2)))
"""Batch, tokens, carriers, heads."""


def _mask(*shape: int) -> Tensor:
    """Some rows without any token, some with all."""
    share = torch.rand(shape[0], *(1 for _ in shape[1:]))
    return torch.rand(shape) < (2 * share - 0.5)


def _attention(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    query, key, value = (torch.randn(batch, heads, n, 4) for n in (carriers, tokens + 1, tokens + 1))
    mask = _mask(batch, 1, 1, tokens + 1)
    mask[..., 0] = True
    return attention, {"query": query, "key": key, "value": value, "mask": mask}


def _media_attention(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    many = carriers % 4
    query, (key, value) = torch.randn(batch, tokens, heads, 4), torch.randn(2, batch, many, 3, heads, 4)
    arguments = {"query": query, "key": key, "value": value, "mask": _mask(batch, many, 3)}
    seen = media.LastMedium().visible(torch.rand(batch, tokens) < 0.4) if heads == 2 else None
    return partial(media.media_attention, visible=seen), arguments


def _depthwise(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    query, key, value = torch.randn(3, batch, carriers, tokens + 1, heads, 4)
    arguments = {"query": query, "key": key, "value": value, "mask": _mask(batch, carriers, tokens)}
    return separable.depthwise_attention, arguments


def _pointwise(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    maps, (query, key) = torch.randn(batch, carriers, tokens, heads, 4), torch.randn(2, batch, carriers, heads, 4)
    mask = torch.ones(batch, carriers, tokens, dtype=torch.bool)
    return separable.pointwise_attention, {"maps": maps, "query": query, "key": key, "mask": mask}


def _slot_attention(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    queries, keys = torch.randn(batch, heads, carriers, 4), torch.randn(batch, 1, tokens, 4)
    values = torch.randn(batch, 1, tokens, 3)
    return slots.slot_attention, {"queries": queries, "keys": keys, "values": values, "mask": _mask(batch, tokens)}


def _soft_moe(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    values, keys = torch.randn(2, batch, tokens, 4)
    arguments = {"values": values, "token_keys": keys, "slot_keys": torch.randn(carriers, 4)}
    return partial(moe.soft_moe, experts=torch.tanh), {**arguments, "mask": _mask(batch, tokens)}


def _perceiver(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    query, (key, value) = torch.randn(batch, heads, carriers, 4), torch.randn(2, batch, heads, tokens + carriers, 4)
    return perceiver.perceiver_attention, {"query": query, "key": key, "value": value, "mask": _mask(batch, tokens)}


def _ragged(batch: int, tokens: int, carriers: int, heads: int) -> Call:
    keys = torch.randint(0, tokens + 1, (batch,))
    queries = torch.minimum(keys, torch.randint(0, carriers + 1, (batch,)))
    query, (key, value) = torch.randn(int(queries.sum()), heads, 4), torch.randn(2, int(keys.sum()), heads, 4)
    arguments = {"query": query, "key": key, "value": value, "query_lengths": queries, "key_lengths": keys}
    return partial(ragged.ragged_attention, scale=0.5), arguments


OPERATIONS: dict[str, tuple[Callable[..., Call], Sequence[str]]] = {
    "attention": (_attention, ()),
    "media_attention": (_media_attention, tuple(media.IMPLEMENTATIONS)),
    "depthwise_attention": (_depthwise, tuple(separable.IMPLEMENTATIONS)),
    "pointwise_attention": (_pointwise, tuple(separable.IMPLEMENTATIONS)),
    "slot_attention": (_slot_attention, tuple(slots.IMPLEMENTATIONS)),
    "soft_moe": (_soft_moe, tuple(moe.IMPLEMENTATIONS)),
    "perceiver_attention": (_perceiver, tuple(perceiver.IMPLEMENTATIONS)),
    "ragged_attention": (_ragged, tuple(ragged.IMPLEMENTATIONS)),
}
ON_A_GPU = {"triton", "varlen"}


def _parts(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]  # type: ignore[list-item]


@pytest.mark.parametrize("name", OPERATIONS)
@random_cases
@given(size=sizes, dtype=dtypes, layout=layouts, seed=seeds, shared=st.booleans(), masked=st.booleans())
def test_an_operation_is_its_formula(
    name: str, size: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int, shared: bool, masked: bool
) -> None:
    make, implementations = OPERATIONS[name]
    torch.manual_seed(seed)
    operation, arguments = make(*size)
    arguments = {
        key: laid_out(value.to(dtype), layout) if value.is_floating_point() else value
        for key, value in arguments.items()
    }
    if shared and arguments.get("value") is not None and arguments["value"].shape == arguments["key"].shape:
        arguments["value"] = arguments["key"]
    if not masked and name != "attention":
        arguments.pop("mask", None)
    before = {key: value.clone() for key, value in arguments.items()}
    named = {} if not implementations else {"impl": "reference"}
    expected = _parts(operation(**exact(arguments), **named))
    for impl in [
        *(each for each in implementations if each not in ON_A_GPU),
        *(["auto"] if implementations else [None]),
    ]:
        try:
            found = _parts(operation(**arguments, **({} if impl is None else {"impl": impl})))
        except ImplementationUnavailable:  # named, it says why it cannot run here; "auto" has to
            assert impl not in (None, "auto", "reference")
            continue
        for one, other in zip(found, expected, strict=True):
            # A sum of up to 14 products of numbers near 1, rounded at each step, twice over: softmax and mean.
            assert_rounded(one, other, dtype, roundings=2 * 2 * 14)
    for key, value in before.items():
        assert torch.equal(arguments[key], value), f"{key} was changed"


@random_cases
@given(
    size=sizes, layout=layouts, seed=seeds, count=st.integers(1, 12), kind=st.sampled_from(("smooth", "ties", "zeros")),
    masked=st.booleans(), always=st.booleans(), prefix=st.sampled_from((0, 1)),
)  # fmt: skip
def test_sampling_keeps_real_tokens_in_order_and_those_of_the_reference(
    size: tuple[int, int, int, int],
    layout: str,
    seed: int,
    count: int,
    kind: str,
    masked: bool,
    always: bool,
    prefix: int,
) -> None:
    batch, tokens, *_ = size
    torch.manual_seed(seed)
    scores = torch.rand(batch, tokens)
    scores = {"smooth": scores, "ties": (3 * scores).round(), "zeros": torch.zeros_like(scores)}[kind]
    scores = laid_out(scores, layout)
    mask = _mask(batch, tokens) if masked else None
    call = partial(sampling.inverse_transform_sample, num_samples=count, mask=mask, sample_always=always, prefix=prefix)
    expected = call(exact({"scores": scores})["scores"], impl="reference")
    for impl in [*(each for each in sampling.QUANTILE_IMPLEMENTATIONS if each not in ON_A_GPU), "auto"]:
        found = call(scores, impl=impl)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    kept, real = expected
    for row in range(batch):
        chosen = (kept[row][real[row]] - prefix).tolist()
        chosen = [token for token in chosen if token >= 0]
        assert chosen == sorted(set(chosen))
        assert all(0 <= token < tokens and (mask is None or mask[row, token]) for token in chosen)
        assert len(chosen) <= count
