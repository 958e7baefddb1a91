import pytest
import torch
import vit_pytorch.ats_vit
from torch import Tensor, nn

from narrows.costs import count_macs
from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.layers.token_sampling import AdaptiveTokenSampler, SampledAttention, TokenSample
from narrows.ops.token_sampling import gumbel_sample, inverse_transform_sample
from tests.support import assert_close, gradients


def attention(num_tokens: int = 4, dim: int = 16, **kwargs: object) -> SampledAttention:
    torch.manual_seed(0)
    layer = SampledAttention(dim, sampler=AdaptiveTokenSampler(num_tokens), heads=2, **kwargs)
    nn.init.normal_(layer.qkv.weight, std=0.5)
    return layer.eval()


def assert_same_sample(found: TokenSample, expected: TokenSample) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)


# The sampler


def test_the_sampler_has_no_state_and_passes_its_options_on() -> None:
    scores, mask = torch.rand(3, 20), torch.rand(3, 20) < 0.7
    assert not AdaptiveTokenSampler(5).state_dict()
    assert_same_sample(AdaptiveTokenSampler(5)(scores, mask), inverse_transform_sample(scores, 5, mask))
    assert_same_sample(
        AdaptiveTokenSampler(20, sample_always=True)(scores), inverse_transform_sample(scores, 20, sample_always=True)
    )
    assert_same_sample(AdaptiveTokenSampler(5)(scores, num_tokens=9), inverse_transform_sample(scores, 9))
    assert_same_sample(
        AdaptiveTokenSampler(5, sampling="gumbel")(scores, generator=torch.Generator().manual_seed(1)),
        gumbel_sample(scores, 5, generator=torch.Generator().manual_seed(1)),
    )


@pytest.mark.parametrize("options", [{}, {"sample_always": True}, {"sampling": "gumbel"}], ids=str)
@pytest.mark.compiled
def test_the_sampler_is_one_graph(options: dict[str, object]) -> None:
    """Upstream's loop over images breaks the graph at every image and cannot be exported."""
    torch._dynamo.reset()
    sampler, scores = AdaptiveTokenSampler(5, **options), torch.rand(3, 20)
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    shapes = {"scores": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=2)}}
    exported = torch.export.export(sampler, (), {"scores": scores}, dynamic_shapes=shapes, strict=False).module()
    results = []
    for function, argument in [
        (sampler, scores),
        (compiled, scores),
        (sampler, scores[:2, :9]),
        (exported, scores[:2, :9]),
    ]:
        torch.manual_seed(0)
        results.append(function(scores=argument))
    assert_same_sample(results[1], results[0])
    assert_same_sample(results[3], results[2])


def test_upstream_is_random_in_evaluation_and_narrows_is_not() -> None:
    layer, rival = attention(), vit_pytorch.ats_vit.Attention(16, heads=2, dim_head=8, output_num_tokens=4).eval()
    tokens, mask = torch.randn(2, 33, 16), torch.ones(2, 33, dtype=torch.bool)
    torch.manual_seed(0)
    first, rival_first = layer(tokens), rival(tokens, mask=mask)
    second, rival_second = layer(tokens), rival(tokens, mask=mask)
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(rival_first[2], rival_second[2])


def test_upstream_lets_the_padded_width_decide_and_narrows_each_image() -> None:
    """An image of 10 tokens and K = 12: whole when alone, and whole beside an image of 20."""
    tokens = torch.randn(2, 21, 16)
    mask = torch.arange(21) < torch.tensor([[21], [11]])
    rival = vit_pytorch.ats_vit.Attention(16, heads=2, dim_head=8, output_num_tokens=12).eval()
    _, alone, _ = rival(tokens[1:, :11], mask=mask[1:, :11])
    _, together, _ = rival(tokens, mask=mask)
    assert alone.sum() == 11
    assert together[1].sum() < 11

    layer = attention(12)
    assert layer(tokens[1:, :11]).mask.sum() == layer(tokens, mask).mask[1].sum() == 11
    assert layer(tokens, mask).mask[0].sum() < 21


