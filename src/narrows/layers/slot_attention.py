"""Slot attention as a layer."""

from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import ImplementationUnavailable, InvalidArgument
from narrows.layers.initial_slots import make_initial_slots, reset_initial_slots, starting_slots
from narrows.layers.initialisation import reset_like_keras
from narrows.ops.slot_attention import (
    Settings,
    SlotAttentionResult,
    Weights,
    iterate,
    slot_attention,
    why_no_kernels,
    why_not_iterate,
)
from narrows.precision import at_least_float32, autocast_off, compute_dtype, is_transformed
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

IMPLEMENTATIONS = ("reference", "mixed", "absorbed")  # on any device; the one-way form has "triton", too


class SlotAttentionOutput(NamedTuple):
    """Slots and the masks they stand for.

    Args:
        slots: `[B, K, S]`, 0 at masked slots.
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

    Tokens may have another floating dtype than the layer, as cached features do: they are converted to the layer's, in
    which results come. The softmax and the sums over tokens are computed in float32 or better.

    Args:
        dim: D, width of the tokens.
        num_slots: K, unless a call says otherwise; no parameter depends on it. May be left out where `initial_slots`
            are given, and must be their number otherwise.
        num_iterations: T, unless a call says otherwise.
        slot_dim: S, width of the slots; `dim` if None.
        heads: H.
        head_dim: E, width of a head. None: heads of `slot_dim / heads`, concatenated, as in the published forms. Given:
            heads of that width and a linear map from all of them back to the slots.
        joint_heads: one softmax over slots and heads together (SLATE, SPOT), rather than one per head (SAVi).
        qkv_bias: whether queries, keys, values and the map after the heads have a bias.
        mlp_dim: hidden width of the residual MLP; the larger of 128 and `slot_dim` if None; 0 for none (VideoSAUR).
        eps: added to the attention before it is averaged over tokens.
        initial_slots: how slots begin where a call gives none, `GaussianSlots` if None; `LearnedSlots` are
            deterministic. Any module with their call will do.
        impl: "reference" (attention in float32 or better), "mixed" (products in the layer's dtype, sums in float32 or
            better), "absorbed" (tokens are not projected: what `norm_tokens`, `to_k` and `to_v` learned moves to the
            side of the slots; only where these are plain modules), "triton" (the same in two kernels an iteration, on
            CUDA; only where all modules are plain), or "auto".
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> from narrows.layers.slot_attention import SlotAttention
    >>> slots, attention = SlotAttention(384, num_slots=7, slot_dim=256)(torch.randn(2, 196, 384))
    >>> slots.shape, attention.shape
    (torch.Size([2, 7, 256]), torch.Size([2, 7, 196]))

    https://arxiv.org/abs/2006.15055
    """

    normed_state: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        dim: int,
        *,
        num_slots: int | None = None,
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
        check_not_negative(eps=eps)
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS, "triton"))
        dim, num_iterations, slot_dim, heads = int(dim), int(num_iterations), int(slot_dim), int(heads)
        if head_dim is None and slot_dim % heads:
            raise InvalidArgument(
                "heads", expected=f"a divisor of slot_dim = {slot_dim}", got=heads, hint="Or give head_dim."
            )
        read_dim = slot_dim if head_dim is None else heads * head_dim
        check_positive(head_dim=read_dim // heads)
        read_dim = int(read_dim)
        self.dim, self.num_iterations, self.heads, self.joint_heads = dim, num_iterations, heads, joint_heads
        self.head_dim, self.eps, self.impl = read_dim // heads, eps, impl
        self.initial_slots = make_initial_slots(initial_slots, num_slots, slot_dim, device=device, dtype=dtype)
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
        self.mlp = None if mlp_dim == 0 else FeedForward(slot_dim, mlp_dim, device=device, dtype=dtype)
        reset_like_keras(self)

    def reset_parameters(self) -> None:
        """Draw new parameters the way the published code does: Glorot, recurrent weights orthogonal, biases 0."""
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
    ) -> SlotAttentionOutput:
        """Let the slots compete for `tokens`.

        Args:
            tokens: `[B, N, D]`, or an image `[B, D, H, W]` whose pixels are tokens, row by row.
            mask: `[B, N]` or `[B, H, W]`, True at real tokens. A sample without any has read zeros.
            slots: initial slots, `[B, K, S]`; drawn if None.
            num_slots: K of this call.
            generator: draws the initial slots' noise, one normal sample `[B, K, S]`; torch's global one if None.
                `torch.compile(fullgraph=True)` cannot trace one: draw before, with `layer.initial_slots(batch,
                generator=generator)`, and give `slots`.
            num_iterations: T of this call.
            slot_mask: `[B, K]`, True at real slots. The others take no part and come out as 0: a sample gets what it
                gets with its real slots alone.
            temperature: divides the logits of the softmax.

        Returns:
            The slots and their masks.

        Raises:
            InvalidArgument, InvalidType: an argument of the wrong shape, dtype or value.
            ImplementationUnavailable: `impl="absorbed"` where a module that it folds is not plain.
        """
        slots, attention, _ = self._attend(
            tokens, mask, slots, num_slots, generator, num_iterations, slot_mask, temperature
        )
        if self.heads == 1:
            return SlotAttentionOutput(slots, attention.squeeze(1))
        return SlotAttentionOutput(slots, attention.sum(1) if self.joint_heads else attention.mean(1))

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
        """The last iteration's attention in every head, for the arguments of `forward`.

        It is `forward`'s own only from the same initial slots: give both the same `slots`, or a `generator` in the same
        state; otherwise each draws its own noise. Sums to 1 over the slots in each head, or over slots and heads under
        one joint softmax. An image gives a routing on the image's grid.
        """
        _, attention, grid = self._attend(
            tokens, mask, slots, num_slots, generator, num_iterations, slot_mask, temperature
        )
        return Routing(attention, carriers="slots", grid=grid, joint_heads=self.joint_heads)

    def implementation(
        self,
        tokens: Float[Tensor, "B N D"] | Float[Tensor, "B D H W"],
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        *,
        num_iterations: int | None = None,
    ) -> str:
        """Which of "reference", "mixed", "absorbed" and "triton" `forward` takes for these arguments.

        "auto" takes "triton" for tokens on a CUDA device that its kernels can read (float32, bfloat16 or float16, D and
        S to 1024, H * K to 64, H counted as a power of two), where all modules are plain, and otherwise "mixed", of
        fewest launches. On other devices, and under `torch.export`, it takes "absorbed" where `norm_tokens`, `to_k` and
        `to_v` are plain and T * K * H <= D: for every two projections of width D that it saves a token, it makes two
        products with D numbers of each slot and head, where "mixed" has E. Otherwise it takes "mixed".

        Raises:
            ImplementationUnavailable: `impl="absorbed"` or `impl="triton"` cannot run; it says why.
        """
        check_choice("impl", self.impl, ("auto", *IMPLEMENTATIONS, "triton"))
        if self.impl in ("reference", "mixed"):
            return self.impl
        on_gpu = self.impl == "auto" and tokens.is_cuda and not torch.compiler.is_exporting()
        if self.impl == "triton" or on_gpu:
            reason = None if on_gpu else why_no_kernels()
            reason = reason or self._why_not_triton(tokens, slots, num_slots)
            if reason is None:
                return "triton"
            if on_gpu:
                return "mixed"
            raise ImplementationUnavailable(
                f"SlotAttention: impl='triton' cannot run here: {reason}. Use impl='auto', or see `narrows info`."
            )
        reason = why_not_plain((("norm_tokens", self.norm_tokens),), kinds=(nn.LayerNorm,)) or why_not_plain(
            (("to_k", self.to_k), ("to_v", self.to_v)), kinds=(nn.Linear,)
        )
        if self.impl == "absorbed":
            if reason is not None:
                raise ImplementationUnavailable(
                    f"SlotAttention: impl='absorbed' cannot run here: {reason}. Use impl='auto'."
                )
            return "absorbed"
        iterations = self.num_iterations if num_iterations is None else num_iterations
        if slots is not None:
            num_slots = slots.shape[1]
        if num_slots is None or torch.compiler.is_exporting():  # The number of a program's slots may be open.
            num_slots = getattr(self.initial_slots, "num_slots", None)
        pays = num_slots is None or iterations * num_slots * self.heads <= self.dim
        return "absorbed" if pays and reason is None else "mixed"

    def _why_not_triton(self, tokens: Tensor, slots: Tensor | None, num_slots: int | None) -> str | None:
        if self.normed_state or self.mlp is None:
            return "its kernels start from slots as they are and have an MLP"
        parts = ((name, part) for name, part in self.named_modules() if name and not name.startswith("initial_slots"))
        reason = why_not_plain(parts, kinds=(nn.LayerNorm, nn.Linear, nn.GRUCell, FeedForward))
        if reason is not None:
            return reason
        if slots is None:
            number = getattr(self.initial_slots, "num_slots", 1) if num_slots is None else num_slots
            slots = self.gru.weight_hh.new_empty(1, number, self.gru.hidden_size)
        elif tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        return why_not_iterate(tokens, slots, self._weights(), compute_dtype(slots), self.heads)

    def _weights(self) -> Weights:
        """What the layer learned, of modules that are plain."""
        assert self.mlp is not None
        maps = self.to_q, self.to_k, self.to_v, self.to_out
        return plain_weights(self.norm_tokens, self.norm_slots, maps, self.gru, self.mlp)

    def _attend(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        given: Tensor | None,
        num_slots: int | None,
        generator: torch.Generator | None,
        num_iterations: int | None,
        slot_mask: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        """Algorithm 1: the slots, the last attention `[B, H, K, N]` in every head, and the grid of an image."""
        tokens, mask, grid = as_tokens(tokens, mask, dim=self.dim)
        iterations = self.num_iterations if num_iterations is None else num_iterations
        check_positive(num_iterations=iterations)
        check_positive_number(temperature=temperature)
        slots: Tensor = starting_slots(self.initial_slots, tokens.shape[0], given, num_slots, generator, slot_mask)
        impl = self.implementation(tokens, slots, num_iterations=iterations)
        tokens = tokens.to(slots.dtype)
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
        elif tokens.shape[1] == 0:
            mask = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool)
        scale = self.head_dim**-0.5 / temperature
        options = {"joint_heads": self.joint_heads, "eps": self.eps}
        if impl == "triton":
            assert self.mlp is not None
            settings = Settings(
                iterations, self.heads, self.joint_heads, scale, self.eps, self.mlp.norm.eps, self.norm_slots.eps
            )
            read = normalized(tokens, self.norm_tokens)
            slots, attention = iterate(read, slots, self._weights(), settings, mask, slot_mask)
            slots = slots if slot_mask is None else slots.masked_fill(~slot_mask[..., None], 0)
            return slots, attention, grid
        if impl == "absorbed":
            absorbed = AbsorbedProjections.of(self.norm_tokens, self.to_k, self.to_v, heads=self.heads, scale=scale)
            read = partial(absorbed.read, normalized(tokens, self.norm_tokens), mask, slot_mask, **options)
        else:
            tokens = self.norm_tokens(tokens)  # line 3
            keys, values = (self._split(linear(tokens)).contiguous() for linear in (self.to_k, self.to_v))
            read = partial(
                slot_attention,
                keys=keys,
                values=values,
                mask=mask,
                slot_mask=slot_mask,
                scale=scale,
                dtype=slots.dtype,
                impl=impl,
                **options,
            )
        for _ in range(iterations):  # line 4
            normed = self.norm_slots(slots)
            queries = self._split(self.to_q(normed))  # line 6
            updates, attention = read(queries=queries)  # lines 7 and 8
            updates = updates.transpose(1, 2).flatten(2).to(slots.dtype)  # [B, K, H * E]
            updates = updates if self.to_out is None else self.to_out(updates)
            slots = recurrent_step(self.gru, updates, normed if self.normed_state else slots)  # line 9
            slots = slots if self.mlp is None else slots + self.mlp(slots)  # line 10
        if slot_mask is not None:
            slots = slots.masked_fill(~slot_mask[..., None], 0)
        return slots, attention.to(slots.dtype), grid  # pyright: ignore[reportPossiblyUnboundVariable]

    def _split(self, rows: Float[Tensor, "B R HE"]) -> Float[Tensor, "B H R E"]:
        """Heads side by side as heads."""
        return rows.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class NormedSlotAttention(SlotAttention):
    r"""`SlotAttention` whose GRU starts from the normalised slots, not from the slots (VideoSAUR, SlotContrast).

    \[ h = \mathrm{GRU}(u, \mathrm{LayerNorm}(s)) \]

    Arguments are those of `SlotAttention`. It has no kernels.
    """

    normed_state: ClassVar[bool] = True


