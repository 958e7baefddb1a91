import math
from collections.abc import Mapping
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
    PointwiseWeights,
    SeparableAttentionWeights,
    from_windows,
    separable_attention,
    to_windows,
    window_token_attention,
)
from narrows.ops.separable_attention.reference import reference, textbook
from tests.support import assert_close, assert_within_budget_on_average, gradients


class Form(NamedTuple):
    """How an operation is put together: upstream's form, the paper's, and parts of it left out."""

    shortcuts: bool = True
    pointwise: bool = True
    token: str | None = "shared"
    masked: bool = False


FORMS = {
    "upstream": Form(shortcuts=False),
    "upstream_inside": Form(shortcuts=False, pointwise=False),
    "upstream_masked": Form(shortcuts=False, masked=True),
    "paper": Form(),
    "paper_masked": Form(masked=True),
    "paper_per_window": Form(token="per_window"),
    "paper_inside_masked": Form(pointwise=False, token=None, masked=True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def random_tensors(
    form: Form = FORMS["upstream"],
    batch: int = 2,
    num_windows: int = 4,
    n: int = 9,
    dim: int = 6,
    heads: int = 2,
    head_dim: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Windows and all weights, in float64, of sizes at which no softmax is flat."""
    inner = heads * head_dim
    dim = inner if form.shortcuts else dim
    normed = inner if form.shortcuts else head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"windows": normal(batch, num_windows, n, dim), "qkv": normal(3 * inner, dim) / dim**0.5}
    if form.token is not None:
        tensors["window_token"] = normal(dim) if form.token == "shared" else normal(num_windows, dim)
    if form.pointwise:
        tensors["norm_weight"] = 1 + 0.3 * normal(normed)
        tensors["norm_bias"] = 0.3 * normal(normed)
        tensors["query_key"] = 2 * normal(2 * inner, inner) / inner**0.5
        tensors["query_key_bias"] = normal(2 * inner)
    tensors["out"] = normal(dim, inner) / inner**0.5
    tensors["out_bias"] = normal(dim)
    if form.shortcuts:
        tensors["qkv_bias"] = 0.3 * normal(3 * inner)
    return tensors


def as_weights(tensors: Mapping[str, Tensor]) -> SeparableAttentionWeights:
    between = None
    if "query_key" in tensors:
        between = PointwiseWeights(*(tensors[name] for name in PointwiseWeights._fields[:4]), norm_eps=1e-3)
    given = {name: tensors.get(name) for name in ("qkv", "window_token", "out", "out_bias", "qkv_bias")}
    return SeparableAttentionWeights(**given, pointwise=between)


def a_mask(windows: Tensor, form: Form) -> Tensor | None:
    """Some padding in most windows, a sample whose last window is padding alone, and one with a single real window."""
    if not form.masked:
        return None
    mask = torch.rand(windows.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    mask[0, 1:, :] = False
    mask[-1, -1] = False
    return mask


def run(implementation, tensors: dict[str, Tensor], form: Form, *, heads: int = 2) -> list[Tensor]:
    """The output and the gradient of everything that has one."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    mask = a_mask(leaves["windows"], form)
    output = implementation(leaves["windows"], as_weights(leaves), heads=heads, shortcuts=form.shortcuts, mask=mask)
    return [output, *gradients(output, *leaves.values())]


def softmax(scores: list[Tensor]) -> Tensor:
    shares = torch.stack(scores).exp()
    return shares / shares.sum()


def loops(windows: Tensor, weights: SeparableAttentionWeights, heads: int, form: Form, mask: Tensor | None) -> Tensor:
    """The definition, a number at a time as far as is bearable."""
    batch, num_windows, n, _ = windows.shape
    d = len(weights.out.T) // heads
    qkv = weights.qkv.view(3, heads, d, -1)
    bias = (torch.zeros(len(weights.qkv)) if weights.qkv_bias is None else weights.qkv_bias).view(3, heads, d)
    real = torch.ones(windows.shape[:3], dtype=torch.bool) if mask is None else mask
    result = torch.zeros_like(windows)
    for b in range(batch):
        maps = torch.zeros(heads, num_windows, n, d).double()
        tokens = torch.zeros(heads, num_windows, d).double()
        for h in range(heads):
            for k in range(num_windows):
                rows = list(windows[b, k])
                keys = [i for i in range(n) if real[b, k, i]]
                if weights.window_token is not None:
                    token = weights.window_token if weights.window_token.ndim == 1 else weights.window_token[k]
                    rows, keys = [*rows, token], [*keys, n]
                for i in [*keys]:
                    query = qkv[0, h] @ rows[i] + bias[0, h]
                    shares = softmax([query @ (qkv[1, h] @ rows[j] + bias[1, h]) / math.sqrt(d) for j in keys])
                    values = [qkv[2, h] @ rows[j] + bias[2, h] for j in keys]
                    value = sum(share * value for share, value in zip(shares, values, strict=True))
                    value = value + (rows[i].view(heads, d)[h] if form.shortcuts else 0)
                    (tokens[h, k] if i == n else maps[h, k, i]).copy_(value)
        if weights.pointwise is not None and (not form.shortcuts or real[b].any(-1).sum() > 1):
            maps = loops_between(maps, tokens, weights.pointwise, form, real[b])
        for k in range(num_windows):
            for i in range(n):
                if real[b, k, i]:
                    result[b, k, i] = weights.out @ maps[:, k, i].flatten() + weights.out_bias
    return result


def loops_between(maps: Tensor, tokens: Tensor, weights: PointwiseWeights, form: Form, real: Tensor) -> Tensor:
    heads, num_windows, n, d = maps.shape
    scale, shift, query_key, bias, eps = weights
    rows = []
    for k in range(num_windows):
        activated = []
        for x in tokens[:, k].reshape(-1, len(scale)):
            x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + eps) * scale + shift
            activated.append(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
        rows.append((query_key @ torch.cat(activated) + bias).view(2, heads, d))
    mixed = torch.zeros_like(maps)
    for h in range(heads):
        for k in range(num_windows):
            for i in range(n):
                others = [other for other in range(num_windows) if real[other, i]]
                if others:
                    shares = softmax([rows[k][0, h] @ rows[other][1, h] / math.sqrt(d) for other in others])
                    for share, other in zip(shares, others, strict=True):
                        mixed[h, k, i] += share * maps[h, other, i]
    return mixed + maps if form.shortcuts else mixed


@every_form
@every_impl
def test_every_implementation_is_the_definition_written_as_loops(impl: str, form: Form) -> None:
    tensors = random_tensors(form, num_windows=3, n=4)
    windows, weights, mask = tensors["windows"], as_weights(tensors), a_mask(tensors["windows"], form)
    output = separable_attention(windows, weights, heads=2, shortcuts=form.shortcuts, mask=mask, impl=impl)
    assert_close(output, loops(windows, weights, 2, form, mask), 1e-12)


@every_form
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 1, 1)], ids=str)
def test_gradcheck_of_the_reference(shape: tuple[int, int, int], form: Form) -> None:
    tensors = random_tensors(form, *shape, dim=3, heads=2, head_dim=2)

    def function(*leaves: Tensor) -> Tensor:
        named = dict(zip(tensors, leaves, strict=True))
        mask = a_mask(named["windows"], form)
        return reference(named["windows"], as_weights(named), heads=2, shortcuts=form.shortcuts, mask=mask)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors.values()])


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "reference"])
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_fast_forms_equal_the_reference_at_any_shape(impl: str, data: st.DataObject) -> None:
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
    heads, form = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(list(FORMS.values())))
    tensors = random_tensors(
        form, data.draw(st.integers(1, 3)), data.draw(size), data.draw(size), data.draw(size), heads, data.draw(size)
    )
    if data.draw(st.booleans()):
        tensors = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    expected = run(reference, tensors, form, heads=heads)
    for fast, plain in zip(run(IMPLEMENTATIONS[impl].run, tensors, form, heads=heads), expected, strict=True):
        assert_close(fast, plain, 1e-10)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_impl
