import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.ops.soft_moe import IMPLEMENTATIONS, api, chunked, combine_weights, dispatch_weights, reference, soft_moe
from tests.support import RoundedTo, assert_close, assert_within_budget, gradients

FAST = ("shared", "chunked")
DIM = 6


def experts(slots: Tensor) -> Tensor:
    return (2 * slots).sin() + 0.5


def random_inputs(
    batch: int, num_tokens: int, num_slots: int, *, own_slots: bool = True, dim: int = DIM, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, token keys, slot keys in float64."""
    generator = torch.Generator().manual_seed(seed)
    slots = (batch, num_slots, dim) if own_slots else (num_slots, dim)
    shapes = ((batch, num_tokens, dim), (batch, num_tokens, dim), slots)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def naive(values: Tensor, token_keys: Tensor, slot_keys: Tensor, mask: Tensor, slot_mask: Tensor) -> Tensor:
    """Each sample cut down to its real tokens and slots, each weight written out as a quotient of exponentials."""
    out = torch.zeros_like(values)
    for b in range(values.shape[0]):
        n, s = mask[b].nonzero()[:, 0], slot_mask[b].nonzero()[:, 0]
        if not len(n) or not len(s):
            continue
        own = slot_keys if slot_keys.ndim == 2 else slot_keys[b]
        exponentials = (token_keys[b, n] @ own[s].T).exp()
        slots = torch.stack(
            [(exponentials[:, i, None] * values[b, n]).sum(0) / exponentials[:, i].sum() for i in range(len(s))]
        )
        outputs = experts(slots)
        for i, token in enumerate(n):
            out[b, token] = (exponentials[i, :, None] * outputs).sum(0) / exponentials[i].sum()
    return out


def outputs_and_gradients(run: object, inputs: tuple[Tensor, ...], **masks: Tensor | None) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    output = run(*inputs, experts, **masks)  # type: ignore[operator]
    return (output.detach(), *gradients(output, *inputs))


@pytest.mark.parametrize("own_slots", [True, False], ids=["slots of each sample", "slots of all"])
def test_the_reference_is_the_algorithm_written_out(own_slots: bool) -> None:
    inputs = random_inputs(3, 5, 4, own_slots=own_slots)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    slot_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert_close(reference.soft_moe(*inputs, experts, mask, slot_mask), naive(*inputs, mask, slot_mask), 1e-12)
    everything = torch.ones_like(mask), torch.ones_like(slot_mask)
    assert_close(reference.soft_moe(*inputs, experts), naive(*inputs, *everything), 1e-12)


@pytest.mark.parametrize("own_slots", [True, False], ids=["slots of each sample", "slots of all"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradcheck_of_the_reference(own_slots: bool, masked: bool) -> None:
    inputs = tuple(t.requires_grad_() for t in random_inputs(2, 3, 2, own_slots=own_slots, dim=2))
    mask = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    slot_mask = torch.tensor([[True, True], [False, True]]) if masked else None
    assert torch.autograd.gradcheck(lambda *t: reference.soft_moe(*t, experts, mask, slot_mask), inputs)


@pytest.mark.parametrize("impl", FAST)
@settings(derandomize=True, max_examples=25, deadline=None)
@given(data=st.data())
def test_fast_forms_equal_the_reference_in_float64(impl: str, data: st.DataObject) -> None:
    sizes = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17])
    batch, num_tokens, num_slots = data.draw(st.integers(1, 3)), data.draw(sizes), data.draw(sizes)
    inputs = random_inputs(
        batch, num_tokens, num_slots, own_slots=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99))
    )
    if data.draw(st.booleans()):  # every other channel of something wider, tokens not contiguous either
        inputs = tuple(t.repeat_interleave(2, -1)[..., ::2].mT.contiguous().mT for t in inputs)
    draw_mask = lambda width: (  # noqa: E731
        torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch))
        )
        if data.draw(st.booleans())
        else None
    )
    masks = {"mask": draw_mask(num_tokens), "slot_mask": draw_mask(num_slots)}
    expected = outputs_and_gradients(reference.soft_moe, inputs, **masks)
    for actual, wanted in zip(outputs_and_gradients(IMPLEMENTATIONS[impl].run, inputs, **masks), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_fast_forms_are_as_exact_as_the_plain_formula_in_low_precision(
    impl: str, dtype: torch.dtype, masked: bool
) -> None:
    inputs = tuple(t.to(dtype) for t in random_inputs(2, 65, 33, dim=16))
    mask = torch.rand(2, 65) < 0.7 if masked else None
    slot_mask = torch.rand(2, 33) < 0.7 if masked else None

    def plain(
        values: Tensor, token_keys: Tensor, slot_keys: Tensor, f: object, mask: Tensor, slot_mask: Tensor
    ) -> Tensor:
        logits = torch.einsum("bnd,bsd->bns", token_keys, slot_keys)
        hide = lambda x, m: x if m is None else x.masked_fill(~m, torch.finfo(dtype).min)  # noqa: E731
        dispatch = hide(logits, None if mask is None else mask[:, :, None]).softmax(1)
        combine = hide(logits, None if slot_mask is None else slot_mask[:, None]).softmax(2)
        mixed = torch.einsum("bns,bsd->bnd", combine, experts(torch.einsum("bns,bnd->bsd", dispatch, values)))
        return mixed if mask is None else mixed.masked_fill(~mask[..., None], 0)

    masks = {"mask": mask, "slot_mask": slot_mask}
    oracle = outputs_and_gradients(reference.soft_moe, tuple(t.double() for t in inputs), **masks)
    low = outputs_and_gradients(plain, inputs, **masks)
    fast = outputs_and_gradients(IMPLEMENTATIONS[impl].run, inputs, **masks)
    for actual, coarse, exact in zip(fast, low, oracle, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, coarse, exact)


def many_tokens(num_tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and unit vectors as keys of tokens and, times `scale`, of slots: softmax weights of about 1 / N."""
    values, token_keys, slot_keys = random_inputs(1, num_tokens, 6, own_slots=False, dim=16)
    unit = torch.nn.functional.normalize
    return values + 0.5, unit(token_keys, dim=-1), scale * unit(slot_keys, dim=-1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        *((dtype, autocast) for dtype in (torch.bfloat16, torch.float16) for autocast in (False, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("num_tokens", "scale"), [(1024, 1.0), (20_000, 10.0), (65_536, 1.0)])
def test_many_tokens_are_summed_as_exactly_as_the_dtype_allows(
    impl: str, dtype: torch.dtype, autocast: bool, num_tokens: int, scale: float
) -> None:
    inputs = many_tokens(num_tokens, scale)
    inputs = tuple(t.float() if autocast else t.to(dtype) for t in inputs)
    exact = outputs_and_gradients(reference.soft_moe, tuple(t.double() for t in inputs))
    with RoundedTo(dtype):
        plain = outputs_and_gradients(reference.soft_moe, tuple(t.to(dtype).double() for t in inputs))
    with torch.autocast("cpu", dtype=dtype if autocast else None, enabled=autocast):
        results = outputs_and_gradients(IMPLEMENTATIONS[impl].run, inputs)
    assert results[0].dtype == dtype
    for result, rounded, oracle in zip(results, plain, exact, strict=True):
        # Sums of so many terms in float32 lose up to N eps, in whatever order they are taken.
        summation = num_tokens * torch.finfo(torch.float32).eps * oracle.abs().max()
        allowed = 2 * (rounded - oracle).abs().max() + 2 * torch.finfo(dtype).eps * oracle.abs().max() + summation
        assert (result.double() - oracle).abs().max() <= allowed


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1024, 20_000, 40_000, 65_536])
def test_equal_logits_give_the_mean(impl: str, dtype: torch.dtype, num_tokens: int) -> None:
    values, token_keys, slot_keys = (t.to(dtype) for t in many_tokens(num_tokens, 1.0))
    output = soft_moe(values + 2, 0 * token_keys, 0 * slot_keys, lambda slots: slots, impl=impl)
    mean = (values + 2).double().mean(1, keepdim=True)
    # Three roundings, of the slots, of the weights over slots and of the output; the sum in float32; and weights of
    # 1 / N, which lie below the normal numbers of float16 and are off by at most half of its smallest number.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    relative = 3 * torch.finfo(dtype).eps + num_tokens * (torch.finfo(torch.float32).eps + smallest / 2)
    assert ((output - mean).abs() <= relative * (values + 2).double().abs().mean(1, keepdim=True)).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_leaves_float64_alone(impl: str) -> None:
    inputs = random_inputs(2, 9, 4)
    expected = outputs_and_gradients(reference.soft_moe, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outputs_and_gradients(IMPLEMENTATIONS[impl].run, inputs)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted, 1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "num_tokens"), [(0, 4096), (0, 3), (2, 0)])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_nothing_gives_nothing(impl: str, batch: int, num_tokens: int, masked: bool) -> None:
    inputs = random_inputs(batch, num_tokens, 4, own_slots=False)
    mask = torch.ones(batch, num_tokens, dtype=torch.bool) if masked else None
    output, *grads = outputs_and_gradients(IMPLEMENTATIONS[impl].run, inputs, mask=mask)
    assert output.shape == (batch, num_tokens, DIM)
    assert all((gradient == 0).all() for gradient in grads)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivatives(impl: str) -> None:
    inputs = tuple(t.requires_grad_() for t in random_inputs(1, 4, 3, dim=2))
    mask, slot_mask = torch.tensor([[True, False, True, True]]), torch.tensor([[True, True, False]])
    run = IMPLEMENTATIONS[impl].run
    assert torch.autograd.gradgradcheck(lambda *t: run(*t, experts, mask, slot_mask), inputs)