class AbsorbedProjections(NamedTuple):
    r"""Keys and values of tokens that are normalised once and never projected.

    With \(\hat x\) the token without LayerNorm's \(\gamma, \beta\), and \(w\) weights that sum to 1 over the tokens:

        q . (W_k (gamma x^ + beta) + b_k)           = (gamma W_k^T q) . x^ + q . (W_k beta + b_k)
        sum_n w_n (W_v (gamma x^_n + beta) + b_v)   = W_v (gamma sum_n w_n x^_n) + (W_v beta + b_v)

    All in float32 or better.

    Args:
        key: `[H, E, D + 1]`, in its last column what the biases add.
        value: `[H, E, D]`.
        value_bias: `[H, E]`, or None.
    """

    key: Tensor
    value: Tensor
    value_bias: Tensor | None

    @classmethod
    def of(
        cls, norm: nn.LayerNorm, to_k: nn.Linear, to_v: nn.Linear, *, heads: int = 1, scale: float
    ) -> "AbsorbedProjections":
        """From the three modules, which must be plain, and the factor of the logits."""
        with autocast_off(to_k.weight):
            (key, key_bias), (value, value_bias) = fold_norm(norm, to_k), fold_norm(norm, to_v)
            key = key.unflatten(0, (heads, -1))
            column = key.new_zeros(key.shape[:2]) if key_bias is None else key_bias.unflatten(0, (heads, -1))
            value_bias = None if value_bias is None else value_bias.unflatten(0, (heads, -1))
            return cls(torch.cat([key, column[..., None]], -1) * scale, value.unflatten(0, (heads, -1)), value_bias)

    def read(
        self,
        tokens: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None,
        slot_mask: Bool[Tensor, "B K"] | None,
        queries: Float[Tensor, "B H K E"],
        *,
        joint_heads: bool = False,
        eps: float,
    ) -> SlotAttentionResult:
        """What slots read of normalised `tokens`: `slot_attention` of keys and values that are never made."""
        with autocast_off(tokens):
            tokens = tokens[:, None]
            rows = torch.einsum("bhke,hed->bhkd", queries.to(self.key.dtype), self.key)
            means, attention = slot_attention(
                rows[..., :-1],
                tokens,
                tokens,
                mask,
                slot_mask,
                bias=rows[..., -1],
                scale=1.0,
                joint_heads=joint_heads,
                eps=eps,
            )
            if self.value.shape[0] == 1:  # The gradient of einsum would lie the other way round in memory.
                updates = F.linear(means, self.value[0])
            else:
                updates = torch.einsum("bhkd,hed->bkhe", means, self.value).transpose(1, 2)
            if self.value_bias is not None:  # samples without any token read zeros
                bias = self.value_bias[:, None]
                updates = updates + (bias if mask is None else bias * mask.any(1)[:, None, None, None])
            return SlotAttentionResult(updates, attention)


