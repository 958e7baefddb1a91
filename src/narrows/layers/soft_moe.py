"""Soft mixture of experts as layers: slots that are parameters, or slots made from the tokens; and their experts."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.initialisation import detached_under_no_grad, draw_, reset_submodules
from narrows.ops.recomputation import checkpointed
from narrows.ops.soft_moe import (
    IMPLEMENTATIONS,
    Segments,
    activation,
    combine_weights,
    dispatch_weights,
    segments_in_number,
    segments_of_length,
    soft_moe,
    stacked_feed_forward,
    stacked_linear,
)
from narrows.precision import compute_dtype
from narrows.routing import Routing
from narrows.validation import (
    as_tokens,
    check_choice,
    check_positive,
    check_positive_number,
    check_share,
    checked,
    why_not_plain,
)

STACKED = ("gelu", "geglu")
NORMS = (nn.RMSNorm, nn.LayerNorm)


def _as_rows(slots: Tensor) -> Tensor:
    """Slots `[B, E, P, D]` as rows `[E, B * P, D]`: a view where memory has the order `[B, P, E, D]`."""
    return slots.transpose(0, 1).flatten(1, 2)


def _as_slots(rows: Tensor, slots: Tensor) -> Tensor:
    return rows.unflatten(1, (slots.shape[0], slots.shape[2])).transpose(0, 1)


class StackedLinear(nn.Module):
    """Linear maps of E experts, run as one batched product: expert e has `weight[e]` and `bias[e]`, as `nn.Linear`.

    Args:
        num_experts: E.
        in_features: width of the inputs.
        out_features: width of the outputs.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as `nn.Linear` would for each expert."""
        bound = self.weight.shape[-1] ** -0.5
        draw_(self.weight, partial(nn.init.uniform_, a=-bound, b=bound))
        draw_(self.bias, partial(nn.init.uniform_, a=-bound, b=bound))

    def forward(self, rows: Float[Tensor, "B E P in_features"]) -> Float[Tensor, "B E P out_features"]:
        """Map the rows `[:, e]` by expert e."""
        return _as_slots(stacked_linear(_as_rows(rows), self.weight, self.bias), rows)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x ({in_features} -> {out_features})"


class StackedExperts(nn.Module):
    r"""Feed-forward experts with stacked weights, run as two batched products however many there are.

    $W_2\,\mathrm{GELU}(W_1 x + b_1) + b_2$, or $W_2 (u \cdot \mathrm{GELU}(g)) + b_2$ with $[u, g] = W_1 x + b_1$.

    Args:
        dim: D, width of the slots.
        num_experts: E.
        kind: "gelu", or "geglu", whose first map makes values u and gates g.
        mult: hidden width in multiples of `dim`; a gated expert has 2/3 of it, which is as many parameters.
        dropout: share of hidden values dropped in training.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        kind: str = "gelu",
        mult: float = 4.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_experts=num_experts)
        check_choice("kind", kind, STACKED)
        check_share(dropout=dropout)
        self.gated, self.dropout = kind == "geglu", dropout
        hidden = int(dim * mult * 2 / 3) if self.gated else int(dim * mult)
        if hidden < 1:
            raise InvalidArgument("expert_mult", expected="a multiple of dim that leaves a hidden width", got=mult)
        features = 2 * hidden if self.gated else hidden
        self.expand = StackedLinear(num_experts, dim, features, device=device, dtype=dtype)
        self.contract = StackedLinear(num_experts, hidden, dim, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_open_older_experts)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)

    def forward(self, slots: Float[Tensor, "B E P D"]) -> Float[Tensor, "B E P D"]:
        """Run every expert on its own slots."""
        dropout = self.dropout if self.training else 0.0
        if dropout or why_not_plain(self.named_children(), kinds=(StackedLinear,)):
            return self.contract(F.dropout(activation(self.expand(slots), gated=self.gated), dropout))
        expand, contract = ((linear.weight, linear.bias) for linear in (self.expand, self.contract))
        mapped = stacked_feed_forward(_as_rows(slots), expand, contract, gated=self.gated)
        return _as_slots(mapped, slots)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{'geglu' if self.gated else 'gelu'}, dropout={self.dropout}"


