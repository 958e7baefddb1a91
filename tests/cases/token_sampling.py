"""Attention that samples its queries: half of the tokens, and room for all of them."""

from typing import Any

import torch
from torch import Tensor, nn

from narrows.layers.token_sampling import AdaptiveTokenSampler, SampledAttention, SampledTokens
from tests.cases import LayerCase


def construct(num_tokens: int, impl: str = "auto", **kwargs: Any) -> nn.Module:
    sampler = AdaptiveTokenSampler(num_tokens, impl="reference" if impl == "reference" else "auto")
    return SampledAttention(16, sampler=sampler, heads=2, head_dim=8, impl=impl, **kwargs)


def fill(attention: nn.Module) -> None:
    # Sharp attention: sampling is a discontinuous choice, and low precision must not decide it.
    nn.init.normal_(attention.qkv.weight, std=0.5)


def sampling(**kwargs: Any) -> nn.Module:
    return construct(4, **kwargs)


def keeping_all(**kwargs: Any) -> nn.Module:
    return construct(20, **kwargs)


def inputs(batch: int) -> dict[str, Tensor]:
    return {"tokens": torch.randn(batch, 9, 16)}


def outputs(result: object) -> dict[str, Tensor]:
    assert isinstance(result, SampledTokens)
    return {"tokens": result.tokens}


CASES = [
    LayerCase(
        f"SampledAttention-{name}",
        build,
        inputs,
        outputs,
        padded={"mask": "tokens"},
        impls=("reference", "query_first", "all_queries"),
        fill=fill,
        dynamic=False,  # the common test asks for 2 tokens and more, this takes 3 and more: see the layer's own tests
    )
    for name, build in {"sampling": sampling, "keeping-all": keeping_all}.items()
]
