"""Media attention against a loop over text tokens that looks at one token's media at a time."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.costs import saved_for_backward
from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType
from narrows.ops.media_attention import (
    AllPrevious,
    LastMedia,
    LastMedium,
    VisibleMedia,
    media_attention,
    media_attention_weights,
)
from narrows.ops.media_attention import varlen as varlen_form
from tests.support import assert_close, assert_within_budget, gradients

POLICIES = ("last", "previous", "last two", "odd")
RUNS = [
    (impl, policy)
    for impl in ("reference", "fused", "segmented")
    for policy in POLICIES
    if impl != "segmented" or policy != "previous"
]
every_run = pytest.mark.parametrize(("impl", "policy"), RUNS)
every_policy = pytest.mark.parametrize("policy", POLICIES)
FAST = [run for run in RUNS if run[0] != "reference"]


def seen(time: Tensor | None, policy: str) -> VisibleMedia | None:
    """What a policy shows at these times; "odd" is none of ours: tokens of one time begin at different media."""
    if time is None:
        return None
    begin = torch.arange(time.shape[1]) % 3
    first = {"last": time, "previous": torch.ones_like(time), "last two": time - 1, "odd": time - begin}
    return VisibleMedia(first[policy], time, {"last": 1, "previous": None, "last two": 2, "odd": 3}[policy])


def one_token_at_a_time(
    query: Tensor, key: Tensor, value: Tensor, visible: VisibleMedia | None, mask: Tensor | None
) -> Tensor:
    """What each token reads, from the definition, in the precision of the inputs."""
    batch, num_media = key.shape[:2]
    rows = []
    for b in range(batch):
        for t in range(query.shape[1]):
            first = 1 if visible is None else max(1, int(visible.first[b, t]))
            last = num_media if visible is None else min(num_media, int(visible.last[b, t]))
            sees = slice(first - 1, max(first - 1, last))
            keep = torch.ones(key.shape[1:3], dtype=torch.bool)[sees] if mask is None else mask[b, sees]
            if not keep.any():
                rows.append(torch.zeros_like(query[b, t]))
                continue
            keys, values = key[b, sees][keep], value[b, sees][keep]
            scores = (keys * query[b, t]).sum(-1) / math.sqrt(query.shape[-1])
            rows.append((scores.softmax(0)[..., None] * values).sum(0))
    return torch.stack(rows).view_as(query) if rows else torch.zeros_like(query)


def draw(
    batch: int = 2,
    text: int = 9,
    media: int = 3,
    latents: int = 4,
    heads: int = 2,
    width: int = 5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, text, heads, width), *2 * [(batch, media, latents, heads, width)]]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


TIME = torch.tensor([[0, 0, 1, 1, 2, 3, 3, 3, 4], [1, 1, 1, 1, 1, 1, 3, 3, 3]])
MASK = torch.tensor(
    [
        [[True, True, False, True], [False, False, False, False], [True, False, True, False]],
        [[True, True, True, True], [True, True, True, True], [False, True, True, True]],
    ]
)
PLACES = {"times": (TIME, None), "mask": (TIME, MASK), "no times": (None, None), "mask, no times": (None, MASK)}


@pytest.mark.parametrize(
    ("impl", "policy", "place"),
    [(*run, place) for run in RUNS for place in PLACES if run[0] != "segmented" or PLACES[place][0] is not None],
)
def test_each_token_reads_its_media_and_no_others(impl: str, policy: str, place: str) -> None:
    time, mask = PLACES[place]
    inputs, visible = draw(), seen(time, policy)
    expected = one_token_at_a_time(*inputs, visible, mask)
    output = media_attention(*inputs, visible, mask=mask, impl=impl)
    assert_close(output, expected, 1e-12)
    for ours, theirs in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(ours, theirs, 1e-12)


@every_policy
@pytest.mark.parametrize("mask", [None, MASK[:, :, :3]], ids=["whole", "masked"])
def test_reference_passes_gradcheck(policy: str, mask: Tensor | None) -> None:
    inputs = draw(text=9, latents=3, heads=1, width=2)

    def run(*inputs: Tensor) -> Tensor:
        return media_attention(*inputs, seen(TIME, policy), mask=mask, impl="reference")

    assert torch.autograd.gradcheck(run, inputs)


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """Inputs, times in any order and beyond the media, and a mask or none; sometimes in odd strides."""
    sizes = {
        "batch": draw_from(st.integers(1, 3)),
        "text": draw_from(st.sampled_from([1, 2, 7, 8, 9, 17])),
        "media": draw_from(st.sampled_from([1, 2, 3, 4, 5, 11])),
        "latents": draw_from(st.sampled_from([1, 3, 4, 5])),
        "heads": draw_from(st.sampled_from([1, 2, 3])),
        "width": draw_from(st.sampled_from([1, 4, 7])),
    }
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10_000)))
    inputs = draw(**sizes)
    if draw_from(st.booleans()):
        query, key, value = (x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in inputs)
        inputs = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    time = torch.randint(0, sizes["media"] + 3, (sizes["batch"], sizes["text"]), generator=generator)
    if draw_from(st.booleans()):
        time = time.sort(dim=1).values
    mask = torch.rand(inputs[1].shape[:3], generator=generator) > 0.4 if draw_from(st.booleans()) else None
    return inputs, time, mask


@settings(derandomize=True, max_examples=25, deadline=None)
@given(problems())
def test_fast_forms_have_the_numbers_of_the_loop(problem: tuple) -> None:
    inputs, time, mask = problem
    for impl, policy in FAST:
        expected = one_token_at_a_time(*inputs, seen(time, policy), mask)
        output = media_attention(*inputs, seen(time, policy), mask=mask, impl=impl)
        assert_close(output, expected, 1e-10)
        if not expected.requires_grad:  # no token sees any medium
            assert all((gradient == 0).all() for gradient in gradients(output, *inputs))
            continue
        for ours, theirs in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
            assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("impl", "policy"), FAST)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_low_precision_is_as_good_as_the_plain_formula(
    impl: str, policy: str, dtype: torch.dtype, masked: bool
) -> None:
    sizes = {"text": 33, "media": 5, "latents": 7, "width": 16}
    generator = torch.Generator().manual_seed(1)
    visible = seen(torch.randint(0, 7, (2, 33), generator=generator), policy)
    mask = torch.rand(2, 5, 7, generator=generator) > 0.3 if masked else None
    low = draw(**sizes, dtype=dtype)
    exact = draw(**sizes)
    oracle = one_token_at_a_time(*exact, visible, mask)
    plain = one_token_at_a_time(*low, visible, mask)
    fast = media_attention(*low, visible, mask=mask, impl=impl)
    assert fast.dtype == dtype
    assert_within_budget(fast, plain, oracle)
    results = zip(gradients(fast, *low), gradients(plain, *low), gradients(oracle, *exact), strict=True)
    for ours, theirs, true in results:
        assert_within_budget(ours, theirs, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("latents", [1024, 65536])
@pytest.mark.parametrize("impl", ["reference", "fused", "segmented"])
def test_many_latents_count_in_every_precision(impl: str, latents: int, dtype: torch.dtype) -> None:
    """Weights of 1 / 65536 each, below what float16 can hold precisely, still add up to the mean."""
    query, key, value = (x.detach() for x in draw(batch=1, text=2, media=2, latents=latents, dtype=dtype))
    value = value + 100
    read = media_attention(0 * query, key, value, seen(torch.tensor([[1, 2]]), "last"), impl=impl).double()
    mean = value.double().mean(2)
    # One rounding of the result, and those of a sum in float32, which drift apart as a random walk does.
    allowed = torch.finfo(dtype).eps + math.sqrt(latents) * torch.finfo(torch.float32).eps
    assert ((read - mean).abs() <= allowed * mean.abs()).all()


@settings(derandomize=True, max_examples=25, deadline=None)
@given(problems(), st.integers(0, 10))
def test_nothing_leaks(problem: tuple, medium: int) -> None:
    """Changing a medium moves no token that may not see it: not by a bit."""
    (query, key, value), time, mask = problem
    medium %= key.shape[1]
    changed = [x.detach().clone() for x in (key, value)]
    for x in changed:
        x[:, medium] = 100 * torch.randn_like(x[:, medium])
    for impl, policy in RUNS:
        visible = seen(time, policy)
        before = media_attention(query, key, value, visible, mask=mask, impl=impl)
        after = media_attention(query, *changed, visible, mask=mask, impl=impl)
        allowed = (visible.first <= medium + 1) & (medium + 1 <= visible.last)
        if mask is not None:
            allowed = allowed & mask[:, medium].any(-1)[:, None]
        moved = (before != after).flatten(2).any(-1)
        assert not (moved & ~allowed).any(), impl
        assert moved[allowed].all(), impl


@every_run
def test_text_that_sees_nothing_reads_exactly_zero(impl: str, policy: str) -> None:
    inputs = draw()
    visible = seen(TIME, policy)
    output = media_attention(*inputs, visible, mask=MASK, impl=impl)
    blind = ~(visible.media(3) & MASK.any(-1)[:, None]).any(-1)
    assert blind.sum() >= 2
    assert torch.equal(visible.any(3, MASK), ~blind)
    assert (output[blind] == 0).all()
    assert (output[~blind] != 0).all()
    query_gradient, *_ = gradients(output, *inputs)
    assert (query_gradient[blind] == 0).all()


@every_run
def test_masked_latents_reach_nothing_even_as_nan(impl: str, policy: str) -> None:
    inputs = draw()
    poisoned = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        poisoned[1][~MASK] = torch.nan
        poisoned[2][~MASK] = torch.inf
    clean = media_attention(*inputs, seen(TIME, policy), mask=MASK, impl=impl)
    output = media_attention(*poisoned, seen(TIME, policy), mask=MASK, impl=impl)
    assert torch.equal(clean, output)
    for ours, theirs in zip(gradients(output, *poisoned), gradients(clean, *inputs), strict=True):
        assert torch.equal(ours, theirs)


@every_run
def test_a_mask_is_a_truncation(impl: str, policy: str) -> None:
    query, key, value = draw(media=5, latents=6)
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    masked = media_attention(query, key, value, seen(TIME, policy), mask=mask, impl=impl)
    cut = media_attention(query, key[:, :3, :4], value[:, :3, :4], seen(TIME, policy), impl=impl)
    assert_close(masked, cut, 1e-12)


@every_run
def test_the_order_of_latents_and_of_text_does_not_matter(impl: str, policy: str) -> None:
    query, key, value = draw()
    latents, text = torch.randperm(4), torch.randperm(9)
    expected = media_attention(query, key, value, seen(TIME, policy), impl=impl)
    visible = seen(TIME, policy)
    moved = VisibleMedia(visible.first[:, text], visible.last[:, text], visible.most)
    shuffled = media_attention(query[:, text], key[:, :, latents], value[:, :, latents], moved, impl=impl)
    assert_close(shuffled, expected[:, text], 1e-12)


@every_policy
def test_weights_are_what_the_output_is_made_of(policy: str) -> None:
    query, key, value = draw()
    weights = media_attention_weights(query, key, seen(TIME, policy), mask=MASK)
    output = media_attention(query, key, value, seen(TIME, policy), mask=MASK, impl="fused")
    assert_close(torch.einsum("bhtmn,bmnhe->bthe", weights, value), output, 1e-12)
    sums = weights.sum((3, 4))
    assert_close(sums, (output != 0).all(-1).transpose(1, 2).double(), 1e-12)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_long_text_is_read_a_part_at_a_time(impl: str) -> None:
    inputs = draw(batch=1, text=1100, media=3, width=2)
    visible = seen(torch.arange(1100)[None] // 300, "previous")
    whole = media_attention(*inputs, visible, impl=impl)
    for rows in (slice(0, 100), slice(500, 530), slice(1000, 1100)):
        part = VisibleMedia(visible.first[:, rows], visible.last[:, rows], visible.most)
        assert_close(whole[:, rows], media_attention(inputs[0][:, rows], *inputs[1:], part), 1e-12)


@pytest.mark.parametrize(("impl", "policy"), [("segmented", "last"), ("segmented", "last two"), ("fused", "previous")])
def test_nothing_is_kept_for_backward_that_grows_with_text_times_media(impl: str, policy: str) -> None:
    def kept(media: int, impl: str) -> int:
        inputs = draw(batch=1, text=1024, media=media, latents=128 // media, width=8)
        visible = seen(torch.arange(1024)[None] * media // 1024 + 1, policy)
        return saved_for_backward(lambda: media_attention(*inputs, visible, impl=impl), exclude=inputs)

    for media in (2, 32):
        # A place and a first medium per token, a medium per block, a mask; fused: parts of the text, and their results.
        per_token = 8 * 3 if impl == "segmented" else 8 * (2 * 2 * 8 + 2)
        assert kept(media, impl) <= per_token * (1024 + 2 * media) + 1024
    assert kept(32, "reference") > 6 * kept(32, impl)


def test_auto_takes_segments_where_a_token_sees_less_than_half_of_the_media() -> None:
    inputs = draw(dtype=torch.float32)
    for policy, time, impl in [
        ("last", TIME, "segmented"),
        ("last two", TIME, "fused"),
        ("previous", TIME, "fused"),
        ("last", None, "fused"),
    ]:
        chosen = media_attention(*inputs, seen(time, policy))
        assert torch.equal(chosen, media_attention(*inputs, seen(time, policy), impl=impl))


@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous", "ignore:`torch.jit.script` is deprecated")
@every_run
def test_all_inputs_can_be_vectorised_and_differentiated_twice(impl: str, policy: str) -> None:
    """As `torch.func` does it, where text is so long that it is read a part at a time."""
    drawn = [draw(batch=1, text=600, media=5) for _ in range(2)]
    inputs = [torch.stack([x.detach(), 2 * x.detach()]) for x in drawn[0]]
    time = (torch.arange(600) // torch.tensor([100, 150])[:, None]).unsqueeze(1)
    mask = torch.rand(2, 1, 5, 4) > 0.3

    def run(query: Tensor, key: Tensor, value: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        return media_attention(query, key, value, seen(time, policy), mask=mask, impl=impl)

    samples = list(zip(*inputs, time, mask, strict=True))
    expected = torch.stack([run(*sample) for sample in samples])
    assert_close(torch.func.vmap(run)(*inputs, time, mask), expected, 1e-12)

    query, key, value, *rest = samples[0]
    gradient = torch.func.grad(lambda key: run(query, key, value, *rest).square().sum())
    tangent, step = torch.randn_like(key), 1e-5
    _, product = torch.func.jvp(gradient, (key,), (tangent,))
    difference = (gradient(key + step * tangent) - gradient(key - step * tangent)) / (2 * step)
    assert_close(product, difference, 1e-5)


@every_run
def test_an_empty_batch(impl: str, policy: str) -> None:
    inputs, visible = draw(batch=0), seen(TIME[:0], policy)
    output = media_attention(*inputs, visible, mask=MASK[:0], impl=impl)
    assert output.shape == (0, 9, 2, 5)
    assert [gradient.shape for gradient in gradients(output, *inputs)] == [x.shape for x in inputs]


@every_run
def test_no_media_and_no_text(impl: str, policy: str) -> None:
    query, key, value = draw()
    assert (media_attention(query, key[:, :0], value[:, :0], seen(TIME, policy), impl=impl) == 0).all()
    assert media_attention(query[:, :0], key, value, seen(TIME[:, :0], policy), impl=impl).shape == (2, 0, 2, 5)


@every_run
def test_times_of_any_integer_type(impl: str, policy: str) -> None:
    inputs = draw()
    expected = media_attention(*inputs, seen(TIME, policy), mask=MASK, impl=impl)
    assert torch.equal(media_attention(*inputs, seen(TIME.int(), policy), mask=MASK, impl=impl), expected)


@pytest.mark.compiled
@pytest.mark.parametrize("policy", ["last", "last two"])
def test_segmented_is_one_graph_for_any_number_of_media_and_any_length(policy: str) -> None:
    class Segmented(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, time: Tensor) -> Tensor:
            return media_attention(query, key, value, seen(time, policy), impl="segmented")

    batch, text, media = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "text", "media"))
    of_media = {0: batch, 1: media}
    shapes = ({0: batch, 1: text}, of_media, of_media, {0: batch, 1: text})
    with torch.no_grad():
        program = torch.export.export(Segmented(), (*draw(), TIME), dynamic_shapes=shapes, strict=False).module()
        for sizes in [(2, 9, 3), (3, 100, 2), (5, 3, 11), (2, 130, 2)]:
            inputs = draw(*sizes)
            time = torch.randint(0, sizes[2] + 2, sizes[:2])
            assert_close(program(*inputs, time), media_attention(*inputs, seen(time, policy), impl="reference"), 1e-12)


def one_sequence_at_a_time(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` promises. Rows without a sequence, or without keys, are not set, nor
    are gradients of keys without a sequence.
    """
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert query_starts.shape == key_starts.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    read = torch.full_like(query, torch.nan)
    without = (torch.arange(len(key)) >= key_starts[-1])[:, None, None]
    for rows in (key, value):
        if rows.requires_grad:
            rows.register_hook(lambda gradient: gradient.masked_fill(without, torch.nan))
    spans = zip(*(starts.unfold(0, 2, 1).tolist() for starts in (query_starts, key_starts)), strict=True)
    for (begin, end), (first, last) in spans:
        assert 0 <= begin <= end <= min(len(query), begin + max_queries)
        assert 0 <= first <= last <= min(len(key), first + max_keys)
        if begin < end and first < last:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            scores = torch.einsum("qhe,khe->hqk", query[begin:end], key[first:last]) * scale
            read = torch.cat(
                (read[:begin], torch.einsum("hqk,khe->qhe", scores.softmax(-1), value[first:last]), read[end:])
            )
    return read


