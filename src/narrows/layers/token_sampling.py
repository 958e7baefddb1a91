"""Adaptive token sampling as layers: the sampler, and the attention it sits in."""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.ops.token_sampling import (
    GUMBEL_IMPLEMENTATIONS,
    QUANTILE_IMPLEMENTATIONS,
    SampledTokens,
    TokenSample,
    gather_tokens,
    gumbel_sample,
    inverse_transform_sample,
    sampled_attention,
)
from narrows.routing import Routing
from narrows.validation import (
    check_choice,
    check_generator,
    check_mask,
    check_positive,
    check_tokens,
    checked,
    why_not_plain,
)

__all__ = ["AdaptiveTokenSampler", "SampledAttention", "SampledTokens", "TokenSample", "one_hot_routing"]


class AdaptiveTokenSampler(nn.Module):
    r"""Choose at most K tokens of each image by their scores (Fayyaz et al. 2022, arXiv 2111.15667).

    \[ \{\arg\min_n |F_n - y_k| : k = 0 .. K - 1\}, \quad F = \text{cumulative distribution of the sorted scores} \]

    Tokens with large scores cover many of the evenly spaced quantiles y and are kept once, so that easy images keep
    fewer than K. An image with at most K tokens keeps them all, however wide the batch is padded. No parameters.

    Args:
        num_tokens: K, the capacity, without the class token.
        sampling: "quantile" (deterministic, in training too) or "gumbel" (K random draws with replacement, in
            evaluation too: what the package vit-pytorch does).
        sample_always: sample also where all tokens would fit. With K = N this is the paper's own setting: only
            insignificant tokens are dropped.
        impl: "auto", "reference", "static", or of quantiles "triton", a kernel for CUDA.

    >>> import torch
    >>> from narrows.layers.token_sampling import AdaptiveTokenSampler
    >>> AdaptiveTokenSampler(3)(torch.tensor([[0.1, 0.4, 0.1, 0.2, 0.2]])).ids
    tensor([[1, 2, 4]])
    """

    @checked
    def __init__(
        self, num_tokens: int, *, sampling: str = "quantile", sample_always: bool = False, impl: str = "auto"
    ) -> None:
        super().__init__()
        check_positive(num_tokens=num_tokens)
        check_choice("sampling", sampling, ("quantile", "gumbel"))
        choices = QUANTILE_IMPLEMENTATIONS if sampling == "quantile" else GUMBEL_IMPLEMENTATIONS
        check_choice("impl", impl, ("auto", *choices))
        self.num_tokens, self.sampling, self.sample_always, self.impl = num_tokens, sampling, sample_always, impl

    def forward(
        self,
        scores: Float[Tensor, "B N"],
        mask: Bool[Tensor, "B N"] | None = None,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenSample:
        """The tokens to keep.

        Args:
            scores: `[B, N]`, not negative, usually the `significance` of the tokens after the class token.
            mask: `[B, N]`, True at real tokens.
            num_tokens: K of this call.
            generator: source of the noise of "gumbel"; torch's global one otherwise. `torch.compile(fullgraph=True)`
                takes no module that is called with a generator.

        Returns:
            `ids [B, K]` in raster order and `mask [B, K]`.
        """
        check_generator(generator)
        capacity = self.num_tokens if num_tokens is None else num_tokens
        options = {"sample_always": self.sample_always, "impl": self.impl}
        if self.sampling == "gumbel":
            return gumbel_sample(scores, capacity, mask, generator=generator, **options)
        return inverse_transform_sample(scores, capacity, mask, **options)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_tokens}, sampling={self.sampling!r}, sample_always={self.sample_always}"


