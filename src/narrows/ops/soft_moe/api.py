"""Soft mixture of experts: the public function."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.errors import InvalidArgument
from narrows.ops.dispatch import Implementation, resolve
from narrows.ops.soft_moe import chunked, reference, shared
from narrows.validation import check_mask, check_tokens

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": Implementation(reference.soft_moe, "Algorithm 1 of the paper in float32 or better"),
    "shared": Implementation(shared.soft_moe, "logits once for both softmaxes"),
    "chunked": Implementation(chunked.soft_moe, "fused attention, weights recomputed in backward; memory linear in N"),
}


def _auto(num_tokens: int, num_slots: int, dim: int) -> str:
    if torch.compiler.is_exporting():  # A choice by size would fix the size in the exported program.
        return "shared"
    inputs = (2 * num_tokens + num_slots) * dim
    return "shared" if num_tokens * num_slots <= inputs else "chunked"


def soft_moe(
    values: Float[Tensor, "B N D"],
    token_keys: Float[Tensor, "B N D"],
    slot_keys: Float[Tensor, "*B S D"],
    experts: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "B N"] | None = None,
    slot_mask: Bool[Tensor, "B S"] | None = None,
    *,
    impl: str = "auto",
) -> Float[Tensor, "B N D"]:
    r"""Mix tokens into slots, run the experts on the slots, mix the slots back into tokens.

    $$D = \mathrm{softmax}_n(K \Phi^T) \quad C = \mathrm{softmax}_s(K \Phi^T) \quad Y = C \, f(D^T X)$$

    Args:
        values: what is mixed, X, `[B, N, D]`. Finite at masked tokens too.
        token_keys: the normalised tokens K that the logits are made from, `[B, N, D]`. Finite at masked tokens too.
        slot_keys: the normalised slot parameters $\Phi$, `[S, D]`, or `[B, S, D]` where each sample has its own.
        experts: f, from slots `[B, S, D]` to slots `[B, S, D]`.
        mask: `[B, N]`, True at real tokens. The others feed no slot and get 0.
        slot_mask: `[B, S]`, True at slots that take part. The others read no token and no token reads them.
        impl: "auto" or one of `IMPLEMENTATIONS`. "auto" takes "shared" under `torch.export` and where the N x S logits
            take no more memory than the inputs, (2N + S) D, and "chunked" otherwise: memory is linear in N and S.

    Returns:
        `[B, N, D]` in the dtype of `values`, or in autocast's where that is on. Autocast never lowers float64.

    Raises:
        InvalidArgument, InvalidType: a shape or dtype does not fit, or `impl` is unknown.

    Puigcerver et al., "From Sparse to Soft Mixtures of Experts", 2023, Algorithm 1: https://arxiv.org/abs/2308.00951
    """
    check_tokens("values", values)
    check_tokens("token_keys", token_keys, dim=values.shape[-1])
    check_tokens("slot_keys", slot_keys, dim=values.shape[-1], layout="[S, D]" if slot_keys.ndim == 2 else "[B, S, D]")
    if token_keys.shape != values.shape:
        raise InvalidArgument(
            "token_keys", expected=f"the shape of values, {tuple(values.shape)}", got=tuple(token_keys.shape)
        )
    check_mask("mask", mask, values.shape[:2])
    check_mask("slot_mask", slot_mask, (values.shape[0], slot_keys.shape[-2]), layout="[B, S]")
    # Compiled programs are guarded by what decides, so it decides nothing where an implementation is named.
    auto = _auto(values.shape[1], *slot_keys.shape[-2:]) if impl == "auto" else impl
    run = resolve("soft_moe", impl, IMPLEMENTATIONS, auto=auto)
    return run(values, token_keys, slot_keys, experts, mask, slot_mask)
