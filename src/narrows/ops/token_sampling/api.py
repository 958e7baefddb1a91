"""The public functions of token sampling."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.ops.dispatch import TRITON_INSTALLED, Implementation, resolve, why_no_kernels
from narrows.ops.token_sampling import fast, reference
from narrows.ops.token_sampling.common import Queries, SampledTokens, Sampler, TokenSample, compact, with_prefix
from narrows.precision import is_transformed
from narrows.validation import check_mask, check_positive, check_tokens


def _run_kernel(
    scores: Float[Tensor, "B N"], num_samples: int, mask: Bool[Tensor, "B N"] | None, sample_always: bool, prefix: int
) -> TokenSample:
    from narrows.ops.token_sampling import triton

    return triton.inverse_transform_sample(scores, num_samples, mask, sample_always, prefix)


QUANTILE_IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(reference.inverse_transform_sample, "the nearest entry to every quantile"),
        "static": Implementation(fast.inverse_transform_sample, "quantiles counted, without comparing all with all"),
        "triton": Implementation(_run_kernel, "the same in one kernel for CUDA", why_no_kernels),
    }
)
GUMBEL_IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(reference.gumbel_sample, "Gumbel-max"),
        "static": Implementation(fast.gumbel_sample, "exponential race, one logarithm less"),
    }
)
IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": Implementation(reference.sampled_attention, "full attention, rows gathered"),
        "fused": Implementation(fast.sampled_attention, "scores first, fused attention of the kept tokens only"),
    }
)


def inverse_transform_sample(
    scores: Float[Tensor, "B N"],
    num_samples: int,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    sample_always: bool = False,
    prefix: int = 0,
    impl: str = "auto",
) -> TokenSample:
    r"""Keep the tokens that evenly spaced quantiles of their scores' distribution fall on (Fayyaz et al. 2022, 3.2).

    With F the cumulative sum of the scores sorted ascending, shifted and scaled to run from 0 to 1, and s its least
    entry above 0, the K quantiles (those of the authors' release) and the tokens kept are

    \[ y_k = s + \frac{k}{K - 1} (1 - s), \qquad \{\arg\min_n |F_n - y_k| : k = 0 .. K - 1\} \]

    A token with a large score covers many quantiles and is kept once: the sharper the scores, the fewer tokens remain.
    An image with at most K real tokens keeps them all.

    Deterministic and exact: scores are taken as whole multiples of 2^-32 of the greatest; of equal scores the earlier
    sorts first; of two equally near entries the lower is kept. A row without any positive score counts as flat, a score
    that is negative or no number as 0. A single quantile (K = 1) is the greatest score.

    Args:
        scores: `[B, N]`, not negative; any scale.
        num_samples: K, how many quantiles, and the capacity of the result.
        mask: `[B, N]`, True at real tokens.
        sample_always: sample also where all tokens would fit, so that K = N still drops what is insignificant.
        prefix: how many tokens stand before the N: they are kept as well, and positions are counted from the first.
        impl: "auto" or a name in `QUANTILE_IMPLEMENTATIONS`. "auto" takes the kernel on a CUDA device, save in exported
            programs, and "static" elsewhere.

    Returns:
        `ids` and `mask` `[B, prefix + K]`.

    Raises:
        InvalidArgument, InvalidType: shapes, dtypes or `num_samples` are not as above.
        ImplementationUnavailable: `impl="triton"` where the kernel cannot run.
    """
    _check(scores, num_samples, mask)
    exports = torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    wanted = impl == "triton" or (impl == "auto" and scores.is_cuda and not exports)
    why_not = _why_not_triton(scores, prefix + num_samples) if wanted else None
    by_kernel = wanted and why_not is None
    auto = "triton" if by_kernel else "static"
    run = resolve("inverse_transform_sample", impl, QUANTILE_IMPLEMENTATIONS, auto=auto)
    if impl == "triton" and not by_kernel:
        raise ImplementationUnavailable(
            f"inverse_transform_sample: impl='triton' cannot run here: {why_not}. Use impl='auto'."
        )
    if by_kernel:
        return run(scores.detach(), num_samples, mask, sample_always, prefix)
    if scores.shape[1] == 0:
        return with_prefix(compact(torch.zeros_like(scores, dtype=torch.bool), num_samples), prefix)
    return run(_defined(scores), num_samples, mask, sample_always, prefix)


def _why_not_triton(scores: Float[Tensor, "B N"], slots: int) -> str | None:
    """The reason why the kernel cannot take these scores, or None where it can. The machine is not asked."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if is_transformed(scores):
        return "it has no rule for torch.func"
    from narrows.ops.token_sampling import triton

    return triton.why_not(scores, slots)


def gumbel_sample(
    scores: Float[Tensor, "B N"],
    num_samples: int,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    sample_always: bool = False,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> TokenSample:
    """Keep the tokens hit by K draws with replacement, in proportion to their scores.

    What the package `vit-pytorch` does in place of `inverse_transform_sample`, from the same noise for the same seed:
    `[B, K, N]` uniform numbers. It is random in evaluation too, and flat scores keep only about two thirds of K.

    Args:
        scores: `[B, N]`, not negative, rows summing to 1.
        num_samples: K, how many draws, and the capacity of the result.
        mask: `[B, N]`, True at real tokens.
        sample_always: draw also where all tokens would fit.
        generator: source of the noise; torch's global one otherwise. `torch.compile(fullgraph=True)` takes no function
            with a generator given, whatever the function.
        impl: "auto" or a name in `GUMBEL_IMPLEMENTATIONS`.

    Raises:
        InvalidArgument, InvalidType: shapes, dtypes or `num_samples` are not as above.
    """
    _check(scores, num_samples, mask)
    if scores.shape[1] == 0:
        return compact(torch.zeros_like(scores, dtype=torch.bool), num_samples)
    run = resolve("gumbel_sample", impl, GUMBEL_IMPLEMENTATIONS, auto="static")
    return run(_defined(scores), num_samples, mask, sample_always, generator)


def sampled_attention(
    class_query: Float[Tensor, "B H d"],
    queries: Queries,
    key: Float[Tensor, "B N H d"],
    value: Float[Tensor, "B N H d"],
    *,
    sampler: Sampler,
    mask: Bool[Tensor, "B N"] | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> SampledTokens:
    r"""Multi-head attention of the class token and the tokens it finds significant, over all tokens.

    \[ O = \mathrm{softmax}(Q_S K^T / \sqrt{d}) V, \qquad S = \{cls\} \cup \text{sampler}(\text{significance}) \]

    Scores are taken from the class token's row before dropout, in float32 at least, and carry no gradient: the choice
    is no function of the parameters, the rows that were chosen are.

    Args:
        class_query: `[B, H, d]`, of the class token, which is the first of the N.
        queries: gives the queries `[B, M, H, d]` of the tokens at positions `[B, M]`. Which they are is known only when
            scores are, so that those of dropped tokens need not be there.
        key, value: `[B, N, H, d]`, finite at masked tokens too.
        sampler: scores `[B, N - 1]` and mask of the tokens after the class token to a `TokenSample` of K of them.
        mask: `[B, N]`, True at real tokens.
        dropout: probability at which attention weights are dropped.
        impl: "auto" or a name in `IMPLEMENTATIONS`.

    Returns:
        What K + 1 tokens read, `[B, K + 1, H * d]`, the class token first, with their positions among the N. In slots
        left over, and for a sample without any token, it is finite and means nothing.

    Raises:
        InvalidArgument, InvalidType: shapes or dtypes are not as above.
    """
    check_tokens("key", key, layout="[B, N, H, d]")
    if value.shape != key.shape:
        raise InvalidArgument("value", expected=f"the shape of key {tuple(key.shape)}", got=tuple(value.shape))
    expected = (key.shape[0], *key.shape[2:])
    if tuple(class_query.shape) != expected:
        raise InvalidArgument("class_query", expected=f"shape [B, H, d] = {expected}", got=tuple(class_query.shape))
    check_mask("mask", mask, tuple(key.shape[:2]))
    run = resolve("sampled_attention", impl, IMPLEMENTATIONS, auto="fused")
    return run(class_query, queries, key, value, sampler, mask, dropout)


def restore(sampled: SampledTokens, fill: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Kept tokens at the positions they came from; every other position as in `fill`.

    Args:
        sampled: K tokens and their positions among N.
        fill: `[B, N, D]`, what dropped positions get: their last state, or zeros.

    Raises:
        InvalidArgument: `fill` has another batch or width than the tokens.
    """
    check_tokens("fill", fill, dim=sampled.tokens.shape[-1])
    if fill.shape[0] != sampled.tokens.shape[0]:
        raise InvalidArgument("fill", expected=f"a batch of {sampled.tokens.shape[0]}", got=fill.shape[0])
    # Slots that hold no token go to one row more, which is cut off.
    rows = sampled.ids.masked_fill(~sampled.mask, fill.shape[1])[..., None].expand_as(sampled.tokens)
    padded = torch.cat((fill, torch.zeros_like(fill[:, :1])), 1)
    return padded.scatter(1, rows, sampled.tokens.to(fill.dtype))[:, :-1]


def _check(scores: Tensor, num_samples: int, mask: Tensor | None) -> None:
    check_tokens("scores", scores, layout="[B, N]")
    check_mask("mask", mask, tuple(scores.shape))
    check_positive(num_samples=num_samples)


def _defined(scores: Tensor) -> Tensor:
    """A model that diverged must not send indices out of range."""
    return scores.detach().nan_to_num(nan=0.0).clamp_min(0.0)