class SampledAttention(nn.Module):
    r"""Multi-head self-attention that returns the class token and the tokens it finds significant (Fayyaz et al. 2022).

    \[ O = \mathrm{softmax}(Q_S K^T / \sqrt{d}) V W_o, \quad S = \{cls\} \cup \text{sampler}(s), \quad
       s_n \propto \sum_h A_{h,cls,n} \lVert V_{h,n} \rVert \]

    All tokens are read, and only those sampled are computed. Normalisation before and the residual after are the
    block's: with the tokens `x` that came in, `gather_tokens(x, ids) + tokens`.

    Args:
        dim: D.
        sampler: chooses among the tokens after the class token.
        heads: H.
        head_dim: width of a head; `dim / heads` if None.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: on the attention weights, after scores were taken from them, and on the result.
        impl: "reference", the whole attention matrix; "query_first", which projects queries of the kept tokens only, by
            a part of the weight of `qkv`; "all_queries", which calls `qkv` once, on all tokens, and gathers; or "auto".
        device: where parameters are made.
        dtype: of the parameters.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        sampler: AdaptiveTokenSampler,
        heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads)
        if head_dim is None and dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of dim = {dim}", got=heads, hint="Or give head_dim.")
        head_dim = dim // heads if head_dim is None else head_dim
        check_positive(head_dim=head_dim)
        self.dim, self.heads, self.dropout, self.impl = dim, heads, dropout, impl
        self.sampler = sampler
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Both linear maps as torch's do."""
        self.qkv.reset_parameters()
        self.out.reset_parameters()

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SampledTokens:
        """Attend for the sampled tokens, over all.

        Args:
            tokens: `[B, N, D]`, the class token first; it is always read and always kept.
            mask: `[B, N]`, True at real tokens. A sample without any gives zeros.
            num_tokens: K of this call; the sampler's if None.
            generator: source of noise for a sampler that draws.

        Returns:
            `tokens [B, K + 1, D]` with the class token first, `ids` of their positions among the N, and `mask`; slots
            that hold no token are 0.
        """
        check_tokens("tokens", tokens, dim=self.dim)
        check_mask("mask", mask, tuple(tokens.shape[:2]))
        if tokens.shape[1] == 0:
            raise InvalidArgument("tokens", expected="at least the class token", got=f"shape {tuple(tokens.shape)}")
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0.0)
        impl, dropout = self.implementation(), self.dropout if self.training else 0.0
        if impl == "query_first":
            rows = (self.qkv.out_features // 3, self.qkv.out_features // 3 * 2)
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(rows)
            (query_weight, weight), (query_bias, bias) = self.qkv.weight.split(rows), biases
            key, value = self._by_head(F.linear(tokens, weight, bias), 2)

            def queries(ids: Tensor) -> Tensor:
                return self._by_head(F.linear(gather_tokens(tokens, ids), query_weight, query_bias), 1)[0]

            (class_query,) = self._by_head(F.linear(tokens[:, 0], query_weight, query_bias), 1)
        else:
            query, key, value = self._by_head(self.qkv(tokens), 3)
            class_query, queries = query[:, 0], partial(gather_tokens, query)
        attended, ids, kept = sampled_attention(
            class_query,
            queries,
            key,
            value,
            sampler=partial(self.sampler, num_tokens=num_tokens, generator=generator),
            mask=mask,
            dropout=dropout,
            impl="reference" if impl == "reference" else "fused",
        )
        result = self.out(attended) * kept[..., None]
        return SampledTokens(F.dropout(result, dropout), ids, kept)

    def implementation(self) -> str:
        """Which implementation `forward` takes as the layer is now: "reference", "query_first" or "all_queries".

        Hooks, LoRA, quantised weights, pruning and the like on `qkv` leave "all_queries", which calls it.
        impl="query_first" raises then, as `forward` does.
        """
        if self.impl in ("reference", "all_queries"):
            return self.impl
        if self.impl not in ("auto", "query_first"):
            expected = "'auto' or one of ['all_queries', 'query_first', 'reference']"
            raise InvalidArgument("impl", expected=expected, got=repr(self.impl))
        reason = why_not_plain((("qkv", self.qkv),))
        if reason is None:
            return "query_first"
        if self.impl == "auto":
            return "all_queries"
        raise ImplementationUnavailable(
            f"SampledAttention: impl='query_first' cannot run here: {reason}. Use impl='all_queries' or impl='auto'."
        )

    def routing(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Which of the N tokens are kept, for the arguments of `forward`; see `one_hot_routing`."""
        return one_hot_routing(self(tokens, mask, num_tokens, generator), tokens.shape[1])

    def _by_head(self, projected: Float[Tensor, "*batch PHd"], parts: int) -> tuple[Tensor, ...]:
        """`[..., parts * H * d]` as so many `[..., H, d]`."""
        return projected.unflatten(-1, (parts, self.heads, -1)).unbind(-3)


def one_hot_routing(sampled: SampledTokens, num_positions: int) -> Routing:
    """Weights `[B, 1, K, num_positions]`, 1 where a carrier is the token of that position; the class token is none."""
    positions = torch.arange(num_positions, device=sampled.ids.device)
    is_position = (sampled.ids[:, 1:, None] == positions) & sampled.mask[:, 1:, None]
    return Routing(is_position[:, None].to(sampled.tokens.dtype), carriers="kept tokens")
