import math
from functools import partial
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.separable_attention import (
    IMPLEMENTATIONS,
    depthwise_attention,
    pointwise_attention,
    window_token_attention,
)
from tests.support import RoundedTo, assert_close, assert_within_budget_on_average, gradients


class Form(NamedTuple):
    """Which of the two operations, and how it is called."""

    pointwise: bool
    masked: bool = False
    window_token: bool = True
    shortcut: bool = True


FORMS = {
    "depthwise": Form(False),
    "depthwise_masked": Form(False, masked=True),
    "depthwise_without_token_masked": Form(False, masked=True, window_token=False),
    "pointwise": Form(True),
    "pointwise_masked": Form(True, masked=True),
    "pointwise_without_shortcut": Form(True, shortcut=False),
    "pointwise_without_shortcut_masked": Form(True, masked=True, shortcut=False),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_pointwise_form = pytest.mark.parametrize(
    "form", [form for form in FORMS.values() if form.pointwise], ids=[n for n, form in FORMS.items() if form.pointwise]
)
every_masked_form = pytest.mark.parametrize(
    "form", [form for form in FORMS.values() if form.masked], ids=[n for n, form in FORMS.items() if form.masked]
)
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def random_tensors(
    form: Form, batch: int = 2, num_windows: int = 4, n: int = 9, heads: int = 2, head_dim: int = 4, seed: int = 0
) -> list[Tensor]:
    """Queries, keys and values, or maps, queries and keys; in float64, and so large that no softmax is flat."""
    generator = torch.Generator().manual_seed(seed)
    inside = (batch, num_windows, n + form.window_token, heads, head_dim)
    between = (batch, num_windows, heads, head_dim)
    shapes = [(batch, num_windows, n, heads, head_dim), between, between] if form.pointwise else [inside] * 3
    return [1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def a_mask(form: Form, batch: int = 2, num_windows: int = 4, n: int = 9) -> Tensor | None:
    """Some padding in most windows, a sample whose last window is padding alone, and one with a single real window."""
    if not form.masked:
        return None
    mask = torch.rand(batch, num_windows, n, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    mask[0, 1:, :] = False
    mask[-1, -1] = False
    return mask


def run(tensors: list[Tensor], form: Form, impl: str, mask: Tensor | None) -> Tensor:
    """The operation; 0 where its result means nothing."""
    if form.pointwise:
        output = pointwise_attention(*tensors, mask, shortcut=form.shortcut, impl=impl)
        return output if mask is None else output.masked_fill(~mask[..., None, None], 0.0)
    output = depthwise_attention(*tensors, mask, impl=impl)
    if mask is None:
        return output
    real = torch.cat((torch.ones_like(mask[..., :1]), mask), -1) if form.window_token else mask
    return output.masked_fill(~real[..., None, None], 0.0)


def with_gradients(tensors: list[Tensor], form: Form, impl: str, mask: Tensor | None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = run(leaves, form, impl, mask)
    return [output, *gradients(output, *leaves)]


def softmax(scores: list[Tensor]) -> Tensor:
    shares = torch.stack(scores).exp()
    return shares / shares.sum()


def loops_inside(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, a query at a time; padding gets zeros."""
    batch, num_windows, length, heads, d = query.shape
    result = torch.zeros_like(query)
    for b in range(batch):
        for k in range(num_windows):
            real = list(range(length))
            if mask is not None:
                before = length - mask.shape[-1]  # the window token
                real = [*range(before), *(i + before for i in range(mask.shape[-1]) if mask[b, k, i])]
            for h in range(heads):
                for i in real:
                    shares = softmax([query[b, k, i, h] @ key[b, k, j, h] / math.sqrt(d) for j in real])
                    values = [value[b, k, j, h] for j in real]
                    result[b, k, i, h] = sum(share * value for share, value in zip(shares, values, strict=True))
    return result


def loops_between(maps: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, shortcut: bool) -> Tensor:
    """The definition, a place of a window at a time; padding gets zeros."""
    batch, num_windows, n, heads, d = maps.shape
    result = torch.zeros_like(maps)
    for b in range(batch):
        real = torch.ones(num_windows, n, dtype=torch.bool) if mask is None else mask[b]
        alone = real.any(-1).sum() <= 1
        for k in range(num_windows):
            for i in range(n):
                if not real[k, i]:
                    continue
                if shortcut:
                    result[b, k, i] += maps[b, k, i]
                if shortcut and alone:
                    continue
                others = [other for other in range(num_windows) if real[other, i]]
                for h in range(heads):
                    shares = softmax([query[b, k, h] @ key[b, other, h] / math.sqrt(d) for other in others])
                    for share, other in zip(shares, others, strict=True):
                        result[b, k, i, h] += share * maps[b, other, i, h]
    return result


@every_form
@every_impl
def test_every_implementation_is_the_definition_written_as_loops(impl: str, form: Form) -> None:
    tensors, mask = random_tensors(form, num_windows=3, n=4), a_mask(form, num_windows=3, n=4)
    expected = loops_between(*tensors, mask, form.shortcut) if form.pointwise else loops_inside(*tensors, mask)
    assert_close(run(tensors, form, impl, mask), expected, 1e-12)


@every_form
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 1, 1)], ids=str)
def test_gradcheck_of_the_reference(shape: tuple[int, int, int], form: Form) -> None:
    tensors, mask = random_tensors(form, *shape, heads=2, head_dim=2), a_mask(form, *shape)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *tensors: run(list(tensors), form, "reference", mask), leaves)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "reference"])
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_fast_forms_equal_the_reference_at_any_shape(impl: str, data: st.DataObject) -> None:
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
    form = data.draw(st.sampled_from(list(FORMS.values())))
    shape = data.draw(st.integers(1, 3)), data.draw(size), data.draw(size)
    tensors = random_tensors(form, *shape, heads=data.draw(st.integers(1, 3)), head_dim=data.draw(size))
    if data.draw(st.booleans()):
        tensors = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    mask = a_mask(form, *shape)
    expected = with_gradients(tensors, form, "reference", mask)
    for fast, plain in zip(with_gradients(tensors, form, impl, mask), expected, strict=True):
        assert_close(fast, plain, 1e-10)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_low_precision_loses_no_more_than_the_formula_does(impl: str, dtype: torch.dtype, form: Form) -> None:
    draws, mask = [], a_mask(form, n=16)
    for seed in range(8):
        low = [tensor.to(dtype) for tensor in random_tensors(form, n=16, head_dim=16, seed=seed)]
        exact = [tensor.double() for tensor in low]
        oracle = with_gradients(exact, form, "reference", mask)
        with RoundedTo(dtype):
            plain = with_gradients(exact, form, "reference", mask)
        ours = with_gradients(low, form, impl, mask)
        assert {result.dtype for result in ours} == {dtype}
        draws.append((ours, plain, oracle))
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_many_windows_in_half_precision(impl: str, dtype: torch.dtype, masked: bool) -> None:
    """64 k tokens in 1,000 windows whose tokens all say the same: the mean of what stands at their places."""
    n = 4 if impl == "reference" else 64
    maps = (100 + torch.randn(1, 1000, n, 1, 2)).to(dtype)
    mask = torch.rand(1, 1000, n) < 0.5 if masked else torch.ones(1, 1000, n, dtype=torch.bool)
    still = torch.zeros(1, 1000, 1, 2, dtype=dtype)
    output = pointwise_attention(maps, still, still, mask if masked else None, impl=impl)
    mean = (maps.double() * mask[..., None, None]).sum(1) / mask.sum(1)[..., None, None]
    error = (output.double() - mean[:, None]).abs() / mean[:, None]
    assert (error[mask] <= 2 * torch.finfo(dtype).eps).all()


@every_pointwise_form
@every_impl
def test_a_single_window_has_nothing_to_exchange_and_gives_zero_gradients(impl: str, form: Form) -> None:
    maps, query, key = random_tensors(form, num_windows=1)
    output, _, *grads = with_gradients([maps, query, key], form, impl, None)
    assert_close(output, maps, 1e-12)
    for gradient in grads:
        assert gradient.abs().max() < 1e-15


@every_masked_form
@every_impl
def test_what_padding_holds_does_not_matter(impl: str, form: Form) -> None:
    tensors, mask = random_tensors(form), a_mask(form)
    padding = ~torch.cat((torch.ones_like(mask[..., :1]), mask), -1) if len({t.ndim for t in tensors}) == 1 else ~mask
    padding = padding[..., padding.shape[-1] - tensors[0].shape[2] :]
    spoiled = [
        tensor.masked_fill(padding[..., None, None] if tensor.ndim == 5 else ~mask.any(-1)[..., None, None], 1e3)
        for tensor in tensors
    ]
    assert_close(run(spoiled, form, impl, mask), run(tensors, form, impl, mask), 1e-12)


@every_masked_form
@every_impl
def test_windows_of_padding_alone_change_nothing(impl: str, form: Form) -> None:
    """However far a map is padded, the result is the same: also where that leaves a single real window."""
    tensors = random_tensors(form)
    for real in (1, 2):
        mask = torch.zeros(2, 4, 9, dtype=torch.bool)
        mask[:, :real] = True
        alone = run([tensor[:, :real] for tensor in tensors], form, impl, None)
        assert_close(run(tensors, form, impl, mask)[:, :real], alone, 1e-12)


@every_impl
def test_tokens_of_a_window_and_windows_of_a_map_have_no_order(impl: str) -> None:
    inside, between = torch.randperm(8), torch.randperm(5)
    tensors = random_tensors(FORMS["depthwise"], num_windows=5, n=7)
    output = depthwise_attention(*tensors, impl=impl)
    permuted = depthwise_attention(*(tensor[:, between][:, :, inside] for tensor in tensors), impl=impl)
    assert_close(permuted, output[:, between][:, :, inside], 1e-12)
    maps, query, key = random_tensors(FORMS["pointwise"], num_windows=5, n=8)
    output = pointwise_attention(maps, query, key, impl=impl)
    permuted = pointwise_attention(maps[:, between][:, :, inside], query[:, between], key[:, between], impl=impl)
    assert_close(permuted, output[:, between][:, :, inside], 1e-12)


@every_impl
def test_depthwise_nothing_leaves_its_window(impl: str) -> None:
    tensors = random_tensors(FORMS["depthwise"])
    for tensor in tensors:
        tensor[:, 0] = torch.nan
    output = depthwise_attention(*tensors, impl=impl)
    assert output[:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


@every_impl
def test_dropout_keeps_the_expectation(impl: str) -> None:
    torch.manual_seed(0)
    for form, operation in {
        FORMS["depthwise"]: depthwise_attention,
        FORMS["pointwise"]: partial(pointwise_attention, shortcut=True),
    }.items():
        tensors = random_tensors(form, batch=1, num_windows=2, n=3)
        exact = operation(*tensors, impl=impl)
        many = operation(*(tensor.expand(20000, *tensor.shape[1:]) for tensor in tensors), dropout=0.3, impl=impl)
        standard_error = many.std(0) / len(many) ** 0.5
        assert (standard_error > 1e-4).all(), "nothing was dropped"
        assert ((many.mean(0) - exact[0]).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("name", ["depthwise", "depthwise_masked", "depthwise_without_token_masked"])
def test_window_tokens_read_what_the_depthwise_attention_gives_them(name: str) -> None:
    """Values that name their place: what is read of them is the attention matrix."""
    form = FORMS[name]
    query, key, _ = random_tensors(form)
    mask = a_mask(form)
    length = query.shape[2]
    value = torch.eye(length, dtype=torch.float64)[:, None].expand(2, 4, length, 2, length)
    padded = [torch.nn.functional.pad(part, (0, length - 4)) * (length / 4) ** 0.25 for part in (query, key)]
    attention = depthwise_attention(*padded, value, mask, impl="reference").transpose(2, 3)  # [B, K, heads, L, L]
    reads = window_token_attention(query, key, mask, window_token=form.window_token)
    assert reads.shape == (2, 2, 4, 9)
    if form.window_token:
        assert (reads.sum(-1) < 1).all()
        expected = attention[..., 0, 1:]
    else:
        assert_close(reads.sum(-1), mask.any(-1).double().unsqueeze(1).expand(2, 2, 4), 1e-12)
        expected = (attention * mask[:, :, None, :, None]).sum(-2) / mask.sum(-1).clamp_min(1)[..., None, None]
        expected = expected * mask.unsqueeze(2)
    assert_close(reads, expected.transpose(1, 2), 1e-12)
    if mask is not None:
        assert (reads.transpose(1, 2)[~mask.unsqueeze(2).expand(2, 4, 2, 9)] == 0).all()


def test_messages_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    query, key, value = random_tensors(FORMS["depthwise"])
    for call in (partial(depthwise_attention, query, key, value), partial(window_token_attention, query, key)):
        with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, K, n\] = \(2, 4, 9\), got shape \(2, 4"):
            call(torch.ones(2, 4).bool())
        with pytest.raises(InvalidType, match=r"mask: expected a boolean tensor"):
            call(torch.ones(2, 4, 9))
    with pytest.raises(InvalidArgument, match=r"query: expected shape \[B, K, L, heads, d\], got shape \(4, 10, 2, 4"):
        depthwise_attention(query[0], key, value)
    with pytest.raises(InvalidType, match=r"query: expected a floating-point tensor .* got dtype torch\.int64"):
        depthwise_attention(query.long(), key, value)
    with pytest.raises(InvalidArgument, match=r"key: expected the shape of query \(2, 4, 10, 2, 4\), got \(2, 4, 9,"):
        depthwise_attention(query, key[:, :, 1:], value)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['fused', 'reference'\], got 'flash'"):
        depthwise_attention(query, key, value, impl="flash")
    maps, query, key = random_tensors(FORMS["pointwise"])
    with pytest.raises(InvalidArgument, match=r"maps: expected shape \[B, K, n, heads, d\], got shape"):
        pointwise_attention(maps[0], query, key)
    with pytest.raises(InvalidArgument, match=r"key: expected shape \[B, K, heads, d\] = \(2, 4, 2, 4\), got \(2, 3, "):
        pointwise_attention(maps, query, key[:, 1:])
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, K, n\] = \(2, 4, 9\), got shape \(2, 4\)"):
        pointwise_attention(maps, query, key, torch.ones(2, 4).bool())
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['fused', 'reference'\], got 'flash'"):
        pointwise_attention(maps, query, key, impl="flash")
