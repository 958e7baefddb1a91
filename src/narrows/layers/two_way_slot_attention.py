"""Two-way slot attention as a layer."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.layers.slot_attention import FeedForward, GaussianSlots, affine, gru_weights, reset_like_keras
from narrows.ops.two_way_slot_attention import (
    Exchange,
    TwoWaySlotAttentionResult,
    TwoWaySlotAttentionWeights,
    two_way_slot_attention,
)
from narrows.routing import Routing
from narrows.validation import check_choice, check_mask, check_positive, check_tokens


class TwoWaySlotAttentionOutput(NamedTuple):
    """Slots and tokens after they have read each other.

    Args:
        slots: `[B, K, S]`.
        tokens: `[B, N, D]`, 0 at masked tokens.
        attention: `[B, K, N]`, how each token is divided among the slots when they read for the last time: sums to 1
            over the slots (0 at masked tokens). These are the masks that are drawn and scored.
    """

    slots: Float[Tensor, "B K S"]
    tokens: Float[Tensor, "B N D"]
    attention: Float[Tensor, "B K N"]


class TwoWaySlotAttention(nn.Module):
    r"""Slots read tokens and tokens read slots, gated by recurrent cells, every iteration.

    Slots read with \((A + \epsilon) / \sum_{tokens} (A + \epsilon)\), \(A\) the softmax over the slots, as in slot
    attention; tokens read with the softmax over the slots of their own logits, so that each reads a mean of the slots
    whatever N is. Each side then takes up what it read through a gated recurrent cell, and what its MLP makes of that
    through another.

    The initial slots are Gaussian noise around one learned mean, in training and in evaluation alike. Give `slots` or
    a `generator` for a result that can be repeated.

    Slots are kept in float32 (or float64) inside, tokens in their own dtype, which may differ from the layer's. Slots
    and attention come out in the dtype of the layer's parameters, tokens in that of the tokens.

    Args:
        dim: D, width of the tokens.
        num_slots: K, unless a call says otherwise; no parameter depends on it.
        num_iterations: T.
        slot_dim: S, width of the slots; `dim` if None.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_dim: hidden width of both MLPs; the larger of 128 and the width of the side if None.
        token_normalization: over what the weights sum to 1 with which tokens read slots. "slots": each token reads a
            mean of the slots. "tokens": as upstream's SlotAttentionExperimental, each slot is divided among all
            tokens, so that what a token reads vanishes as 1/N.
        eps: added to attention that is averaged over tokens.
        impl: "auto", "reference" or "absorbed".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
    >>> slots, tokens, attention = TwoWaySlotAttention(64, num_slots=5)(torch.randn(2, 100, 64))
    >>> slots.shape, tokens.shape, attention.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 100, 64]), torch.Size([2, 5, 100]))
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int,
        num_iterations: int = 3,
        slot_dim: int | None = None,
        qkv_bias: bool = False,
        mlp_dim: int | None = None,
        token_normalization: str = "slots",
        eps: float = 1e-8,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        slot_dim = dim if slot_dim is None else slot_dim
        check_positive(dim=dim, num_iterations=num_iterations, slot_dim=slot_dim)
        check_choice("token_normalization", token_normalization, ("slots", "tokens"))
        self.num_iterations, self.token_normalization = num_iterations, token_normalization
        self.eps, self.impl = eps, impl
        self.initial_slots = GaussianSlots(num_slots, slot_dim, device=device, dtype=dtype)
        self.norm_tokens = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.slots_read = _Exchange(slot_dim, dim, qkv_bias, mlp_dim, device=device, dtype=dtype)
        self.tokens_read = _Exchange(dim, slot_dim, qkv_bias, mlp_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as for slot attention: Glorot, recurrent weights orthogonal, biases 0."""
        self.initial_slots.reset_parameters()
        reset_like_keras(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TwoWaySlotAttentionOutput:
        """Let slots and tokens read each other.

        Args:
            tokens: `[B, N, D]`.
            mask: `[B, N]`, True at real tokens. The slots of a sample without any have read zeros.
            slots: initial slots, `[B, K, S]`; drawn if None.
            num_slots: K of this call.
            generator: draws the initial slots' noise, one normal sample `[B, K, S]`; torch's global one if None.

        Returns:
            The slots, the tokens, and the slots' masks.

        Raises:
            InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
        """
        return TwoWaySlotAttentionOutput(*self._attend(tokens, mask, slots, num_slots, generator))

    def routing(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The attention with which the slots read for the last time, for the arguments of `forward`."""
        return Routing(self._attend(tokens, mask, slots, num_slots, generator).attention[:, None], carriers="slots")

    def _attend(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        slots: Tensor | None,
        num_slots: int | None,
        generator: torch.Generator | None,
    ) -> TwoWaySlotAttentionResult:
        check_tokens("tokens", tokens, dim=self.tokens_read.to_q.in_features)
        check_mask("mask", mask, tokens.shape[:2])
        return two_way_slot_attention(
            tokens,
            self.initial_slots(tokens.shape[0], slots, num_slots, generator),
            TwoWaySlotAttentionWeights(affine(self.norm_tokens), self.slots_read.weights(), self.tokens_read.weights()),
            mask,
            num_iterations=self.num_iterations,
            token_normalization=self.token_normalization,
            eps=self.eps,
            impl=self.impl,
        )


class _Exchange(nn.Module):
    """Parameters with which readers of width `dim` read rows of width `read_dim` and update themselves."""

    def __init__(
        self,
        dim: int,
        read_dim: int,
        qkv_bias: bool,
        mlp_dim: int | None,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.norm_readers = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm_read = nn.LayerNorm(read_dim, device=device, dtype=dtype)
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_k = nn.Linear(read_dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_v = nn.Linear(read_dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.gru = nn.GRUCell(dim, dim, device=device, dtype=dtype)
        self.mlp = FeedForward(dim, mlp_dim, device=device, dtype=dtype)
        self.mlp_gru = nn.GRUCell(dim, dim, device=device, dtype=dtype)

    def weights(self) -> Exchange:
        """What operations take."""
        return Exchange(
            norm_readers=affine(self.norm_readers),
            norm_read=affine(self.norm_read),
            query=affine(self.to_q),
            key=affine(self.to_k),
            value=affine(self.to_v),
            gru=gru_weights(self.gru),
            mlp=self.mlp.weights(),
            mlp_gru=gru_weights(self.mlp_gru),
        )
