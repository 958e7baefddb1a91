"""How slots read normalised tokens they never project: the inner step of the fast forms."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from narrows.ops.slot_attention.common import compete, mean_weights


def read(
    readers: Float[Tensor, "B H K D"],
    offsets: Float[Tensor, "B H K"],
    tokens: Float[Tensor, "B N D"],
    mask: Bool[Tensor, "B N"] | None,
    *,
    joint_heads: bool = False,
    eps: float,
) -> tuple[Float[Tensor, "B H K D"], Float[Tensor, "B H K N"]]:
    r"""Softmax over the slots of `readers . tokens + offsets`, and the mean of the tokens under it.

    Products with tokens run in the dtype of `tokens`, everything else in that of `readers`. Twice differentiable.

    Returns:
        The means, and the attention they were taken with.
    """
    mixed, attention = _Read.apply(readers, offsets, tokens, mask, joint_heads, eps)  # pyright: ignore[reportGeneralTypeIssues]
    return mixed, attention


class _Read(torch.autograd.Function):
    """The gradient of the tokens, which autograd would sum from two products, comes from one.

    Per slot, with s the shares, g the gradient of the means m and A the attention before it is averaged:

        dA = (g . x - g . m) / sum A,   dL = softmax'(dA),   dx = [dL; s]^T [readers; g]

    Saved are the attention and nothing else that grows with N.
    """

    @staticmethod
    def forward(
        readers: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor | None, joint_heads: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        logits = _over_tokens(readers, tokens) + offsets[..., None]
        attention = compete(logits, mask, joint_heads=joint_heads)
        shares, _ = mean_weights(attention, mask, eps)
        return _through_tokens(shares, tokens), attention

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        readers, _, tokens, mask, ctx.joint_heads, ctx.eps = inputs
        ctx.save_for_backward(readers, tokens, mask, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed, grad_attention = gradients
        readers, tokens, mask, mixed, attention = ctx.saved_tensors
        shares, total = mean_weights(attention, mask, ctx.eps)
        centred = _over_tokens(grad_mixed, tokens) - (grad_mixed * mixed).sum(-1, keepdim=True)
        product = attention * (centred / total + grad_attention)
        axes = (1, 2) if ctx.joint_heads else (2,)
        grad_logits = product - attention * product.sum(axes, keepdim=True)
        left = torch.cat([grad_logits, shares], 1).flatten(1, 2).to(tokens.dtype)
        right = torch.cat([readers, grad_mixed], 1).flatten(1, 2).to(tokens.dtype)
        return _through_tokens(grad_logits, tokens), grad_logits.sum(-1), left.mT @ right, None, None, None


def _over_tokens(rows: Float[Tensor, "B H K D"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B H K N"]:
    products = rows.flatten(1, 2).to(tokens.dtype) @ tokens.mT
    return products.to(rows.dtype).unflatten(1, rows.shape[1:3])


def _through_tokens(shares: Float[Tensor, "B H K N"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B H K D"]:
    products = shares.flatten(1, 2).to(tokens.dtype) @ tokens
    return products.to(shares.dtype).unflatten(1, shares.shape[1:3])
