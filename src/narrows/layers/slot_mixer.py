"""The slot mixer, which decodes positions that read the slots first, and the block it shares with predictors."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import draw_, reset_submodules
from narrows.layers.slot_decoders import DecodedFeatures, Grid, positions_on, relu_mlp, shares_of
from narrows.ops.attention import attention
from narrows.validation import check_positive, checked


class SlotBlock(nn.Module):
    """A transformer block: attention and an MLP of four times the width, each added to what came.

    It predicts the slots of the next frame from those of one (SAVi), or lets positions read slots (slot mixer).

    Args:
        dim: S.
        heads: of attention.
        pre_norm: LayerNorm before attention and MLP (VideoSAUR), rather than after what they add (SAVi).
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        pre_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise InvalidArgument("predictor_heads", expected=f"a divisor of slot_dim = {dim}", got=heads)
        factory = {"device": device, "dtype": dtype}
        self.heads, self.pre_norm = heads, pre_norm
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)
        self.norm_attention, self.norm_mlp = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.expand, self.contract = nn.Linear(dim, 4 * dim, **factory), nn.Linear(4 * dim, dim, **factory)

    def forward(
        self,
        slots: Float[Tensor, "B R S"],
        slot_mask: Bool[Tensor, "B K"] | None = None,
        memory: Float[Tensor, "B K S"] | None = None,
    ) -> Float[Tensor, "B R S"]:
        """The new rows, which read `memory`, or each other where there is none; not what `slot_mask` leaves out."""
        x = slots + self._read(self.norm_attention(slots) if self.pre_norm else slots, slot_mask, memory)
        x = x if self.pre_norm else self.norm_attention(x)
        x = x + self.contract(self.expand(self.norm_mlp(x) if self.pre_norm else x).relu())
        return x if self.pre_norm else self.norm_mlp(x)

    def _read(self, rows: Tensor, slot_mask: Tensor | None, memory: Tensor | None) -> Tensor:
        parts = self.to_qkv(rows).chunk(3, -1)
        if memory is not None:
            parts = (parts[0], *self.to_qkv(memory).chunk(3, -1)[1:])
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        visible = None if slot_mask is None else slot_mask[:, None, None]
        return self.to_out(attention(queries, keys, values, visible).transpose(1, 2).flatten(2))


class SlotMixer(nn.Module):
    r"""Features of each position from one mixture of slots: a decoder whose cost hardly grows with their number.

    Positions read the slots in a small transformer; what they ask for then divides each position among the slots, and
    an MLP decodes the mixture once.

    \[ a_n = \mathrm{softmax}_k(q(x_n) k(s_k)^T S^{-1/2}), \quad y_n = \mathrm{MLP}\Big(\sum_k a_{nk} s_k + p_n\Big) \]

    Args:
        slot_dim: S, width of the slots.
        feature_dim: D, width of the features.
        grid: `(height, width)` of the positions that are learned; another grid of a call interpolates them.
        depth: blocks in which positions read slots.
        heads: of their attention.
        hidden_dims: hidden widths of the MLP.
        device: where parameters are made.
        dtype: of the parameters.

    Sajjadi et al. 2022, https://arxiv.org/abs/2206.06922; as in VideoSAUR, https://arxiv.org/abs/2306.04829.
    """

    @checked
    def __init__(
        self,
        slot_dim: int,
        feature_dim: int,
        *,
        grid: Sequence[int],
        depth: int = 2,
        heads: int = 4,
        hidden_dims: Sequence[int] = (1024, 1024, 1024),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2:
            raise InvalidArgument("grid", expected="(height, width)", got=grid)
        check_positive(slot_dim=slot_dim, feature_dim=feature_dim, height=grid[0], width=grid[1])
        check_positive(depth=depth, heads=heads, **{f"hidden_dims[{i}]": dim for i, dim in enumerate(hidden_dims)})
        if slot_dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of slot_dim = {slot_dim}", got=heads)
        factory = {"device": device, "dtype": dtype}
        self.grid, self.feature_dim = (int(grid[0]), int(grid[1])), int(feature_dim)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], slot_dim, **factory))
        self.norm_memory, self.norm_positions, self.norm_slots = (nn.LayerNorm(slot_dim, **factory) for _ in range(3))
        self.blocks = nn.ModuleList(SlotBlock(slot_dim, heads, pre_norm=True, **factory) for _ in range(depth))
        self.to_q, self.to_k = (nn.Linear(slot_dim, slot_dim, bias=False, **factory) for _ in range(2))
        self.mlp = relu_mlp((slot_dim, *hidden_dims, feature_dim), **factory)
        self._reset_own()

    def _reset_own(self) -> None:
        draw_(self.positions, lambda drawn: nn.init.normal_(drawn, std=drawn.shape[1] ** -0.5))

    def reset_parameters(self) -> None:
        """Draw new parameters: positions of a spread of S^-1/2, maps as torch draws them."""
        reset_submodules(self)
        self._reset_own()

    def forward(
        self,
        slots: Float[Tensor, "B K S"],
        slot_mask: Bool[Tensor, "B K"] | Float[Tensor, "B K"] | None = None,
        *,
        grid: Grid | None = None,
    ) -> DecodedFeatures:
        """Features at every position of a grid.

        Args:
            slots: `[B, K, S]`.
            slot_mask: `[B, K]`, True at real slots; or zeros and ones through which gradients pass.
            grid: `(height, width)` of this call; that of the learned positions if None.
        """
        positions = positions_on(self.positions, self.grid, self.grid if grid is None else grid)
        positions = positions.expand(slots.shape[0], -1, -1)
        x, memory = positions, self.norm_memory(slots)
        visible = None if slot_mask is None else slot_mask > 0
        for block in self.blocks:
            x = block(x, visible, memory)
        queries, keys = self.to_q(self.norm_positions(x)), self.to_k(self.norm_slots(slots))
        masks = shares_of((keys @ queries.mT).float() * keys.shape[-1] ** -0.5, slot_mask)
        mixed = masks.to(slots.dtype).mT @ slots
        return DecodedFeatures(self.mlp(mixed + positions), masks)