def test_low_precision_loses_no_more_than_the_formula_does(impl: str, dtype: torch.dtype, form: Form) -> None:
    draws = []
    for seed in range(8):
        exact = random_tensors(form, 2, 4, 16, dim=32, heads=2, head_dim=16, seed=seed)
        low = {name: tensor.to(dtype) for name, tensor in exact.items()}
        oracle = run(textbook, {name: tensor.double() for name, tensor in low.items()}, form)
        ours = run(IMPLEMENTATIONS[impl].run, low, form)
        assert {result.dtype for result in ours} == {dtype}
        draws.append((ours, run(textbook, low, form), oracle))
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_a_single_window_has_nothing_to_exchange_and_gives_zero_gradients(shortcuts: bool) -> None:
    form = Form(shortcuts=shortcuts)
    tensors = random_tensors(form, num_windows=1)
    for impl in IMPLEMENTATIONS.values():
        output, *grads = run(impl.run, tensors, form)
        alone = as_weights(tensors)._replace(pointwise=None)
        assert_close(output, impl.run(tensors["windows"], alone, heads=2, shortcuts=shortcuts), 1e-12)
        for name, gradient in zip(tensors, grads, strict=True):
            if name in ("norm_weight", "norm_bias", "query_key", "query_key_bias"):
                assert gradient.abs().max() < 1e-15, name