def _open_older_experts(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
    """Weights of older releases: called `weight_in`, `weight_out`, `[out, E, in]`, and `bias_in`, `bias_out`."""
    for side, name in (("in", "expand"), ("out", "contract")):
        if f"{prefix}weight_{side}" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}weight_{side}").transpose(0, 1).contiguous()
        if f"{prefix}bias_{side}" in state:
            state[f"{prefix}{name}.bias"] = state.pop(f"{prefix}bias_{side}")


class ExpertList(nn.ModuleList):
    """Any modules as experts, run one after another: the number of operations grows with their number."""

    def forward(self, slots: Float[Tensor, "B E P D"]) -> Float[Tensor, "B E P D"]:
        """Give expert e the slots `[B, P, D]` that are its own."""
        outputs = [expert(own) for expert, own in zip(self, slots.unbind(1), strict=True)]
        return torch.stack(outputs, dim=2).transpose(1, 2)


def make_experts(
    experts: str | Callable[[int], nn.Module],
    dim: int,
    num_experts: int,
    *,
    mult: float,
    dropout: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StackedExperts | ExpertList:
    """Experts from what a layer's constructor takes: a kind of stacked expert, or a function of the expert's number."""
    if isinstance(experts, str):
        check_choice("experts", experts, STACKED)
        return StackedExperts(dim, num_experts, kind=experts, mult=mult, dropout=dropout, device=device, dtype=dtype)
    if isinstance(experts, nn.Module) or not callable(experts):
        raise InvalidType(
            "experts",
            expected=f"one of {STACKED} or a function from the number of an expert to its module",
            got=type(experts).__name__,
            hint="From a list of modules: experts=modules.__getitem__.",
        )
    check_positive(num_experts=num_experts)
    return ExpertList(experts(index) for index in range(num_experts))


class ScaledRMSNorm(nn.Module):
    r"""RMS-normalised vectors times s / D, with one learned scale s: \(s\, v / (D\, \mathrm{rms}(v))\).

    Their products with RMS-normalised tokens are s times the cosine of the two: the logits of the paper, which has both
    as unit vectors (section 2.3). A zero vector stays zero.

    Args:
        dim: D, width of the vectors.
        eps: added to the mean square.
        device: where the scale is made.
        dtype: of the scale.
    """

    def __init__(
        self, dim: int, *, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.scale)

    def forward(self, vectors: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The normalised vectors, in the dtype of `vectors`."""
        return F.rms_norm(vectors, (self.dim,), (self.scale / self.dim).expand(self.dim), self.eps)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{self.dim}, eps={self.eps}"


def _make_norms(
    normalization: str, dim: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module]:
    """One norm of tokens and one of slots."""
    check_choice("normalization", normalization, ("unit", "rms", "layer"))
    if normalization == "unit":
        eps = 1e-6 / dim
        slots = ScaledRMSNorm(dim, eps=eps, device=device, dtype=dtype)
        return nn.RMSNorm(dim, eps=eps, elementwise_affine=False), slots
    if normalization == "rms":
        make = partial(nn.RMSNorm, dim, eps=1e-12, device=device, dtype=dtype)
    else:
        make = partial(nn.LayerNorm, dim, bias=False, device=device, dtype=dtype)
    return make(), make()


def _open_older_norms(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
    """Norms of older releases: one module `normalization` with a scale, or with two gains."""
    for old, new in (
        ("scale", "norm_slots.scale"),
        ("token_gain", "norm_tokens.weight"),
        ("slot_gain", "norm_slots.weight"),
    ):
        if f"{prefix}normalization.{old}" in state:
            state[f"{prefix}{new}"] = state.pop(f"{prefix}normalization.{old}")


def _normalized_real(
    kind: type[nn.Module], tokens: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """What a norm makes of tokens that are 0 where they are masked."""
    tokens = tokens.masked_fill(~mask[..., None], 0)
    if kind is nn.RMSNorm:
        return F.rms_norm(tokens, tokens.shape[-1:], weight, eps)
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)


class _SoftMixture(nn.Module):
    """What both layers share: norms, experts, and tokens or images in and out.

    Inside, slots lie position by position, `[B, P * E, D]`: in that order the rows of all experts are views of them,
    `[E, B * P, D]`, and nothing is copied on the way to the experts and back. What users see is expert by expert.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        experts: str | Callable[[int], nn.Module],
        expert_mult: float,
        dropout: float,
        normalization: str,
        impl: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_experts=num_experts)
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        self.dim, self.num_experts, self.normalization, self.impl = dim, num_experts, normalization, impl
        self.norm_tokens, self.norm_slots = _make_norms(normalization, dim, device=device, dtype=dtype)
        self.experts = make_experts(
            experts, dim, num_experts, mult=expert_mult, dropout=dropout, device=device, dtype=dtype
        )
        self.register_load_state_dict_pre_hook(_open_older_norms)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
    ) -> Float[Tensor, "B N D"] | Float[Tensor, "B D H W"]:
        """Mix `tokens`, or the pixels of an image, through the experts.

        Args:
            tokens: `[B, N, D]`, or an image `[B, D, H, W]` whose pixels are tokens in rows. Tokens of another dtype
                than the layer's are cast to it.
            mask: `[B, N]` or `[B, H, W]`, True at real tokens.

        Returns:
            The shape and dtype of `tokens`, or autocast's dtype where that is on; 0 at masked tokens.

        Raises:
            InvalidArgument, InvalidType: an argument of the wrong shape or dtype.
        """
        values, token_keys, slot_keys, *masks = self._keys(tokens, mask)
        mixed = soft_moe(values, token_keys, slot_keys, self._run_experts, *masks, impl=self.impl)
        mixed = mixed.to(compute_dtype(tokens))
        return mixed.mT.unflatten(2, tokens.shape[2:]) if tokens.ndim == 4 else mixed

    def _slots(self, values: Tensor, mask: Tensor | None) -> Segments:
        """Slot parameters `[..., P * E, D]`, and which of them take part."""
        raise NotImplementedError

    def _keys(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What is mixed; and what weights are made from: keys of tokens and slots, and the masks of both."""
        tokens, mask, _ = as_tokens(tokens, mask, dim=self.dim)
        dtype = next(self.parameters()).dtype
        tokens, norm, unit = tokens.to(dtype), self.norm_tokens, self.normalization == "unit"
        compiling = torch.compiler.is_compiling()
        if mask is None or unit or compiling or why_not_plain((("norm_tokens", norm),), kinds=NORMS):
            tokens = tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)
            token_keys = norm(tokens)
        else:  # The norm would keep for backward what is 0 where it is masked, beside the tokens that came.
            parameters = norm.weight, getattr(norm, "bias", None), norm.eps
            token_keys = checkpointed(_normalized_real, type(norm), tokens, mask, *parameters)
        # The paper mixes the tokens themselves; the other normalisations are upstream's, which mixes normalised ones.
        values = tokens if unit else token_keys
        slots, slot_mask = self._slots(values, mask)
        return values, token_keys, self.norm_slots(slots.to(dtype)), mask, slot_mask

    def _run_experts(self, slots: Tensor) -> Tensor:
        """Slots and outputs `[B, P * E, D]`; experts take them as `[B, E, P, D]`."""
        slots = slots.unflatten(1, (-1, self.num_experts)).transpose(1, 2)
        return self.experts(slots).transpose(1, 2).flatten(1, 2)

    def _expert_by_expert(self, weights: Tensor) -> Tensor:
        """Weights `[B, N, P * E]` as `[B, N, E * P]`."""
        return weights.unflatten(-1, (-1, self.num_experts)).transpose(-1, -2).flatten(-2)

    def routing(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
    ) -> Routing:
        """The dispatch weights, `[B, 1, E * P, N]` expert by expert: what each slot reads, 1 in sum over the tokens."""
        weights = self._expert_by_expert(dispatch_weights(*self._keys(tokens, mask)[1:]))
        grid = (tokens.shape[2], tokens.shape[3]) if tokens.ndim == 4 else None
        return Routing(weights.mT[:, None], carriers="expert slots", grid=grid)

    def combine_weights(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
    ) -> Float[Tensor, "B N S"]:
        """How much of each slot, expert by expert, a token or pixel reads: 1 in sum over the slots, 0 if masked.

        Takes what `forward` takes; pixels are in rows. With the dispatch weights of `routing` it is the whole mixture.
        """
        return self._expert_by_expert(combine_weights(*self._keys(tokens, mask)[1:]))

    def expert_shares(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
    ) -> Float[Tensor, "B N E"]:
        """How much of each expert a token or pixel reads: its combine weights, summed over the slots of the expert.

        1 in sum over the experts, 0 if masked. The mean over the tokens is how much an expert is used.
        """
        return self.combine_weights(tokens, mask).unflatten(-1, (self.num_experts, -1)).sum(-1)


class SoftMoE(_SoftMixture):
    r"""Every expert reads a few weighted means of the tokens; every token reads a weighted mean of their outputs.

    \[ L = \hat X (s \hat\Phi)^T, \quad Y = \mathrm{softmax}_{slots}(L) \; f(\mathrm{softmax}_{tokens}(L)^T X) \]

    with unit vectors \(\hat X, \hat\Phi\) and one learned scale s. Permuting the tokens permutes the outputs. Cost and
    memory are linear in the number of tokens, of which there may be any.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        slots_per_expert: P, at least 1. `for_tokens` chooses it by capacity.
        experts: "gelu" or "geglu", which run as batched products whose number does not grow with E; or a function from
            the number of an expert to any module from `[B, P, D]` to `[B, P, D]`, which run one after another.
        expert_mult: hidden width of "gelu" experts in multiples of `dim`; "geglu" experts have 2/3 of it.
        dropout: share of hidden values that "gelu" and "geglu" experts drop in training.
        normalization: "unit" is the paper's. "rms" and "layer" are those of soft-moe-pytorch, which mix normalised
            tokens and make logits so large that the softmax starts nearly one-hot.
        impl: "auto", "reference", "shared" or "chunked".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.soft_moe import SoftMoE
    >>> SoftMoE(64, num_experts=8, slots_per_expert=4)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])

    Puigcerver et al., "From Sparse to Soft Mixtures of Experts", 2023: https://arxiv.org/abs/2308.00951
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        slots_per_expert: int = 1,
        experts: str | Callable[[int], nn.Module] = "gelu",
        expert_mult: float = 4.0,
        dropout: float = 0.0,
        normalization: str = "unit",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, experts, expert_mult, dropout, normalization, impl, device, dtype)
        check_positive(slots_per_expert=slots_per_expert)
        self.slots = nn.Parameter(torch.empty(num_experts, slots_per_expert, dim, device=device, dtype=dtype))
        self._draw()

    @classmethod
    def for_tokens(
        cls, dim: int, *, num_tokens: int, num_experts: int, capacity_factor: float = 1.0, **options: object
    ) -> "SoftMoE":
        """The layer with `capacity_factor` slots for each of the `num_tokens` tokens that are expected.

        Each expert gets `ceil(capacity_factor * num_tokens / num_experts)` slots, so at least one. The layer takes any
        other number of tokens as well; its slots stay as many.
        """
        check_positive(num_tokens=num_tokens, num_experts=num_experts)
        check_positive_number(capacity_factor=capacity_factor)
        slots_per_expert = math.ceil(capacity_factor * num_tokens / num_experts)
        return cls(dim, num_experts=num_experts, slots_per_expert=slots_per_expert, **options)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw all parameters anew: slot parameters of length about 1."""
        super().reset_parameters()
        self._draw()

    def _draw(self) -> None:
        draw_(self.slots, partial(nn.init.normal_, std=self.dim**-0.5))

    def _slots(self, values: Tensor, mask: Tensor | None) -> Segments:
        slots = detached_under_no_grad(self.slots)  # cat: its gradient lies in memory as the parameter does
        return Segments(slots.flatten(0, 1) if slots.shape[1] == 1 else torch.cat(slots.unbind(1)), None)


class DynamicSlotsSoftMoE(_SoftMixture):
    r"""A soft mixture of experts whose slots follow the tokens: each is made from the mean of consecutive tokens.

    \[ \Phi_{e,p} = W_e \, \mathrm{mean}(X_{segment\ p}), \quad \text{then as in `SoftMoE`} \]

    Segments are counted over the real tokens of each sample, as if the masked ones were not there, so that a padded
    sample gets what it gets alone. By default a segment has `round(num_experts / capacity_factor)` tokens and at least
    1, the last one what is left: n tokens make about `capacity_factor * n` slots in all and at least one for each
    expert, and cost grows with the square of n. With `slots_per_expert` there are that many even segments (the windows
    of adaptive average pooling) however many tokens there are, and cost is linear. The order of the tokens matters.

    Args:
        dim: D, width of the tokens.
        num_experts: E.
        slots_per_expert: a fixed number of segments, or None to let it follow the number of tokens.
        capacity_factor: slots for each token, where `slots_per_expert` is None; 1 if None.
        experts: as in `SoftMoE`.
        expert_mult: as in `SoftMoE`.
        dropout: as in `SoftMoE`.
        normalization: as in `SoftMoE`.
        impl: "auto", "reference", "shared" or "chunked".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.soft_moe import DynamicSlotsSoftMoE
    >>> DynamicSlotsSoftMoE(64, num_experts=4)(torch.randn(2, 64, 7, 9)).shape
    torch.Size([2, 64, 7, 9])

    https://arxiv.org/abs/2308.00951
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        slots_per_expert: int | None = None,
        capacity_factor: float | None = None,
        experts: str | Callable[[int], nn.Module] = "gelu",
        expert_mult: float = 4.0,
        dropout: float = 0.0,
        normalization: str = "unit",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, experts, expert_mult, dropout, normalization, impl, device, dtype)
        if slots_per_expert is not None:
            check_positive(slots_per_expert=slots_per_expert)
            if capacity_factor is not None:
                raise InvalidArgument(
                    "capacity_factor", expected="None where slots_per_expert is given", got=capacity_factor
                )
        capacity_factor = 1.0 if capacity_factor is None else capacity_factor
        check_positive_number(capacity_factor=capacity_factor)
        self.slots_per_expert = slots_per_expert
        self.segment_length = max(1, round(num_experts / capacity_factor))
        self.to_slots = nn.Linear(dim, num_experts * dim, bias=False, device=device, dtype=dtype)

    def _slots(self, values: Tensor, mask: Tensor | None) -> Segments:
        if self.slots_per_expert is None:
            means, means_mask = segments_of_length(values, self.segment_length, mask)
        else:
            means, means_mask = segments_in_number(values, self.slots_per_expert, mask)
        slots = self.to_slots(means).unflatten(-1, (self.num_experts, self.dim)).flatten(1, 2)
        slot_mask = None if means_mask is None else means_mask.repeat_interleave(self.num_experts, dim=1)
        return Segments(slots, slot_mask)
