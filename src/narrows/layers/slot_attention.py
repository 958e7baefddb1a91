"""Slot attention as a layer."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import for_each_sample
from narrows.ops.slot_attention import (
    GRU,
    MLP,
    Affine,
    SlotAttentionResult,
    SlotAttentionWeights,
    slot_attention,
)
from narrows.routing import Routing
from narrows.validation import check_mask, check_positive, check_tokens


class SlotAttentionOutput(NamedTuple):
    """Slots and the masks they stand for.

    Args:
        slots: `[B, K, S]`.
        attention: `[B, K, N]`, how each token is divided among the slots in the last iteration: not negative, sums to
            1 over the slots (0 at masked tokens). These are the masks that are drawn and scored; the average over
            tokens that made the slots divides each row by its sum. Heads are averaged, or, under one joint softmax,
            added.
    """

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B K N"]


class SlotAttention(nn.Module):
    r"""Slots that compete for tokens and bind to objects (Locatello et al., Algorithm 1).

    \[ A = \mathrm{softmax}_{slots}(E^{-1/2} q(s) k(x)^T), \quad
       u_k = \sum_n \frac{A_{kn} + \epsilon}{\sum_m A_{km} + \epsilon} v(x_n), \quad
       s \leftarrow h + \mathrm{MLP}(h), \; h = \mathrm{GRU}(u, s) \]

    The initial slots are Gaussian noise around one learned mean, in training and in evaluation alike: the published
    exception to determinism. Give `slots` or a `generator` for a result that can be repeated.

    Slots live in float32 (or float64) inside, whatever the dtype of the layer and of the tokens, which may differ:
    features cached in bfloat16 can be read by a float32 layer. Results have the dtype of the layer's parameters.

    Args:
        dim: D, width of the tokens.
        num_slots: K, unless a call says otherwise; no parameter depends on it.
        num_iterations: T.
        slot_dim: S, width of the slots; `dim` if None.
        heads: H.
        head_dim: E, width of a head. None: heads of `slot_dim / heads`, concatenated, as in the published forms. Given:
            heads of that width and a linear map from all of them back to the slots.
        joint_heads: one softmax over slots and heads together (SLATE, SPOT), rather than one per head (SAVi).
        qkv_bias: whether queries, keys, values and the map after the heads have a bias.
        mlp_dim: hidden width of the residual MLP; the larger of 128 and `slot_dim` if None.
        eps: added to the attention before it is averaged over tokens.
        initial_slots: how slots begin where a call gives none, `GaussianSlots` if None; `LearnedSlots` are
            deterministic. Any module with their call will do.
        impl: "auto", "reference" or "absorbed".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.slot_attention import SlotAttention
    >>> slots, attention = SlotAttention(384, num_slots=7, slot_dim=256)(torch.randn(2, 196, 384))
    >>> slots.shape, attention.shape
    (torch.Size([2, 7, 256]), torch.Size([2, 7, 196]))

    https://arxiv.org/abs/2006.15055
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int,
        num_iterations: int = 3,
        slot_dim: int | None = None,
        heads: int = 1,
        head_dim: int | None = None,
        joint_heads: bool = False,
        qkv_bias: bool = False,
        mlp_dim: int | None = None,
        eps: float = 1e-8,
        initial_slots: nn.Module | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        slot_dim = dim if slot_dim is None else slot_dim
        check_positive(dim=dim, num_iterations=num_iterations, slot_dim=slot_dim, heads=heads)
        if head_dim is None and slot_dim % heads:
            raise InvalidArgument(
                "heads", expected=f"a divisor of slot_dim = {slot_dim}", got=heads, hint="Or give head_dim."
            )
        read_dim = slot_dim if head_dim is None else heads * head_dim
        check_positive(head_dim=read_dim // heads)
        self.num_iterations, self.heads, self.joint_heads = num_iterations, heads, joint_heads
        self.eps, self.impl = eps, impl
        self.initial_slots = initial_slots or GaussianSlots(num_slots, slot_dim, device=device, dtype=dtype)
        self.norm_tokens = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm_slots = nn.LayerNorm(slot_dim, device=device, dtype=dtype)
        self.to_q = nn.Linear(slot_dim, read_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_k = nn.Linear(dim, read_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_v = nn.Linear(dim, read_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_out = (
            None if head_dim is None else nn.Linear(read_dim, slot_dim, bias=qkv_bias, device=device, dtype=dtype)
        )
        update_dim = read_dim if head_dim is None else slot_dim
        self.gru = nn.GRUCell(update_dim, slot_dim, device=device, dtype=dtype)
        self.mlp = FeedForward(slot_dim, mlp_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters the way the published code does: Glorot, recurrent weights orthogonal, biases 0."""
        if isinstance(self.initial_slots, GaussianSlots | LearnedSlots):
            self.initial_slots.reset_parameters()
        reset_like_keras(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SlotAttentionOutput:
        """Let the slots compete for `tokens`.

        Args:
            tokens: `[B, N, D]`.
            mask: `[B, N]`, True at real tokens. A sample without any has read zeros.
            slots: initial slots, `[B, K, S]`; drawn if None.
            num_slots: K of this call.
            generator: draws the initial slots' noise, one normal sample `[B, K, S]`; torch's global one if None.

        Returns:
            The slots and their masks.

        Raises:
            InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
        """
        slots, attention = self._attend(tokens, mask, slots, num_slots, generator)
        return SlotAttentionOutput(slots, attention.sum(1) if self.joint_heads else attention.mean(1))

    def routing(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The last iteration's attention in every head, for the arguments of `forward`.

        Sums to 1 over the slots in each head, or over slots and heads under one joint softmax.
        """
        return Routing(self._attend(tokens, mask, slots, num_slots, generator).attention, carriers="slots")

    def _attend(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        slots: Tensor | None,
        num_slots: int | None,
        generator: torch.Generator | None,
    ) -> SlotAttentionResult:
        check_tokens("tokens", tokens, dim=self.to_k.in_features)
        check_mask("mask", mask, tokens.shape[:2])
        return slot_attention(
            tokens,
            self.initial_slots(tokens.shape[0], slots, num_slots, generator),
            self._weights(),
            mask,
            num_iterations=self.num_iterations,
            heads=self.heads,
            joint_heads=self.joint_heads,
            eps=self.eps,
            impl=self.impl,
        )

    def _weights(self) -> SlotAttentionWeights:
        return SlotAttentionWeights(
            norm_tokens=affine(self.norm_tokens),
            norm_slots=affine(self.norm_slots),
            query=affine(self.to_q),
            key=affine(self.to_k),
            value=affine(self.to_v),
            output=None if self.to_out is None else affine(self.to_out),
            gru=gru_weights(self.gru),
            mlp=self.mlp.weights(),
        )


class GaussianSlots(nn.Module):
    """Initial slots drawn around one mean that all slots share: `mean + exp(log_scale) * noise`.

    Args:
        num_slots: K, unless a call says otherwise.
        slot_dim: S.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_slots=num_slots, slot_dim=slot_dim)
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.empty(slot_dim, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(slot_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot, of the shape `[1, S]` the published code gives both parameters."""
        bound = (6 / (1 + self.mean.shape[0])) ** 0.5
        nn.init.uniform_(self.mean, -bound, bound)
        nn.init.uniform_(self.log_scale, -bound, bound)

    def forward(
        self,
        batch: int,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B K S"]:
        """Given `slots` in the dtype of the parameters, or fresh ones from one normal sample `[B, K, S]`.

        The sample is drawn in float32 whatever the dtype, so that one seed gives the same slots in every precision.
        """
        if slots is not None:
            return _given(slots, num_slots, like=self.mean)
        num_slots = self.num_slots if num_slots is None else num_slots
        check_positive(num_slots=num_slots)
        # Not torch.randn(generator=...): that overload does not export with a symbolic batch.
        noise = torch.empty(batch, num_slots, *self.mean.shape, device=self.mean.device, dtype=torch.float32)
        noise = noise.normal_(generator=generator)
        return self.mean + self.log_scale.exp() * noise.to(self.mean.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_slots={self.num_slots}, slot_dim={self.mean.shape[0]}"


class LearnedSlots(nn.Module):
    """Initial slots that are parameters, one for each slot: the same for every sample, and deterministic.

    A call that asks for another number of slots than were learned is an error. (BO-QSA, arXiv 2210.08990.)

    Args:
        num_slots: K.
        slot_dim: S.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_slots=num_slots, slot_dim=slot_dim)
        self.slots = nn.Parameter(torch.empty(num_slots, slot_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal sample: slots that start alike would stay alike."""
        nn.init.normal_(self.slots)

    def forward(
        self,
        batch: int,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B K S"]:
        """Given `slots` in the dtype of the parameters, or the learned ones; nothing is drawn."""
        if slots is not None:
            return _given(slots, num_slots, like=self.slots)
        if num_slots not in (None, self.slots.shape[0]):
            raise InvalidArgument("num_slots", expected=f"None or the {self.slots.shape[0]} learned", got=num_slots)
        return for_each_sample(self.slots, batch)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_slots={self.slots.shape[0]}, slot_dim={self.slots.shape[1]}"


def _given(slots: Tensor, num_slots: int | None, *, like: Tensor) -> Tensor:
    """Slots a call brings, checked, in the dtype of the parameter `like`."""
    check_tokens("slots", slots, dim=like.shape[-1], layout="[B, K, S]")
    if num_slots not in (None, slots.shape[1]):
        raise InvalidArgument("num_slots", expected=f"None or the {slots.shape[1]} slots given", got=num_slots)
    return slots.to(like.dtype)


class FeedForward(nn.Module):
    """Parameters of LayerNorm, linear, ReLU, linear.

    Args:
        dim: width of input and output.
        hidden_dim: width between; the larger of 128 and `dim` if None.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = max(128, dim) if hidden_dim is None else hidden_dim
        check_positive(mlp_dim=hidden_dim)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.expand = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.contract = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def weights(self) -> MLP:
        """What operations take."""
        return MLP(affine(self.norm), affine(self.expand), affine(self.contract))


def affine(module: nn.Linear | nn.LayerNorm) -> Affine:
    """The tensors of a linear layer or LayerNorm, as operations take them."""
    return Affine(module.weight, module.bias)


def gru_weights(cell: nn.GRUCell) -> GRU:
    """The tensors of a recurrent cell, as operations take them."""
    return GRU(Affine(cell.weight_ih, cell.bias_ih), Affine(cell.weight_hh, cell.bias_hh))


def reset_like_keras(module: nn.Module) -> None:
    """Initialise every linear map, recurrent cell and LayerNorm inside with the defaults of the published code."""
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            child.reset_parameters()
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        if isinstance(child, nn.GRUCell):
            nn.init.xavier_uniform_(child.weight_ih)
            nn.init.orthogonal_(child.weight_hh)
            nn.init.zeros_(child.bias_ih)
            nn.init.zeros_(child.bias_hh)
