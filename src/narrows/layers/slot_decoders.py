"""Decoders of frozen features from slots: an MLP over positions (DINOSAUR), a causal transformer (SLATE, SPOT)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import draw_, reset_submodules
from narrows.ops.attention import attention
from narrows.validation import check_mask, check_positive, check_share, checked

Grid = tuple[int, int]


class DecodedFeatures(NamedTuple):
    """Features made of slots, and which slot each position was made of.

    Args:
        features: `[B, N, D]`.
        masks: `[B, K, N]`, sums to 1 over the slots; 0 at masked slots.
    """

    features: Float[Tensor, "B N D"]
    masks: Float[Tensor, "B K N"]


class MLPDecoder(nn.Module):
    r"""Features of all positions from each slot by one MLP, mixed by a softmax over slots (Seitzer et al. 2023).

    \[ (y_{kn}, \alpha_{kn}) = \mathrm{MLP}(s_k + p_n), \quad y_n = \sum_k \mathrm{softmax}_k(\alpha_{kn})\, y_{kn} \]

    Args:
        slot_dim: S, width of the slots.
        feature_dim: D, width of the features.
        grid: `(height, width)` of the positions that are learned; another grid of a call interpolates them.
        hidden_dims: hidden widths of the MLP.
        input_dim: width of positions, to which slots are mapped; None: `slot_dim`, without a map.
        device: where parameters are made.
        dtype: of the parameters.

    >>> import torch
    >>> decoder = MLPDecoder(64, 384, grid=(14, 14), hidden_dims=(128, 128))
    >>> features, masks = decoder(torch.randn(2, 7, 64))
    >>> features.shape, masks.shape
    (torch.Size([2, 196, 384]), torch.Size([2, 7, 196]))

    https://arxiv.org/abs/2209.14860
    """

    @checked
    def __init__(
        self,
        slot_dim: int,
        feature_dim: int,
        *,
        grid: Sequence[int],
        hidden_dims: Sequence[int] = (2048, 2048, 2048),
        input_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2:
            raise InvalidArgument("grid", expected="(height, width)", got=grid)
        check_positive(slot_dim=slot_dim, feature_dim=feature_dim, height=grid[0], width=grid[1])
        factory = {"device": device, "dtype": dtype}
        width = slot_dim if input_dim is None else input_dim
        check_positive(input_dim=width, **{f"hidden_dims[{i}]": dim for i, dim in enumerate(hidden_dims)})
        self.grid, self.feature_dim = (int(grid[0]), int(grid[1])), int(feature_dim)
        self.slot_map = None if input_dim is None else nn.Linear(slot_dim, input_dim, **factory)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], width, **factory))
        self.mlp = relu_mlp((width, *hidden_dims, feature_dim + 1), **factory)
        self._reset_own()

    def _reset_own(self) -> None:
        draw_(self.positions, lambda drawn: nn.init.normal_(drawn, std=0.02))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                draw_(module.bias, nn.init.zeros_)

    def reset_parameters(self) -> None:
        """Draw new parameters: positions of a spread of 0.02, maps as torch draws them, their biases 0."""
        reset_submodules(self)
        self._reset_own()

    def forward(
        self,
        slots: Float[Tensor, "B K S"],
        slot_mask: Bool[Tensor, "B K"] | Float[Tensor, "B K"] | None = None,
        *,
        grid: Grid | None = None,
        top_k: int | None = None,
        attention: Float[Tensor, "B K N"] | None = None,
    ) -> DecodedFeatures:
        """Features at every position of a grid.

        Args:
            slots: `[B, K, S]`.
            slot_mask: `[B, K]`, True at real slots; or zeros and ones through which gradients pass.
            grid: `(height, width)` of this call; that of the learned positions if None.
            top_k: only the slots that take most of a position in `attention` are decoded there, for memory (Didolkar et
                al. 2024); masks are 0 at the others.
            attention: `[B, K, N]`, of slot attention on the same grid.

        Raises:
            InvalidArgument: `top_k` without `attention`, or more than there are slots; a mask of another shape.
        """
        _check_slot_mask(slot_mask, slots)
        inputs = slots if self.slot_map is None else self.slot_map(slots)
        positions = positions_on(self.positions, self.grid, self.grid if grid is None else grid)
        placed = inputs.unsqueeze(2) + positions  # [B, K, N, width]
        chosen = None
        if top_k is not None:
            chosen = self._most_attended(top_k, attention, slot_mask, placed.shape[1])
            placed = placed.gather(1, chosen.unsqueeze(-1).expand(-1, -1, -1, placed.shape[-1]))
        decoded = self.mlp(placed)
        made, logits = decoded[..., :-1], decoded[..., -1].float()
        if slot_mask is not None and chosen is not None:
            present = slot_mask.unsqueeze(2).expand(-1, -1, placed.shape[2]).gather(1, chosen)
        else:
            present = slot_mask
        masks = shares_of(logits, present)
        features = torch.einsum("bkn,bknd->bnd", masks.to(made.dtype), made)
        if chosen is not None:
            masks = masks.new_zeros(masks.shape[0], slots.shape[1], masks.shape[2]).scatter(1, chosen, masks)
        return DecodedFeatures(features, masks)

    def _most_attended(
        self, top_k: int, attention: Tensor | None, slot_mask: Tensor | None, slots: int
    ) -> Int[Tensor, "B k N"]:
        check_positive(top_k=top_k)
        if attention is None:
            raise InvalidArgument("attention", expected="the attention of the slots, for top_k", got=None)
        if top_k > slots:
            raise InvalidArgument("top_k", expected=f"at most the {slots} slots", got=top_k)
        if slot_mask is not None:
            attention = attention.masked_fill(slot_mask.unsqueeze(2) == 0, -1)
        return attention.topk(top_k, dim=1, sorted=False).indices


class AutoregressiveDecoder(nn.Module):
    """A transformer that predicts each patch's features from those before it and the slots (SLATE, DINOSAUR, SPOT).

    Patches are read in one of several orders: row by row alone, or with `num_orders=9` also column by column, from
    every corner, and in a spiral from the middle, one drawn for each training step, so that slots have to say what the
    patches before do not (Kakogeorgiou et al. 2024). The masks are what each patch reads of the slots in the last
    block.

    Args:
        slot_dim: S, width of the slots.
        feature_dim: D, width of the features.
        depth: number of blocks.
        heads: of every attention.
        num_orders: 1 or 9.
        cross_heads: heads that read the slots, from the second block on; `heads` if None.
        dropout: probability at which outputs of attention and MLP are dropped in training.
        device: where parameters are made.
        dtype: of the parameters.

    https://arxiv.org/abs/2312.00648
    """

    @checked
    def __init__(
        self,
        slot_dim: int,
        feature_dim: int,
        *,
        depth: int = 4,
        heads: int = 6,
        num_orders: int = 1,
        cross_heads: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim, feature_dim=feature_dim, depth=depth, heads=heads)
        check_share(dropout=dropout)
        if num_orders not in (1, 9):
            raise InvalidArgument("num_orders", expected="1 or 9", got=num_orders)
        factory = {"device": device, "dtype": dtype}
        self.num_orders = int(num_orders)
        self.first = nn.Parameter(torch.empty(num_orders, feature_dim, **factory))
        self.input_map = nn.Linear(feature_dim, feature_dim, bias=False, **factory)
        self.input_norm = nn.LayerNorm(feature_dim, **factory)
        self.slot_map = nn.Linear(slot_dim, feature_dim, bias=False, **factory)
        self.slot_norm = nn.LayerNorm(feature_dim, **factory)
        reading = [heads, *[cross_heads or heads] * (depth - 1)]
        self.blocks = nn.ModuleList(
            DecoderBlock(feature_dim, heads, cross, first=index == 0, dropout=dropout, **factory)
            for index, cross in enumerate(reading)
        )
        self.norm = nn.LayerNorm(feature_dim, **factory)
        draw_(self.first, lambda drawn: nn.init.normal_(drawn, std=0.02))

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        reset_submodules(self)
        draw_(self.first, lambda drawn: nn.init.normal_(drawn, std=0.02))

    def forward(
        self,
        slots: Float[Tensor, "B K S"],
        features: Float[Tensor, "B N D"],
        slot_mask: Bool[Tensor, "B K"] | Float[Tensor, "B K"] | None = None,
        *,
        grid: Grid,
        order: int | None = None,
        generator: torch.Generator | None = None,
    ) -> DecodedFeatures:
        """Predict the features, each from those before it in an order.

        Args:
            slots: `[B, K, S]`.
            features: `[B, N, D]`, the true ones (teacher forcing).
            slot_mask: `[B, K]`, True at real slots; or zeros and ones through which gradients pass.
            grid: `(height, width)` of the patches.
            order: number of the order; None draws one in training and takes 0, row by row, in evaluation.
            generator: draws it, on the CPU.

        Raises:
            InvalidArgument: a grid of another number of patches, an order that is not there, a mask of another shape.
        """
        _check_slot_mask(slot_mask, slots)
        if grid[0] * grid[1] != features.shape[1]:
            raise InvalidArgument("grid", expected=f"a grid of {features.shape[1]} patches", got=grid)
        if order is None:
            drawn = self.training and self.num_orders > 1
            order = int(torch.randint(self.num_orders, (), generator=generator)) if drawn else 0
        if not 0 <= order < self.num_orders:
            raise InvalidArgument("order", expected=f"0 to {self.num_orders - 1}", got=order)
        path = reading_orders(grid)[order].to(features.device)
        begin = self.first[order].expand(features.shape[0], 1, -1).to(features.dtype)
        text = self.input_norm(self.input_map(torch.cat((begin, features[:, path[:-1]]), 1)))
        read = self.slot_norm(self.slot_map(slots))
        weights = text
        for block in self.blocks:
            text, weights = block(text, read, slot_mask)
        back = path.argsort()
        return DecodedFeatures(self.norm(text)[:, back], weights[:, :, back])


class DecoderBlock(nn.Module):
    """Causal attention among patches, attention to the slots, MLP; each after a LayerNorm and added to what came.

    In the first block what comes is normalised before it is added to, as in the code of SLATE.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        cross_heads: int,
        *,
        first: bool,
        dropout: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.first, self.dropout = first, dropout
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(dim, **factory) for _ in range(3))
        self.patches = Heads(dim, heads, **factory)
        self.slots = Heads(dim, cross_heads, **factory)
        self.expand, self.contract = nn.Linear(dim, 4 * dim, **factory), nn.Linear(4 * dim, dim, **factory)

    def forward(
        self, text: Float[Tensor, "B N D"], slots: Float[Tensor, "B K D"], slot_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B K N"]]:
        """What goes on, and what each patch reads of the slots."""
        normed = self.norm_self(text)
        text = (normed if self.first else text) + self._dropped(self.patches.among(normed))
        read, weights = self.slots.of(self.norm_cross(text), slots, slot_mask)
        text = text + self._dropped(read)
        return text + self._dropped(self.contract(F.relu(self.expand(self.norm_mlp(text))))), weights

    def _dropped(self, change: Tensor) -> Tensor:
        return F.dropout(change, self.dropout, self.training)


class Heads(nn.Module):
    """Queries, keys, values and output of an attention with several heads, without biases."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of the {dim} features", got=heads)
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) for _ in range(4)
        )

    def among(self, text: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """What each patch reads of itself and those before it."""
        query, key, value = (self._split(to(text)) for to in (self.to_q, self.to_k, self.to_v))
        earlier = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool, device=text.device).tril()
        return self.to_out(attention(query, key, value, earlier).transpose(1, 2).flatten(2))

    def of(
        self, text: Float[Tensor, "B N D"], slots: Float[Tensor, "B K D"], mask: Tensor | None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B K N"]]:
        """What each patch reads of the slots, and how much of each, heads averaged; 0 of masked ones."""
        query, key, value = self._split(self.to_q(text)), self._split(self.to_k(slots)), self._split(self.to_v(slots))
        logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
        weights = shares_of(logits, None if mask is None else mask[:, None, None], dim=-1)
        read = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return self.to_out(read), weights.mean(1).mT

    def _split(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N E"]:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


def shares_of(logits: Float[Tensor, "*logits"], slot_mask: Tensor | None, *, dim: int = 1) -> Float[Tensor, "*logits"]:
    r"""Softmax over slots, among those that `slot_mask` leaves; 0 of the others, and of all where it leaves none.

    A mask of zeros and ones \(z\) that is no boolean passes gradients on, to the zeros too (AdaSlot, equation 9):
    \( z_k e^{l_k} / \sum_j z_j e^{l_j} \).

    Args:
        logits: of slots along `dim`.
        slot_mask: `[B, K]`, or what broadcasts to the logits.
        dim: the axis of slots.
    """
    if slot_mask is None:
        return logits.softmax(dim)
    present = slot_mask
    while dim >= 0 and present.ndim < logits.ndim:
        present = present.unsqueeze(-1)
    if present.dtype == torch.bool:
        return logits.masked_fill(~present, torch.finfo(logits.dtype).min).softmax(dim) * present
    greatest = logits.masked_fill(present == 0, torch.finfo(logits.dtype).min).amax(dim, keepdim=True).detach()
    weights = (logits - greatest).clamp(max=20).exp() * present  # one that is left out may have been far above
    return weights / weights.sum(dim, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)


def relu_mlp(widths: Sequence[int], **factory: Any) -> nn.Sequential:
    """Linear maps from each of these widths to the next, with a ReLU between them."""
    layers: list[nn.Module] = []
    for incoming, outgoing in pairwise(widths):
        layers += [nn.Linear(incoming, outgoing, **factory), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def positions_on(positions: Float[Tensor, "N width"], own: Grid, grid: Grid) -> Float[Tensor, "M width"]:
    """Positions learned on the grid `own`, bicubically interpolated where `grid` is another."""
    if tuple(grid) == own:
        return positions
    image = positions.unflatten(0, own).movedim(-1, 0).unsqueeze(0).float()
    resized = F.interpolate(image, tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).mT.to(positions.dtype)


def _check_slot_mask(slot_mask: Tensor | None, slots: Tensor) -> None:
    as_bool = slot_mask > 0 if slot_mask is not None and slot_mask.is_floating_point() else slot_mask
    check_mask("slot_mask", as_bool, slots.shape[:2], layout="[B, K]")


def reading_orders(grid: Grid) -> Int[Tensor, "9 N"]:
    """Nine orders of the patches of a grid, as numbers of patches counted row by row.

    Row by row; then by columns from the top left, by columns and by rows from the top right, the bottom right and the
    bottom left; then a spiral that begins in the middle.

    >>> reading_orders((2, 2))[:3].tolist()
    [[0, 1, 2, 3], [0, 2, 1, 3], [1, 3, 0, 2]]
    """
    rows = torch.arange(grid[0] * grid[1]).view(grid)
    left, up = rows.flip(1), rows.flip(0)
    both = left.flip(0)
    walks = [rows, rows.mT, left.mT, left, both.mT, both, up.mT, up]
    inwards: list[Tensor] = []
    rest = rows.rot90()
    while rest.numel():
        inwards.append(rest[0])
        rest = rest[1:].rot90()
    return torch.stack([*(walk.flatten() for walk in walks), torch.cat(inwards).flip(0)])