def test_the_papers_setting_samples_with_room_for_all_and_upstream_does_not() -> None:
    tokens = 3 * torch.randn(2, 21, 16)
    mask = torch.ones(2, 21, dtype=torch.bool)
    rival = vit_pytorch.ats_vit.Attention(16, heads=2, dim_head=8, output_num_tokens=20)
    assert rival(tokens, mask=mask)[2] is None

    layer = attention()
    layer.sampler = AdaptiveTokenSampler(20, sample_always=True)
    assert (layer(tokens).mask.sum(1) < 21).all()


def test_bad_samplers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="num_tokens: expected a positive integer, got 0"):
        AdaptiveTokenSampler(0)
    with pytest.raises(InvalidArgument, match=r"sampling: expected one of \('quantile', 'gumbel'\), got 'uniform'"):
        AdaptiveTokenSampler(3, sampling="uniform")


# The attention


def test_ids_are_what_the_residual_gathers() -> None:
    """Attention of the kept rows is that of the whole, plain attention."""
    layer, tokens = attention(), torch.randn(3, 12, 16)
    whole = attention(11)(tokens)
    sampled = layer(tokens)
    assert (sampled.ids[:, 0] == 0).all()
    for b in range(3):
        where = sampled.ids[b, sampled.mask[b]]
        assert_close(sampled.tokens[b, sampled.mask[b]], whole.tokens[b, where])
        assert (sampled.tokens[b, len(where) :] == 0).all()
    assert_same_sample(TokenSample(*layer(tokens, num_tokens=7)[1:]), TokenSample(*attention(7)(tokens)[1:]))


def test_routing_shows_the_kept_tokens_without_the_class_token() -> None:
    layer, tokens = attention(), torch.randn(3, 12, 16)
    mask = torch.arange(12) < torch.tensor([[12], [9], [3]])
    sampled, routing = layer(tokens, mask), layer.routing(tokens, mask)
    assert routing.carriers == "kept tokens"
    assert routing.weights.shape == (3, 1, 4, 12)
    for b in range(3):
        ids = sampled.ids[b, sampled.mask[b]].tolist()
        assert routing.weights[b, 0].sum(0).nonzero().flatten().tolist() == ids[1:]
        assert routing.weights[b].sum() == len(ids) - 1


def test_dropout_acts_in_training_only_and_on_the_result_too() -> None:
    layer, tokens = attention(dropout=0.5), torch.randn(2, 12, 16)
    assert_close(layer(tokens).tokens, attention()(tokens).tokens)
    layer.train()
    first = layer(tokens)
    assert torch.equal(first.ids, layer(tokens).ids), "dropout changed what is sampled"
    assert (first.tokens == 0).double().mean() > 0.3


def test_gumbel_attention_takes_a_generator() -> None:
    layer, tokens = attention(), torch.randn(2, 30, 16)
    layer.sampler = AdaptiveTokenSampler(4, sampling="gumbel")
    drawn = [layer(tokens, generator=torch.Generator().manual_seed(seed)).ids for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_autocast_scores_in_float32() -> None:
    """bfloat16 keys, but the row of attention that decides is not rounded to 8 bits."""
    layer, seen = attention(), []

    class Spy(AdaptiveTokenSampler):
        def forward(self, scores: Tensor, mask: Tensor | None = None, **kwargs: object) -> TokenSample:
            seen.append(scores.dtype)
            return super().forward(scores, mask, **kwargs)

    layer.sampler = Spy(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 12, 16)).tokens.dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 12, 16).double()).tokens.dtype == torch.float64
    assert seen == [torch.float32, torch.float64]


every_impl = pytest.mark.parametrize("impl", ["reference", "query_first", "all_queries"])


@every_impl
@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_image_is_the_image_alone_whatever_its_padding_holds(impl: str, bias: bool) -> None:
    layer = attention(impl=impl, qkv_bias=bias).double()
    tokens, lengths = torch.randn(4, 17, 16, dtype=torch.float64), (17, 9, 1, 0)
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    tokens = tokens.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    result = layer(tokens, mask)
    leaves = (tokens, *layer.parameters())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(result.tokens, *leaves))
    for b, length in enumerate(lengths):
        if length == 0:
            assert not result.mask[b].any()
            assert (result.tokens[b] == 0).all()
        else:
            alone = layer(tokens[b : b + 1, :length])
            assert torch.equal(result.ids[b], alone.ids[0])
            assert torch.equal(result.mask[b], alone.mask[0])
            assert_close(result.tokens[b], alone.tokens[0], 1e-10)


