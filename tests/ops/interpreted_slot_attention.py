"""The kernels of slot attention against its formula, by Triton's interpreter: see `tests/kernels.py`."""

import os
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.costs import count_macs
from narrows.errors import ImplementationUnavailable
from narrows.ops.slot_attention import read as reading
from narrows.ops.slot_attention import slot_attention, triton
from tests.support import RoundedTo, assert_close, assert_within_budget_on_average, gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "run me as tests/kernels.py says"
Function = Callable[..., tuple[Tensor, Tensor]]


def draw(B: int, N: int, D: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tokens, readers and their bias."""
    readers = 2 * torch.randn(B, H, K, D) / D**0.5
    return [torch.randn(B, N, D).to(dtype), readers.to(dtype), torch.randn(B, H, K)]


def read(impl: str, mask: Tensor | None, slot_mask: Tensor | None, *, joint_heads: bool = False) -> Function:
    """As a function of tokens, readers and bias. What masked slots have read has no meaning, and is 0."""

    def function(tokens: Tensor, readers: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        keys = tokens[:, None]
        options = {"bias": bias, "scale": 1.0, "joint_heads": joint_heads, "impl": impl}
        updates, attention = slot_attention(readers, keys, keys, mask, slot_mask, **options)
        return updates if slot_mask is None else updates * slot_mask[:, None, :, None], attention

    return function


def results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """What it gives, and the gradients of all inputs for a projection of that."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    together = torch.cat([output.flatten() for output in outputs])
    return [*(output.detach() for output in outputs), *gradients(together, *leaves)]


def as_textbook(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same with every operation rounded to `dtype`."""
    with RoundedTo(dtype):
        return results(function, [value.double() for value in inputs])


@settings(max_examples=9, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    N=st.sampled_from([1, 5, 31, 33, 70]),
    D=st.sampled_from([1, 16, 20, 40]),
    heads=st.sampled_from([(1, 1), (1, 3), (1, 17), (2, 3), (3, 5), (4, 2)]),
    joint_heads=st.booleans(),
    masked=st.sampled_from(["no", "some", "all", "one"]),
    absent=st.booleans(),
    strided=st.booleans(),
)
def test_in_float32(
    B: int, N: int, D: int, heads: tuple[int, int], joint_heads: bool, masked: str, absent: bool, strided: bool
) -> None:
    torch.manual_seed(N * D)
    inputs = draw(B, N, D, *heads)
    if strided:
        inputs = [inputs[0].mT.contiguous().mT, inputs[1].transpose(1, 3).contiguous().transpose(1, 3), inputs[2]]
    mask = None if masked == "no" else torch.rand(B, N) > 0.5
    if mask is not None and masked != "some":
        mask[0] = False
        mask[0, N // 2] = masked == "one"
    slot_mask = torch.rand(B, heads[1]) > 0.4 if absent else None
    both = [
        results(read(impl, mask, slot_mask, joint_heads=joint_heads), [value.to(dtype) for value in inputs])
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    ]
    for value, expected in zip(*both, strict=True):
        assert_close(value, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 48, 1, 7), (1, 40, 20, 3, 5)], ids=str)
def test_no_less_exact_than_the_textbook(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draws = []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = draw(*shape, dtype)
        mask = torch.rand(shape[:2]) > 0.3 if seed % 2 else None
        function = partial(read, mask=mask, slot_mask=None, joint_heads=seed > 0)
        exact = results(function("reference"), [value.double() for value in inputs])
        draws.append((results(function("triton"), inputs), as_textbook(function("reference"), inputs, dtype), exact))
    assert_within_budget_on_average(draws)


@pytest.mark.parametrize(("num_tokens", "dim"), [(270, 36), (20, 272)])
def test_more_tokens_than_a_chunk_and_wider_than_a_tile(num_tokens: int, dim: int) -> None:
    inputs = draw(1, num_tokens, dim, 1, 3)
    mask = torch.rand(1, num_tokens) > 0.2
    assert triton.chunks_of(270)[1] == 2
    fast, exact = (
        results(read(impl, mask, None), [value.to(dtype) for value in inputs])
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for value, expected in zip(fast, exact, strict=True):
        assert_close(value, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_neither_masked_tokens_nor_memory_beyond_is_read(dtype: torch.dtype) -> None:
    tokens, readers, bias = draw(2, 37, 20, 1, 5, dtype)
    mask = torch.rand(2, 37) > 0.3
    around = torch.full((4, 40, 40), torch.nan, dtype=dtype)
    around[1:3, 1:38, 10:30] = tokens.masked_fill(~mask[..., None], torch.inf)
    around[1, 4:6] = torch.nan
    mask[0, 3:5] = False
    clean = tokens.masked_fill(~mask[..., None], 0)
    dirty = results(read("triton", mask, None), [around[1:3, 1:38, 10:30], readers, bias])
    for value, expected in zip(dirty, results(read("triton", mask, None), [clean, readers, bias]), strict=True):
        assert torch.equal(value, expected)
    assert not dirty[2][~mask].any()


def test_no_weight_vanishes_among_many_tokens_in_float16() -> None:
    """A slot that gets a millionth of every token has their plain mean, not 0."""
    tokens = torch.randn(1, 300, 16).half()
    readers, bias = torch.zeros(1, 1, 2, 16).half(), torch.tensor([[[0.0, -14.0]]])
    updates, attention = read("triton", None, None)(tokens, readers, bias)
    assert attention[0, 0, 1].max() < 2e-6
    assert_close(updates[0, 0, 1].double(), tokens[0].double().mean(0), 1e-4)


def test_attention_only_where_it_is_wanted_and_empty_batches() -> None:
    tokens, readers, bias = draw(2, 9, 16, 1, 3)
    means, attention = reading.read(tokens, readers, bias, with_attention=False)
    assert attention is None
    assert torch.equal(means, read("triton", None, None)(tokens, readers, bias)[0])
    empty = results(read("triton", None, None), [tokens[:0], readers[:0], bias[:0]])
    assert [value.shape[0] for value in empty] == [0] * 5
    none = results(read("triton", None, None), [tokens[:, :0], readers, bias])
    assert not none[0].any()


def test_what_the_kernels_cannot_take_is_said() -> None:
    tokens, readers, bias = draw(1, 9, 16, 1, 3)
    function = read("triton", None, None)
    for inputs, reason in (
        ([tokens.double(), readers.double(), bias.double()], "tokens are torch.float64"),
        (draw(1, 3, 1025, 1, 2), "tokens 1024 wide, at most"),
        (draw(1, 3, 16, 5, 16), "64 slots of all heads"),
    ):
        with pytest.raises(ImplementationUnavailable, match=f"impl='triton' cannot run here: .*{reason}"):
            function(*inputs)
    with pytest.raises(ImplementationUnavailable, match="values that are the keys"):
        slot_attention(readers, tokens[:, None], tokens[:, None].clone(), impl="triton")
    with pytest.raises(ImplementationUnavailable, match="it has no rule for"):
        torch.func.vmap(lambda x: function(x, readers, bias)[0])(tokens[None])


def test_twice_differentiable() -> None:
    inputs = draw(2, 9, 20, 2, 3)
    mask, second = torch.rand(2, 9) > 0.3, []
    for impl in ("triton", "reference"):
        leaves = [value.detach().requires_grad_() for value in inputs]
        together = torch.cat([output.flatten() for output in read(impl, mask, None)(*leaves)])
        first = torch.autograd.grad(together, leaves, torch.linspace(-1, 1, together.numel()), create_graph=True)
        second.append(torch.autograd.grad(sum((grad * grad).sum() for grad in first), leaves))
    for value, expected in zip(*second, strict=True):
        assert_close(value, expected, 1e-4)


def test_measure_counts_products_and_what_backward_makes_anew() -> None:
    leaves = [value.requires_grad_() for value in draw(2, 9, 16, 2, 3)]
    product = 2 * 2 * 3 * 9 * 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs: list[Tensor] = []
        assert count_macs(lambda: outputs.extend(read("triton", None, None)(*leaves))) == 2 * product
        assert count_macs(lambda: outputs[0].sum().backward()) == (4 + 3) * product


def test_operators_are_what_pytorch_expects_of_them() -> None:
    tokens, readers, bias = draw(2, 9, 20, 1, 3)
    arguments = (tokens.requires_grad_(), readers.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.narrows.slot_read, (*arguments, None, None, False, 1e-8, True))