@pytest.fixture
def varlen_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for sequences of variable lengths, which needs a GPU, as a loop that runs here."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_sequence_at_a_time)
    monkeypatch.setattr(varlen_form, "why_not_varlen", lambda *rows: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@st.composite
def ordered_problems(draw_from: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], VisibleMedia, Tensor | None]:
    """Texts that go from medium to medium, past some and beyond the last, and a mask of media, of latents, or none."""
    inputs, time, _ = draw_from(problems())
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10_000)))
    axes = draw_from(st.sampled_from([0, 2, 3]))
    mask = torch.rand(inputs[1].shape[:axes], generator=generator) > 0.4 if axes else None
    time = time.sort(dim=1).values
    first = time if draw_from(st.booleans()) else time + (torch.rand(time.shape, generator=generator) > 0.8).long()
    return inputs, VisibleMedia(first, time, 1, ordered=True), mask


@pytest.mark.usefixtures("varlen_runs")
@settings(derandomize=True, max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ordered_problems())
def test_text_in_order_is_one_sequence_for_each_medium(problem: tuple) -> None:
    inputs, visible, mask = problem
    there = mask[..., None].expand(inputs[1].shape[:3]) if mask is not None and mask.ndim == 2 else mask
    expected = one_token_at_a_time(*inputs, visible, there)
    true = gradients(expected, *inputs) if expected.requires_grad else [torch.zeros_like(x) for x in inputs]
    for impl in ("varlen", "segmented", "fused", "reference"):
        output = media_attention(*inputs, visible, mask=mask, impl=impl)
        assert_close(output, expected, 1e-10)
        for ours, theirs in zip(gradients(output, *inputs), true, strict=True):
            assert_close(ours, theirs, 1e-10)