def plain_weights(
    norm_read: nn.LayerNorm,
    norm_readers: nn.LayerNorm,
    maps: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear | None],
    gru: nn.GRUCell,
    mlp: "FeedForward",
    mlp_gru: nn.GRUCell | None = None,
) -> Weights:
    """What plain modules learned; `maps` for queries, keys, values, and after the heads."""

    def affine(module: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if module is None else (module.weight, module.bias)  # pyright: ignore[reportReturnType]

    def cell(module: nn.GRUCell | None) -> tuple[Tensor | None, ...]:
        if module is None:
            return (None,) * 4
        biases = (module.bias_ih, module.bias_hh) if module.bias else (None, None)
        return module.weight_ih, module.weight_hh, *biases

    query, key, value, out = (affine(module) for module in maps)
    parts = affine(norm_read), key, value, out, cell(gru), affine(mlp.norm), affine(mlp.expand), affine(mlp.contract)
    flat = (weight for part in (*parts, affine(norm_readers), query, cell(mlp_gru)) for weight in part)
    return Weights(*flat)  # pyright: ignore[reportArgumentType]


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out"] | None]:
    """Weight and bias of a linear map after the gain and the bias of a LayerNorm, in float32 or better."""
    weight, bias = at_least_float32(linear.weight), linear.bias
    if norm.bias is not None:
        image = weight @ norm.bias.to(weight.dtype)
        bias = image if bias is None else image + bias
    return weight if norm.weight is None else weight * norm.weight, bias


def normalized(tokens: Float[Tensor, "B N D"], norm: nn.LayerNorm) -> Float[Tensor, "B N D"]:
    """What `norm` makes of tokens before its gain and its bias, in the dtype in which they are multiplied."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps).to(compute_dtype(tokens))


class FeedForward(nn.Module):
    """LayerNorm, linear, ReLU, linear.

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
        hidden_dim = int(hidden_dim)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.expand = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.contract = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """What is added to `x`."""
        return self.contract(self.expand(self.norm(x)).relu())


def recurrent_step(
    cell: nn.Module, updates: Float[Tensor, "B R I"], state: Float[Tensor, "B R S"]
) -> Float[Tensor, "B R S"]:
    """One step of a recurrent cell for every row, in the dtype of its state."""
    if is_transformed(updates):
        # GRUCell adds in place to what it makes of its state, which `torch.func.vmap` must have vectorised too.
        state = state + updates.new_zeros(state.shape)
    new = cell(updates.to(state.dtype).flatten(0, 1), state.flatten(0, 1))
    return new.view_as(state).to(state.dtype)
