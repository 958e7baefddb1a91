"""Two-way slot attention as a layer."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import ImplementationUnavailable
from narrows.layers.initialisation import reset_like_keras
from narrows.layers.slot_attention import (
    IMPLEMENTATIONS,
    AbsorbedProjections,
    FeedForward,
    fold_norm,
    make_initial_slots,
    normalized,
    plain_weights,
    recurrent_step,
    reset_initial_slots,
    starting_slots,
)
from narrows.ops.recomputation import checkpointed
from narrows.ops.slot_attention import (
    Cell,
    Reading,
    TokenUpdate,
    TwoWaySettings,
    Weights,
    iterate_both,
    read_slots,
    slot_attention,
    update_tokens,
    why_no_kernels,
    why_not_two_way,
)
from narrows.precision import at_least_float32, autocast_off, compute_dtype
from narrows.routing import Routing
from narrows.validation import (
    as_tokens,
    check_choice,
    check_not_negative,
    check_positive,
    check_positive_number,
    checked,
    why_not_plain,
)


class TwoWaySlotAttentionOutput(NamedTuple):
    """Slots and tokens after they have read each other.

    Args:
        slots: `[B, K, S]`, 0 at masked slots.
        tokens: `[B, N, D]` or `[B, D, H, W]`, as they came; 0 at masked tokens.
        attention: `[B, K, N]`, how each token is divided among the slots when they read for the last time: sums to 1
            over the slots (0 at masked tokens). These are the masks that are drawn and scored.
    """

    slots: Float[Tensor, "B K S"]
    tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"]
    attention: Float[Tensor, "B K N"]


class TwoWaySlotAttention(nn.Module):
    r"""Slots read tokens and tokens read slots, each gated by recurrent cells, in every iteration.

    \[ r \leftarrow \mathrm{GRU}(P\, v(R), r), \quad r \leftarrow \mathrm{GRU}'(\mathrm{MLP}(r), r) \]

    with rows \(R\) read by readers \(r\). Slots read with \(P = (A + \epsilon) / \sum_{tokens} (A + \epsilon)\), as in
    slot attention, and tokens with \(P = A\), so that each reads a mean of the slots whatever N is; \(A\) is the
    softmax over the slots of each direction's own logits.

    The initial slots are Gaussian noise around one learned mean, in training and in evaluation alike. Give `slots` or
    a `generator` for a result that can be repeated.

    Tokens may have another floating dtype than the layer, as cached features do: they are converted to the layer's.
    Slots and attention come out in that of the layer, tokens in their own.

    Args:
        dim: D, width of the tokens.
        num_slots: K, unless a call says otherwise; no parameter depends on it. May be left out where `initial_slots`
            are given, and must be their number otherwise.
        num_iterations: T, unless a call says otherwise.
        slot_dim: S, width of the slots; `dim` if None.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_dim: hidden width of both MLPs; the larger of 128 and the width of the side if None.
        token_normalization: over what the weights sum to 1 with which tokens read slots. "slots": each token reads a
            mean of the slots. "tokens": as upstream's SlotAttentionExperimental, each slot is divided among all
            tokens, so that what a token reads vanishes as 1/N.
        eps: added to attention that is averaged over tokens.
        initial_slots: how slots begin where a call gives none, as in `SlotAttention`.
        impl: "reference" (attention in float32 or better), "mixed" (products in the layer's dtype, sums in float32 or
            better), "absorbed" (tokens are not projected, and products of what they read with the gates are taken on
            the side of the slots; only where the modules that it folds are plain), "triton" (the same in kernels for
            CUDA, where all modules are plain), or "auto".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.two_way_slot_attention import TwoWaySlotAttention
    >>> slots, tokens, attention = TwoWaySlotAttention(64, num_slots=5)(torch.randn(2, 100, 64))
    >>> slots.shape, tokens.shape, attention.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 100, 64]), torch.Size([2, 5, 100]))
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        num_slots: int | None = None,
        num_iterations: int = 3,
        slot_dim: int | None = None,
        qkv_bias: bool = False,
        mlp_dim: int | None = None,
        token_normalization: str = "slots",
        eps: float = 1e-8,
        initial_slots: nn.Module | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        slot_dim = dim if slot_dim is None else slot_dim
        check_positive(dim=dim, num_iterations=num_iterations, slot_dim=slot_dim)
        check_not_negative(eps=eps)
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS, "triton"))
        dim, num_iterations, slot_dim = int(dim), int(num_iterations), int(slot_dim)
        check_choice("token_normalization", token_normalization, ("slots", "tokens"))
        self.dim, self.num_iterations, self.token_normalization = dim, num_iterations, token_normalization
        self.eps, self.impl = eps, impl
        self.initial_slots = make_initial_slots(initial_slots, num_slots, slot_dim, device=device, dtype=dtype)
        self.norm_tokens = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.slots_read = _Reading(slot_dim, dim, qkv_bias, mlp_dim, device=device, dtype=dtype)
        self.tokens_read = _Reading(dim, slot_dim, qkv_bias, mlp_dim, device=device, dtype=dtype)
        reset_like_keras(self)

    def reset_parameters(self) -> None:
        """Draw new parameters as for slot attention: Glorot, recurrent weights orthogonal, biases 0."""
        reset_initial_slots(self.initial_slots)
        reset_like_keras(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
        *,
        num_iterations: int | None = None,
        slot_mask: Bool[Tensor, "B K"] | None = None,
        temperature: float = 1.0,
    ) -> TwoWaySlotAttentionOutput:
        """Let slots and tokens read each other.

        Args:
            tokens: `[B, N, D]`, or an image `[B, D, H, W]` whose pixels are tokens, row by row.
            mask: `[B, N]` or `[B, H, W]`, True at real tokens. The slots of a sample without any have read zeros.
            slots: initial slots, `[B, K, S]`; drawn if None.
            num_slots: K of this call.
            generator: draws the initial slots' noise, one normal sample `[B, K, S]`; torch's global one if None.
                `torch.compile(fullgraph=True)` cannot trace one: draw before, with `layer.initial_slots(batch,
                generator=generator)`, and give `slots`.
            num_iterations: T of this call.
            slot_mask: `[B, K]`, True at real slots. The others take no part and come out as 0: a sample gets what it
                gets with its real slots alone. Tokens of a sample without any read zeros.
            temperature: divides the logits of both softmaxes.

        Returns:
            The slots, the tokens, and the slots' masks.

        Raises:
            InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
            ImplementationUnavailable: `impl="absorbed"` where a module that it folds is not plain.
        """
        output, grid = self._exchange(tokens, mask, slots, num_slots, generator, num_iterations, slot_mask, temperature)
        return output if grid is None else output._replace(tokens=output.tokens.mT.unflatten(2, grid))

    def routing(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        mask: Bool[Tensor, "B N"] | Bool[Tensor, "B H W"] | None = None,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
        *,
        num_iterations: int | None = None,
        slot_mask: Bool[Tensor, "B K"] | None = None,
        temperature: float = 1.0,
    ) -> Routing:
        """The attention with which the slots read for the last time, for the arguments of `forward`.

        It is `forward`'s own only from the same initial slots: give both the same `slots`, or a `generator` in the same
        state; otherwise each draws its own noise. An image gives a routing on the image's grid.
        """
        output, grid = self._exchange(tokens, mask, slots, num_slots, generator, num_iterations, slot_mask, temperature)
        return Routing(output.attention[:, None], carriers="slots", grid=grid)

    def implementation(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
    ) -> str:
        """Which of "reference", "mixed", "absorbed" and "triton" `forward` takes for these arguments.

        "auto" takes "triton" for float16 and bfloat16 on a CUDA device where it can run, and otherwise "absorbed" where
        it can, which is the least work and memory in plain operations; and "mixed" where a module must be called. In
        float32 cells and MLP of all tokens are products that PyTorch's library does faster than kernels without tensor
        cores. `torch.export` takes no "triton" that is not asked for by name.

        Raises:
            ImplementationUnavailable: `impl="absorbed"` where a module that it folds is not plain; `impl="triton"`
                where a module is not plain, or kernels cannot take these arguments.
        """
        check_choice("impl", self.impl, ("auto", *IMPLEMENTATIONS, "triton"))
        if self.impl in ("reference", "mixed"):
            return self.impl
        if self.impl == "auto":
            low = compute_dtype(self.tokens_read.gru.weight_hh) in (torch.float16, torch.bfloat16)
            on_gpu = tokens.is_cuda and low and not torch.compiler.is_exporting()
            if on_gpu and self._why_not_triton(tokens, slots, num_slots) is None:
                return "triton"
            return "absorbed" if self._why_not_folded() is None else "mixed"
        if self.impl == "triton":
            reason = why_no_kernels() or self._why_not_triton(tokens, slots, num_slots)
        else:
            reason = self._why_not_folded()
        if reason is None:
            return self.impl
        raise ImplementationUnavailable(
            f"TwoWaySlotAttention: impl={self.impl!r} cannot run here: {reason}. Use impl='auto'."
        )

    def _why_not_folded(self, *, slots: bool = False) -> str | None:
        """The first reason why modules of the tokens' side, or of both, must be called."""
        sides = {"tokens_read": self.tokens_read, "slots_read": self.slots_read}
        folded: list[tuple[str, type[nn.Module]]] = []
        for name in sides if slots else ("tokens_read",):
            folded += [(f"{name}.mlp", FeedForward), (f"{name}.mlp.norm", nn.LayerNorm)]
            folded += [(f"{name}.{linear}", nn.Linear) for linear in ("mlp.expand", "mlp.contract")]
            folded += [(f"{name}.{cell}", nn.GRUCell) for cell in ("gru", "mlp_gru")]
            if slots:
                folded += [(f"{name}.{norm}", nn.LayerNorm) for norm in ("norm_read", "norm_readers")]
                folded += [(f"{name}.{linear}", nn.Linear) for linear in ("to_q", "to_k", "to_v")]
        if not slots:
            folded += [("slots_read.norm_read", nn.LayerNorm), ("tokens_read.norm_readers", nn.LayerNorm)]
            folded += [(name, nn.Linear) for name in ("slots_read.to_k", "slots_read.to_v", "tokens_read.to_q")]
        reasons = (why_not_plain(((name, self.get_submodule(name)),), kinds=(kind,)) for name, kind in folded)
        return next((reason for reason in reasons if reason is not None), None)

    def _why_not_triton(self, tokens: Tensor, slots: Tensor | None, num_slots: int | None) -> str | None:
        """The reason why kernels cannot take these tokens and slots."""
        reason = self._why_not_folded(slots=True)
        if reason is not None:
            return reason
        if self.slots_read.norm_read.eps != self.tokens_read.norm_readers.eps:
            return "the LayerNorms of tokens that are read and of tokens that read have different eps"
        if slots is None:
            number = getattr(self.initial_slots, "num_slots", 1) if num_slots is None else num_slots
            slots = self.slots_read.gru.weight_hh.new_empty(1, number, self.slots_read.gru.hidden_size)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        return why_not_two_way(tokens, slots, self._weights(), compute_dtype(slots))

    def _weights(self) -> tuple[Weights, Weights]:
        """What slots and tokens learned, of modules that are plain."""
        return self.slots_read.weights(), self.tokens_read.weights()

    def _exchange(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        given: Tensor | None,
        num_slots: int | None,
        generator: torch.Generator | None,
        num_iterations: int | None,
        slot_mask: Tensor | None,
        temperature: float,
    ) -> tuple[TwoWaySlotAttentionOutput, tuple[int, int] | None]:
        """Slots, tokens `[B, N, D]` and the slots' last attention; and the grid of an image."""
        tokens, mask, grid = as_tokens(tokens, mask, dim=self.dim)
        tokens_dtype = tokens.dtype
        iterations = self.num_iterations if num_iterations is None else num_iterations
        check_positive(num_iterations=iterations)
        check_positive_number(temperature=temperature)
        slots: Tensor = starting_slots(self.initial_slots, tokens.shape[0], given, num_slots, generator, slot_mask)
        impl = self.implementation(tokens, slots)
        if mask is None and tokens.shape[1] == 0:
            mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
        run = {"absorbed": self._absorbed, "triton": self._fused}.get(impl, self._projected)
        # Nothing holds the first tokens while others take their place.
        slots, tokens, attention = run(
            self._first_tokens(tokens, mask, slots.dtype), slots, mask, slot_mask, iterations, temperature
        )
        if slot_mask is not None:
            slots = slots.masked_fill(~slot_mask[..., None], 0)
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
        attention = attention.squeeze(1).to(slots.dtype)
        return TwoWaySlotAttentionOutput(slots, tokens.to(tokens_dtype), attention), grid

    def _first_tokens(self, tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The tokens before the first iteration, with 0 in place of those that are masked."""
        tokens = tokens.to(dtype)
        return self.norm_tokens(tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)).to(dtype)

    def _projected(
        self,
        tokens: Float[Tensor, "B N D"],
        slots: Float[Tensor, "B K S"],
        mask: Bool[Tensor, "B N"] | None,
        slot_mask: Bool[Tensor, "B K"] | None,
        iterations: int,
        temperature: float,
    ) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B 1 K N"]]:
        """Every module called, in turn."""
        impl = "reference" if self.impl == "reference" else "mixed"
        scale = scaling(slots, temperature)
        options = {
            "scale": scaling(tokens, temperature),
            "normalization": self.token_normalization,
            "eps": self.eps,
            "impl": impl,
        }
        for _ in range(iterations):
            queries, keys, values = (rows[:, None] for rows in self.slots_read.project(slots, tokens))
            updates, attention = slot_attention(
                queries, keys, values, mask, slot_mask, scale=scale, eps=self.eps, impl=impl
            )
            del queries, keys, values  # Tokens are updated next, and need the memory.
            slots = self.slots_read.revise(self.slots_read.let_in(slots, updates.squeeze(1)))
            tokens = self.tokens_read.let_in(
                tokens, read_slots(*self.tokens_read.project(tokens, slots), mask, slot_mask, **options)
            )
            tokens = self.tokens_read.revise(tokens)
        return slots, tokens, attention  # pyright: ignore[reportPossiblyUnboundVariable]

    def _absorbed(
        self,
        tokens: Float[Tensor, "B N D"],
        slots: Float[Tensor, "B K S"],
        mask: Bool[Tensor, "B N"] | None,
        slot_mask: Bool[Tensor, "B K"] | None,
        iterations: int,
        temperature: float,
    ) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B 1 K N"]]:
        """The same numbers with less work for each token.

        - Queries, keys and values of tokens are absorbed as in one-way slot attention.
        - A token reads a weighted sum of K slots, so the gates' input product is taken of the K slots before the sum.
        - The second gates' input product absorbs the MLP's last map, where that is the smaller product.
        """
        side, dtype = self.slots_read, compute_dtype(tokens)
        projections = AbsorbedProjections.of(side.norm_read, side.to_k, side.to_v, scale=scaling(slots, temperature))
        weights = self._token_update(dtype)
        with autocast_off(tokens):
            query, bias = fold_norm(self.tokens_read.norm_readers, self.tokens_read.to_q)
            bias = query.new_zeros(query.shape[:1]) if bias is None else bias
            query, gates = torch.cat([query, bias[:, None]], -1), at_least_float32(self.tokens_read.gru.weight_ih)
        reading = self._reading(mask, slot_mask, scaling(tokens, temperature))

        # Compilers decide themselves what they keep.
        read = _read_tokens if torch.compiler.is_compiling() else partial(checkpointed, _read_tokens)
        tokens = tokens.to(dtype)
        for _ in range(iterations):
            queries = side.to_q(side.norm_readers(slots))[:, None]
            updates, attention, rows = read(side.norm_read, self.eps, tokens, queries, mask, slot_mask, *projections)
            slots = side.revise(side.let_in(slots, updates.squeeze(1)))
            known = rows if self.tokens_read.norm_readers.eps == side.norm_read.eps else None
            rows = self.tokens_read.norm_read(slots)
            keys, values = (at_least_float32(linear(rows)) for linear in (self.tokens_read.to_k, self.tokens_read.to_v))
            with autocast_off(tokens):
                readers, values = keys @ query, F.linear(values, gates).to(dtype)
                sums = readers[..., :-1].to(dtype), readers[..., -1].to(dtype), values
                tokens = update_tokens(tokens, *sums, weights, reading, normalized=known)
        return slots, tokens, attention  # pyright: ignore[reportPossiblyUnboundVariable]

    def _fused(
        self,
        tokens: Float[Tensor, "B N D"],
        slots: Float[Tensor, "B K S"],
        mask: Bool[Tensor, "B N"] | None,
        slot_mask: Bool[Tensor, "B K"] | None,
        iterations: int,
        temperature: float,
    ) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B N D"], Float[Tensor, "B 1 K N"]]:
        """The same by kernels: in each iteration one reads the tokens, one updates the slots, one the tokens."""
        of_slots, of_tokens = self.slots_read, self.tokens_read
        settings = TwoWaySettings(
            iterations,
            self.token_normalization == "tokens",
            scaling(slots, temperature),
            scaling(tokens, temperature),
            self.eps,
            norm_eps=of_slots.norm_read.eps,
            mlp_eps=of_slots.mlp.norm.eps,
            slot_eps=of_slots.norm_readers.eps,
            read_eps=of_tokens.norm_read.eps,
            token_mlp_eps=of_tokens.mlp.norm.eps,
        )
        return iterate_both(tokens.to(compute_dtype(tokens)), slots, self._weights(), settings, mask, slot_mask)

    def _reading(self, mask: Tensor | None, slot_mask: Tensor | None, scale: float) -> Reading:
        eps = self.tokens_read.norm_readers.eps, self.tokens_read.mlp.norm.eps
        return Reading(mask, slot_mask, scale, self.token_normalization, self.eps, *eps)

    def _token_update(self, dtype: torch.dtype) -> TokenUpdate:
        """Cells and MLP of the tokens in `dtype`; the MLP's last map is part of the second cell's where that pays."""
        side, folds = self.tokens_read, self._folds_contract()
        norm, expand, contract = side.mlp.norm, side.mlp.expand, side.mlp.contract
        with autocast_off(side.to_q.weight):
            inputs, inputs_bias = side.mlp_gru.weight_ih, side.mlp_gru.bias_ih if side.mlp_gru.bias else None
            if folds:
                inputs = at_least_float32(inputs)
                if contract.bias is not None:
                    image = inputs @ contract.bias.to(inputs.dtype)
                    inputs_bias = image if inputs_bias is None else image + inputs_bias
                inputs = inputs @ contract.weight.to(inputs.dtype)
            return TokenUpdate(
                _cell(side.gru, side.gru.bias_ih if side.gru.bias else None, dtype),
                *(None if x is None else x.to(dtype) for x in (norm.weight, norm.bias, expand.weight, expand.bias)),  # pyright: ignore[reportArgumentType]
                *(None if folds or x is None else x.to(dtype) for x in (contract.weight, contract.bias)),
                inputs=inputs.to(dtype),
                write=_cell(side.mlp_gru, inputs_bias, dtype),
            )

    def _folds_contract(self) -> bool:
        """Whether the MLP's last map (D x M) and the gates' (3D x D) cost more one after the other than as one."""
        contract = self.tokens_read.mlp.contract
        width, hidden = getattr(contract, "out_features", 0), getattr(contract, "in_features", 0)
        return 2 * hidden < 3 * width  # 3*D*M < D*M + 3*D*D


def _read_tokens(
    norm: nn.LayerNorm,
    eps: float,
    tokens: Tensor,
    queries: Tensor,
    mask: Tensor | None,
    slot_mask: Tensor | None,
    *projections: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What slots read of the tokens, their attention, and the normalised tokens."""
    rows = normalized(tokens, norm)
    updates, attention = AbsorbedProjections(*projections).read(rows, mask, slot_mask, queries, eps=eps)
    return updates, attention, rows


def scaling(queries: Float[Tensor, "*batch E"], temperature: float) -> float:
    """The factor of the logits of queries of width E."""
    return queries.shape[-1] ** -0.5 / temperature


class _Reading(nn.Module):
    """The modules with which readers of width `dim` read rows of width `read_dim` and update themselves."""

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

    def weights(self) -> Weights:
        """What plain modules learned."""
        maps = self.to_q, self.to_k, self.to_v, None
        return plain_weights(self.norm_read, self.norm_readers, maps, self.gru, self.mlp, self.mlp_gru)

    def project(
        self, readers: Float[Tensor, "B R d"], read: Float[Tensor, "B C e"]
    ) -> tuple[Float[Tensor, "B R d"], Float[Tensor, "B C d"], Float[Tensor, "B C d"]]:
        """Queries of the readers; keys and values of what they read."""
        read = self.norm_read(read)
        return self.to_q(self.norm_readers(readers)), self.to_k(read), self.to_v(read)

    def let_in(self, readers: Float[Tensor, "B R d"], updates: Float[Tensor, "B R d"]) -> Float[Tensor, "B R d"]:
        """The readers after the gates have let in what they read."""
        return recurrent_step(self.gru, updates, readers)

    def revise(self, readers: Float[Tensor, "B R d"]) -> Float[Tensor, "B R d"]:
        """The readers after the gates have let in what the MLP makes of them."""
        return recurrent_step(self.mlp_gru, self.mlp(readers), readers)


def _cell(cell: nn.GRUCell, inputs_bias: Tensor | None, dtype: torch.dtype) -> Cell:
    """A plain cell in `dtype`, with the bias of its input."""
    size = 2 * cell.hidden_size
    weight, bias = cell.weight_hh.to(dtype), cell.bias_hh if cell.bias else None
    if inputs_bias is None:
        return Cell(weight, None if bias is None else bias.to(dtype), None)
    padded = F.pad(inputs_bias[:size], (0, cell.hidden_size))
    bias = padded if bias is None else padded + bias
    return Cell(weight, bias.to(dtype), inputs_bias[size:].to(dtype))