@every_impl
@pytest.mark.parametrize("form", [form for form in FORMS.values() if form.masked], ids=str)
def test_what_padding_holds_does_not_matter_and_it_gets_zeros(impl: str, form: Form) -> None:
    tensors = random_tensors(form)
    mask = a_mask(tensors["windows"], form)
    spoiled = {**tensors, "windows": tensors["windows"].masked_fill(~mask.unsqueeze(-1), 1e3)}
    weights = as_weights(tensors)
    expected, output = (
        separable_attention(each["windows"], weights, heads=2, shortcuts=form.shortcuts, mask=mask, impl=impl)
        for each in (tensors, spoiled)
    )
    assert_close(output, expected, 1e-12)
    assert (output[~mask] == 0).all()


@every_impl
@pytest.mark.parametrize("form", [form for form in FORMS.values() if form.masked], ids=str)
def test_windows_of_padding_alone_change_nothing(impl: str, form: Form) -> None:
    """However far a map is padded, the result is the same: also where that leaves a single real window."""
    tensors = random_tensors(form)
    windows, weights = tensors["windows"], as_weights(tensors)
    for real in (1, 2):
        mask = torch.zeros(windows.shape[:3], dtype=torch.bool)
        mask[:, :real] = True
        call = partial(separable_attention, weights=weights, heads=2, shortcuts=form.shortcuts, impl=impl)
        assert_close(call(windows, mask=mask)[:, :real], call(windows[:, :real]), 1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_of_a_window_and_windows_of_a_map_have_no_order(impl: str) -> None:
    tensors = random_tensors(num_windows=5, n=7)
    windows, weights = tensors["windows"], as_weights(tensors)
    output = separable_attention(windows, weights, heads=2, impl=impl)
    inside, between = torch.randperm(7), torch.randperm(5)
    permuted = separable_attention(windows[:, between][:, :, inside], weights, heads=2, impl=impl)
    assert_close(permuted, output[:, between][:, :, inside], 1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_pointwise_attention_nothing_leaves_its_window(impl: str) -> None:
    tensors = random_tensors()
    spoiled = tensors["windows"].clone()
    spoiled[:, 0] = torch.nan
    output = separable_attention(spoiled, as_weights(tensors)._replace(pointwise=None), heads=2, impl=impl)
    assert output[:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_keeps_the_expectation(impl: str) -> None:
    torch.manual_seed(0)
    tensors = random_tensors(batch=1, num_windows=2, n=3)
    weights = as_weights(tensors)._replace(pointwise=None)  # the depthwise half is linear in what is dropped
    exact = separable_attention(tensors["windows"], weights, heads=2, impl=impl)
    many = separable_attention(tensors["windows"].expand(20000, -1, -1, -1), weights, heads=2, dropout=0.3, impl=impl)
    standard_error = many.std(0) / len(many) ** 0.5
    assert (standard_error > 1e-4).all(), "nothing was dropped"
    assert ((many.mean(0) - exact[0]).abs() < 5 * standard_error).all()


def test_window_tokens_read_what_the_depthwise_attention_gives_them() -> None:
    tensors = random_tensors()
    reads = window_token_attention(tensors["windows"], as_weights(tensors), heads=2)
    rows = torch.cat((tensors["window_token"].expand(2, 4, 1, -1), tensors["windows"]), 2)
    query, key, _ = (rows @ tensors["qkv"].T).unflatten(-1, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5)
    attention = (query @ key.mT / 2).softmax(-1)
    assert_close(reads, attention[..., 0, 1:], 1e-12)


@pytest.mark.parametrize("window_size", [1, 2, 3, 6])
def test_windows_are_the_squares_of_the_map_and_come_together_again(window_size: int) -> None:
    feature_map = torch.randn(2, 6, 12, 3)
    windows = to_windows(feature_map, window_size)
    for y in range(6):
        for x in range(12):
            inside = y % window_size * window_size + x % window_size
            assert torch.equal(windows[:, y // window_size, x // window_size, inside], feature_map[:, y, x])
    assert torch.equal(from_windows(windows, window_size), feature_map)


@pytest.mark.parametrize(
    ("size", "nearest"), [((56, 50), "56 x 49"), ((3, 56), "7 x 56"), ((60, 61), "63 x 63"), ((10, 11), "7 x 14")]
)
def test_a_map_that_windows_do_not_divide_is_told_the_nearest_size(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        to_windows(torch.zeros(1, *size, 2), 7)
    message = str(error.value)
    assert message.startswith("feature_map: expected height and width that are multiples of window_size = 7, got ")
    assert f"got {size[0]} x {size[1]}" in message
    assert f"nearest usable size is {nearest}" in message


@pytest.mark.parametrize("name", ["upstream", "paper_masked", "paper_inside_masked"])
def test_windows_read_what_the_attention_inside_them_gives(name: str) -> None:
    """Against the gradient of the fused form: what a window token reads is how much of a value it takes."""
    form = FORMS[name]
    tensors = random_tensors(form, heads=1, head_dim=4, dim=4)
    mask = a_mask(tensors["windows"], form)
    reads = window_token_attention(tensors["windows"], as_weights(tensors), heads=1, mask=mask)
    assert reads.shape == (2, 1, 4, 9)
    total = reads.sum(-1)
    if form.token is None:
        assert_close(total, mask.any(-1).double().unsqueeze(1), 1e-12)
    else:
        assert (total < 1).all()
    if mask is not None:
        assert (reads[~mask.unsqueeze(1)] == 0).all()


def test_messages_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tensors = random_tensors()
    windows, weights = tensors["windows"], as_weights(tensors)
    with pytest.raises(InvalidArgument, match=r"windows: expected shape \[B, K, n, D\] with D = 6, got shape \(2, 4"):
        separable_attention(windows[..., :5], weights, heads=2)
    with pytest.raises(InvalidArgument, match=r"windows: expected shape \[B, K, n, D\] .*, got shape \(4, 9, 6\)"):
        window_token_attention(windows[0], weights, heads=2)
    with pytest.raises(InvalidType, match=r"windows: expected a floating-point tensor .* got dtype torch\.int64"):
        separable_attention(windows.long(), weights, heads=2)
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, K, n\] = \(2, 4, 9\), got shape \(2, 4\)"):
        separable_attention(windows, weights, heads=2, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InvalidType, match=r"mask: expected a boolean tensor"):
        separable_attention(windows, weights, heads=2, mask=torch.ones(2, 4, 9))
    with pytest.raises(
        InvalidArgument, match=r"weights.out: expected as many columns as rows with shortcuts: 6, got 8"
    ):
        separable_attention(windows, weights, heads=2, shortcuts=True)
    with pytest.raises(InvalidArgument, match=r"weights.window_token: expected a token, which weights.pointwise reads"):
        separable_attention(windows, weights._replace(window_token=None), heads=2)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['fused', 'reference'\], got 'flash'"):
        separable_attention(windows, weights, heads=2, impl="flash")