@pytest.mark.parametrize("dim", [1, 4, 6, 40])
def test_the_size_of_a_chunk_does_not_matter(dim: int) -> None:
    """A chunk has as many queries as there are channels."""
    inputs = random_inputs(2, 17, 11, dim=dim)
    mask = torch.rand(2, 17) < 0.7
    expected = outputs_and_gradients(reference.soft_moe, inputs, mask=mask)
    for actual, wanted in zip(outputs_and_gradients(chunked.soft_moe, inputs, mask=mask), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


def test_the_chunked_form_keeps_nothing_of_tokens_times_slots() -> None:
    sizes: list[int] = []
    inputs = tuple(t.requires_grad_() for t in random_inputs(1, 200, 150))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked.soft_moe(*inputs, experts, torch.ones(1, 200, dtype=torch.bool))
    assert sizes
    assert max(sizes) <= 200 * DIM


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_mask_is_truncation(impl: str) -> None:
    values, token_keys, slot_keys = random_inputs(2, 9, 4)
    mask = (torch.arange(9) < 5).expand(2, 9)
    short = soft_moe(values[:, :5], token_keys[:, :5], slot_keys, experts, impl=impl)
    wide = soft_moe(values, token_keys, slot_keys, experts, mask, impl=impl)
    assert_close(wide[:, :5], short, 1e-12)
    assert (wide[:, 5:] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_may_come_in_any_order_and_slots_too(impl: str) -> None:
    values, token_keys, slot_keys = random_inputs(2, 9, 4)
    order, slot_order = torch.randperm(9), torch.randperm(4)
    expected = soft_moe(values, token_keys, slot_keys, experts, impl=impl)
    permuted = soft_moe(values[:, order], token_keys[:, order], slot_keys[:, slot_order], experts, impl=impl)
    assert_close(permuted, expected[:, order], 1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_huge_logits_stay_finite(impl: str) -> None:
    values, token_keys, slot_keys = (t.float() for t in random_inputs(2, 9, 4))
    results = outputs_and_gradients(IMPLEMENTATIONS[impl].run, (values, 1e3 * token_keys, 1e3 * slot_keys))
    assert all(torch.isfinite(result).all() for result in results)


def test_dispatch_weights_sum_to_one_over_real_tokens_of_real_slots() -> None:
    _, token_keys, slot_keys = random_inputs(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    slot_mask = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    weights = dispatch_weights(token_keys, slot_keys, mask, slot_mask)
    assert_close(weights.sum(1), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64), 1e-12)
    assert (weights.masked_select(~mask[..., None]) == 0).all()


def test_combine_weights_sum_to_one_over_the_slots_of_real_tokens() -> None:
    _, token_keys, slot_keys = random_inputs(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    slot_mask = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    weights = combine_weights(token_keys, slot_keys, mask, slot_mask)
    assert_close(weights.sum(2), mask.double(), 1e-12)
    assert (weights.masked_select(~slot_mask[:, None]) == 0).all()


def test_auto_keeps_logits_that_take_no_more_memory_than_the_inputs() -> None:
    assert api._auto(196, 196, 384) == "shared"
    assert api._auto(65_536, 128, 384) == "shared"  # fixed slots: linear in N as it is
    assert api._auto(4096, 4096, 384) == "chunked"
    assert api._auto(4096, 4096, 64) == "chunked"
    assert api._auto(0, 0, 64) == "shared"


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages to users come from narrows itself, not from the checks the tests run under."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("without_shape_checks")
def test_what_does_not_fit_is_named() -> None:
    values, token_keys, slot_keys = random_inputs(2, 5, 3)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of .*'chunked'.*, got 'fast'"):
        soft_moe(values, token_keys, slot_keys, experts, impl="fast")
    with pytest.raises(InvalidArgument, match=r"values: expected shape \[B, N, D\], got shape \(5, 6\)"):
        soft_moe(values[0], token_keys, slot_keys, experts)
    with pytest.raises(
        InvalidArgument, match=r"token_keys: expected the shape of values, \(2, 5, 6\), got \(2, 4, 6\)"
    ):
        soft_moe(values, token_keys[:, :4], slot_keys, experts)
    with pytest.raises(InvalidArgument, match=r"slot_keys: expected shape \[B, S, D\] with D = 6"):
        soft_moe(values, token_keys, slot_keys[..., :3], experts)
    with pytest.raises(
        InvalidType, match=r"mask: expected a boolean tensor.*got dtype torch.float32. Use mask.bool\(\)"
    ):
        soft_moe(values, token_keys, slot_keys, experts, torch.ones(2, 5))
    with pytest.raises(InvalidArgument, match=r"slot_mask: expected shape \[B, S\] = \(2, 3\), got shape \(2, 5\)"):
        soft_moe(values, token_keys, slot_keys, experts, slot_mask=torch.ones(2, 5, dtype=torch.bool))
