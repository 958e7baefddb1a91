import math

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
from tests.support import assert_close, assert_within_budget, gradients

NAMES = ["windows", "qkv", "window_token", "norm_weight", "norm_bias", "query_key", "query_key_bias", "out", "out_bias"]


def random_tensors(
    batch: int = 2, num_windows: int = 4, n: int = 9, dim: int = 6, heads: int = 2, head_dim: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Windows and all weights, in float64, of sizes at which no softmax is flat."""
    inner = heads * head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "windows": normal(batch, num_windows, n, dim),
        "qkv": normal(3 * inner, dim) / dim**0.5,
        "window_token": normal(dim),
        "norm_weight": 1 + 0.3 * normal(head_dim),
        "norm_bias": 0.3 * normal(head_dim),
        "query_key": 2 * normal(2 * inner, inner) / inner**0.5,
        "query_key_bias": normal(2 * inner),
        "out": normal(dim, inner) / inner**0.5,
        "out_bias": normal(dim),
    }


def as_weights(tensors: dict[str, Tensor], *, pointwise: bool = True) -> SeparableAttentionWeights:
    between = PointwiseWeights(
        tensors["norm_weight"], tensors["norm_bias"], tensors["query_key"], tensors["query_key_bias"]
    )
    return SeparableAttentionWeights(
        tensors["qkv"], tensors["window_token"], between if pointwise else None, tensors["out"], tensors["out_bias"]
    )


def run(implementation, tensors: dict[str, Tensor], *, heads: int = 2, pointwise: bool = True) -> list[Tensor]:
    """The output and the gradient of everything that has one."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = implementation(leaves["windows"], as_weights(leaves, pointwise=pointwise), heads=heads)
    return [output, *gradients(output, *leaves.values())]


def loops(windows: Tensor, weights: SeparableAttentionWeights, heads: int) -> Tensor:
    """The definition, a number at a time as far as is bearable."""
    batch, num_windows, n, _ = windows.shape
    d = len(weights.out.T) // heads
    qkv = weights.qkv.view(3, heads, d, -1)
    result = torch.empty_like(windows)
    for b in range(batch):
        maps, tokens = torch.empty(heads, num_windows, n, d).double(), torch.empty(heads, num_windows, d).double()
        for h in range(heads):
            for k in range(num_windows):
                rows = [weights.window_token, *windows[b, k]]
                for i, row in enumerate(rows):
                    shares = torch.stack([(qkv[0, h] @ row) @ (qkv[1, h] @ other) / math.sqrt(d) for other in rows])
                    shares = shares.exp() / shares.exp().sum()
                    value = sum(share * (qkv[2, h] @ other) for share, other in zip(shares, rows, strict=True))
                    (tokens[h, k] if i == 0 else maps[h, k, i - 1]).copy_(value)
        if weights.pointwise is not None:
            scale, shift, query_key, bias = weights.pointwise
            rows = []
            for k in range(num_windows):
                activated = []
                for h in range(heads):
                    x = tokens[h, k]
                    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * scale + shift
                    activated.append(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
                rows.append((query_key @ torch.cat(activated) + bias).view(2, heads, d))
            mixed = torch.zeros_like(maps)
            for h in range(heads):
                for k in range(num_windows):
                    shares = torch.stack(
                        [rows[k][0, h] @ rows[other][1, h] / math.sqrt(d) for other in range(num_windows)]
                    )
                    shares = shares.exp() / shares.exp().sum()
                    for other in range(num_windows):
                        mixed[h, k] += shares[other] * maps[h, other]
            maps = mixed
        for k in range(num_windows):
            for i in range(n):
                result[b, k, i] = weights.out @ maps[:, k, i].flatten() + weights.out_bias
    return result


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_is_the_definition_written_as_loops(impl: str, pointwise: bool) -> None:
    tensors = random_tensors(num_windows=3, n=4)
    weights = as_weights(tensors, pointwise=pointwise)
    output = separable_attention(tensors["windows"], weights, heads=2, impl=impl)
    assert_close(output, loops(tensors["windows"], weights, heads=2), 1e-12)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (1, 2, 4)], ids=str)
def test_gradcheck_of_the_reference(shape: tuple[int, int, int], pointwise: bool) -> None:
    batch, num_windows, n = shape
    tensors = random_tensors(batch, num_windows, n, dim=3, heads=2, head_dim=3)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*leaves: Tensor) -> Tensor:
        named = dict(zip(NAMES, leaves, strict=True))
        return reference(named["windows"], as_weights(named, pointwise=pointwise), heads=2)

    assert list(tensors) == NAMES
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "reference"])
@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.data())
def test_fast_forms_equal_the_reference_at_any_shape(impl: str, data: st.DataObject) -> None:
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
    heads = data.draw(st.integers(1, 3))
    tensors = random_tensors(
        data.draw(st.integers(1, 3)), data.draw(size), data.draw(size), data.draw(size), heads, data.draw(size)
    )
    pointwise, strided = data.draw(st.booleans()), data.draw(st.booleans())
    if strided:
        tensors = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    expected = run(reference, tensors, heads=heads, pointwise=pointwise)
    for fast, plain in zip(
        run(IMPLEMENTATIONS[impl].run, tensors, heads=heads, pointwise=pointwise), expected, strict=True
    ):
        assert_close(fast, plain, 1e-10)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_low_precision_loses_no_more_than_the_formula_does(impl: str, dtype: torch.dtype, pointwise: bool) -> None:
    exact = random_tensors(2, 4, 16, dim=32, heads=2, head_dim=16)
    low = {name: tensor.to(dtype) for name, tensor in exact.items()}
    oracle = run(textbook, {name: tensor.double() for name, tensor in low.items()}, pointwise=pointwise)
    plain = run(textbook, low, pointwise=pointwise)
    ours = run(IMPLEMENTATIONS[impl].run, low, pointwise=pointwise)
    for name, fast, slow, truth in zip(["output", *NAMES], ours, plain, oracle, strict=True):
        assert fast.dtype == dtype, name
        assert_within_budget(fast, slow, truth)


def test_a_single_window_passes_through_the_attention_between_windows_with_zero_gradients() -> None:
    tensors = random_tensors(num_windows=1)
    with_pointwise, without = (run(reference, tensors, pointwise=value) for value in (True, False))
    for impl in IMPLEMENTATIONS.values():
        output, *grads = run(impl.run, tensors)
        assert_close(output, without[0], 1e-12)
        for name, gradient in zip(NAMES, grads, strict=True):
            if name in ("norm_weight", "norm_bias", "query_key", "query_key_bias"):
                assert gradient.abs().max() < 1e-15, name
    assert_close(with_pointwise[0], without[0], 1e-12)


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
    output = separable_attention(spoiled, as_weights(tensors, pointwise=False), heads=2, impl=impl)
    assert output[:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_keeps_the_expectation(impl: str) -> None:
    torch.manual_seed(0)
    tensors = random_tensors(batch=1, num_windows=2, n=3)
    weights = as_weights(tensors, pointwise=False)  # the depthwise half is linear in what is dropped
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
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['fused', 'reference'\], got 'flash'"):
        separable_attention(windows, weights, heads=2, impl="flash")