def test_no_product_is_spent_on_tokens_that_are_dropped() -> None:
    """Upstream attends for all N tokens and projects queries of all."""
    batch, n, d, k = 2, 65, 16, 8
    x, layer = torch.randn(batch, n, d), SampledAttention(d, sampler=AdaptiveTokenSampler(k), heads=4)
    found = count_macs(lambda: layer(x))
    keys_and_values, read, around = 2 * n * d * d, 2 * (k + 1) * n * d, 2 * (k + 1) * d * d
    scores = d * d + n * d  # the class token's query, on the keys
    assert found == batch * (keys_and_values + read + around + scores)
    rival = vit_pytorch.ats_vit.Attention(d, heads=4, dim_head=4, output_num_tokens=k)
    assert count_macs(lambda: rival(x, mask=torch.ones(batch, n, dtype=torch.bool))) > 1.5 * found


def test_one_can_ask_which_implementation_runs() -> None:
    """Queries of the kept tokens only are a part of the weight of `qkv`, where that is all it is."""
    tokens = torch.randn(2, 12, 16)
    for impl in ("reference", "all_queries", "query_first"):
        assert attention(impl=impl).implementation() == impl
    layer, expected = attention(), attention(impl="all_queries")(tokens)
    assert layer.implementation() == "query_first"
    shapes: list[torch.Size] = []
    handle = layer.qkv.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert layer.implementation() == "all_queries"
    assert torch.equal(layer(tokens).tokens, expected.tokens)
    assert shapes == [(2, 12, 48)]
    layer.impl = "query_first"
    for call in (layer.implementation, lambda: layer(tokens)):
        with pytest.raises(ImplementationUnavailable, match=r"SampledAttention: impl='query_first' .*: qkv has hooks"):
            call()
    handle.remove()
    assert_close(layer(tokens).tokens, expected.tokens)


@every_impl
def test_a_class_token_alone_is_kept(impl: str) -> None:
    layer, tokens = attention(impl=impl), torch.randn(2, 1, 16)
    sampled = layer(tokens)
    assert sampled.mask.tolist() == [[True] + [False] * 4] * 2
    value = layer.qkv(tokens)[..., 32:]
    assert_close(sampled.tokens[:, :1], layer.out(value))


@pytest.mark.compiled
def test_attention_exports_with_any_number_of_tokens() -> None:
    layer = attention()
    shapes = {
        "tokens": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=3, max=4096)},
        "mask": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=3, max=4096)},
    }
    arguments = {"tokens": torch.randn(3, 12, 16), "mask": torch.ones(3, 12, dtype=torch.bool)}
    program = torch.export.export(layer, (), arguments, dynamic_shapes=shapes, strict=False).module()
    tokens, mask = torch.randn(5, 30, 16), torch.arange(30) < torch.tensor([[30], [17], [5], [3], [0]])
    for found, expected in zip(program(tokens=tokens, mask=mask), layer(tokens, mask), strict=True):
        assert_close(found.double(), expected.double())


def test_bad_attention_is_refused() -> None:
    sampler = AdaptiveTokenSampler(4)
    with pytest.raises(InvalidArgument, match=r"heads: expected a divisor of dim = 16, got 3\. Or give head_dim"):
        SampledAttention(16, sampler=sampler, heads=3)
    with pytest.raises(InvalidArgument, match="head_dim: expected a positive integer, got 0"):
        SampledAttention(16, sampler=sampler, heads=2, head_dim=0)
    with pytest.raises(InvalidArgument, match=r"impl: expected 'auto' or one of \['all_queries', 'query_first', 'refe"):
        attention(impl="static")(torch.randn(1, 9, 16))
    with pytest.raises(InvalidArgument, match=r"tokens: expected at least the class token, got shape \(1, 0, 16\)"):
        attention()(torch.randn(1, 0, 16))