@pytest.mark.usefixtures("varlen_runs")
@pytest.mark.parametrize("impl", ["varlen", "segmented", "fused", "reference"])
@pytest.mark.parametrize(
    "mask", [torch.tensor([[True, False, True], [False, True, True]]), MASK], ids=["media", "latents"]
)
def test_what_is_masked_reaches_nothing_even_as_nan(impl: str, mask: Tensor) -> None:
    inputs = draw()
    poisoned = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        poisoned[1][~mask] = torch.nan
        poisoned[2][~mask] = torch.inf
    visible = seen(TIME, "last")._replace(ordered=True)
    clean = media_attention(*inputs, visible, mask=mask, impl=impl)
    output = media_attention(*poisoned, visible, mask=mask, impl=impl)
    assert torch.equal(clean, output)
    for ours, theirs in zip(gradients(output, *poisoned), gradients(clean, *inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("varlen_runs")
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, MASK.any(-1), MASK], ids=["whole", "media", "latents"])
def test_text_that_is_not_finite_stays_so_where_it_sees_media(
    number: float, dtype: torch.dtype, mask: Tensor | None
) -> None:
    """And moves no other text. PyTorch's kernel for CPUs reads 0 for such a query."""
    query, key, value = (x.detach() for x in draw(dtype=dtype))
    visible = seen(TIME, "last")._replace(ordered=True)
    query[0, 0], query[0, 2], query[1, 8] = number, number, number
    expected = media_attention(query, key, value, visible, mask=mask, impl="reference")
    assert expected[0, 2].isnan().all()
    assert (expected[0, 0] == 0).all()
    everything = media_attention(query, key, value, mask=mask, impl="reference")
    for impl in ("varlen", "segmented", "fused"):
        output = media_attention(query, key, value, visible, mask=mask, impl=impl)
        assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(media_attention(query, key, value, mask=mask).isnan(), everything.isnan())
    of_one = media_attention(query, key[:, :1], value[:, :1], visible, impl="fused")
    assert torch.equal(
        of_one.isnan(), media_attention(query, key[:, :1], value[:, :1], visible, impl="reference").isnan()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_latents", [False, True], ids=["media", "latents"])
def test_the_kernel_for_variable_lengths_is_as_good_as_the_plain_formula(dtype: torch.dtype, of_latents: bool) -> None:
    sizes = {"text": 33, "media": 5, "latents": 7, "width": 16}
    time = torch.randint(0, 7, (2, 33), generator=torch.Generator().manual_seed(1)).sort(dim=1).values
    visible, mask = seen(time, "last")._replace(ordered=True), torch.tensor([2 * [True] + [False] + 2 * [True]] * 2)
    there = mask[..., None].expand(2, 5, 7).clone()
    if of_latents:
        there[:, ::2, 3:5] = False
        mask = there
    low, exact = draw(**sizes, dtype=dtype), draw(**sizes)
    oracle, plain = (one_token_at_a_time(*inputs, visible, there) for inputs in (exact, low))
    on_gpu = tuple(x.detach().cuda().requires_grad_() for x in low)
    of_gpu = visible._replace(first=visible.first.cuda(), last=visible.last.cuda())
    fast = media_attention(*on_gpu, of_gpu, mask=mask.cuda(), impl="varlen")
    assert torch.equal(fast, media_attention(*on_gpu, of_gpu, mask=mask.cuda()))
    assert_within_budget(fast.cpu(), plain, oracle)
    results = zip(gradients(fast, *on_gpu), gradients(plain, *low), gradients(oracle, *exact), strict=True)
    for ours, theirs, true in results:
        assert_within_budget(ours.cpu(), theirs, true)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"visible": None}, "it needs text that sees one medium at most, in order"),
        ({"visible": VisibleMedia(TIME, TIME, 1)}, "it needs text that sees one medium at most, in order"),
        ({"visible": LastMedia(2).visible(TIME > 0)}, "it needs text that sees one medium at most, in order"),
        ({"visible": AllPrevious().visible(TIME > 0)}, "it needs text that sees one medium at most, in order"),
        ({}, "it needs a CUDA device, got cpu"),
    ],
)
def test_varlen_says_when_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, VisibleMedia | Tensor | None], reason: str
) -> None:
    with pytest.raises(ImplementationUnavailable, match="impl='varlen' cannot run here: it needs a CUDA device"):
        media_attention(*draw(), LastMedium().visible(TIME > 0), impl="varlen")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = {"visible": LastMedium().visible(TIME > 0), "mask": None, **change}
    with pytest.raises(ImplementationUnavailable, match=f"{reason}.*Use impl='segmented'"):
        media_attention(*draw(), arguments["visible"], mask=arguments["mask"], impl="varlen")


def test_segmented_says_when_it_cannot_run() -> None:
    inputs = draw()
    with pytest.raises(ImplementationUnavailable, match=r"needs a bound.*got most=None. Use impl='fused'"):
        media_attention(*inputs, seen(TIME, "previous"), impl="segmented")
    with pytest.raises(ImplementationUnavailable, match="got None"):
        media_attention(*inputs, impl="segmented")


def test_what_is_wrong_is_said() -> None:
    query, key, value = draw()
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of .*got 'fast'"):
        media_attention(query, key, value, impl="fast")


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_shape_or_a_type_is_said() -> None:
    query, key, value = draw()
    visible = seen(TIME, "last")
    with pytest.raises(InvalidArgument, match=r"query: expected shape \[B, T, H, E\], got shape \(2, 9, 2\)"):
        media_attention(query[..., 0], key, value, visible)
    with pytest.raises(InvalidType, match="key: expected a floating-point tensor"):
        media_attention(query, key.long(), value, visible)
    with pytest.raises(InvalidArgument, match=r"key: .*B, H, E of query \(2, 9, 2, 5\), got \(2, 3, 4, 1, 5\)"):
        media_attention(query, key[:, :, :, :1], value, visible)
    with pytest.raises(InvalidArgument, match=r"value: expected the shape of key \(2, 3, 4, 2, 5\)"):
        media_attention(query, key, value[:, :2], visible)
    with pytest.raises(InvalidType, match=r"visible.last: expected integers.*torch.bool.*LastMedium\(\).visible"):
        media_attention(query, key, value, VisibleMedia(TIME, TIME > 0))
    with pytest.raises(InvalidArgument, match=r"visible.first: expected shape \[B, T\] = \(2, 9\), got \(2, 8\)"):
        media_attention(query, key, value, VisibleMedia(TIME[:, 1:], TIME))
    with pytest.raises(InvalidType, match=r"mask: expected a boolean tensor.*Use mask.bool\(\)"):
        media_attention(query, key, value, visible, mask=MASK.float())
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, M, N\] = \(2, 3, 4\)"):
        media_attention(query, key, value, visible, mask=MASK[:, :2])
