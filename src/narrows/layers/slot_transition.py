"""Slots of the next frame from those of earlier ones and from the next frame's tokens (RandSF.Q)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import reset_submodules
from narrows.layers.slot_decoders import Heads
from narrows.validation import check_generator, check_positive, check_share


class SlotTransition(nn.Module):
    """The slots with which a frame begins: slots of the frame before that have read the frame's tokens.

    In training each sample takes the slots of one earlier frame at random, and the tokens of one frame after the first,
    each with a learned vector for how long ago it was: it has to learn how objects move, not to copy (Zhao et al.
    2025). Neither slots nor tokens get a gradient through it. Slots read each other, then the tokens, then go through
    an MLP, with a LayerNorm after each.

    Args:
        dim: S, of slots and tokens.
        heads: of attention.
        window: how many frames back it may look, the present one among them; 2 at least.
        dropout: of what attention and MLP add, in training.
        device: where parameters are made.
        dtype: of the parameters.

    https://arxiv.org/abs/2508.01345
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int,
        dropout: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads)
        check_share(dropout=dropout)
        if window < 2:
            raise InvalidArgument("predictor_window", expected="2 frames at least", got=window)
        factory = {"device": device, "dtype": dtype}
        self.window, self.dropout = int(window), dropout
        self.lag = nn.Embedding(window, dim, **factory)
        self.to_memory = nn.Linear(dim, dim, **factory)
        self.slots, self.tokens = (Heads(dim, heads, **factory) for _ in range(2))
        self.norm_slots, self.norm_tokens, self.norm_mlp = (nn.LayerNorm(dim, bias=False, **factory) for _ in range(3))
        self.expand = nn.Linear(dim, 4 * dim, bias=False, **factory)
        self.contract = nn.Linear(4 * dim, dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_submodules(self)

    def forward(
        self,
        slots: Float[Tensor, "B T K S"],
        tokens: Float[Tensor, "B T1 N S"],
        slot_mask: Bool[Tensor, "B K"] | None = None,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B K S"]:
        """The slots with which the last of the frames begins.

        Args:
            slots: `[B, T, K, S]`, of all frames before.
            tokens: `[B, T + 1, N, S]`, of these and the frame itself.
            slot_mask: `[B, K]`, True at real slots.
            generator: draws `noise` in training; torch's global one if None.
            noise: even numbers in [0, 1) that choose the two frames.
        """
        check_generator(generator)
        if tokens.shape[1] != slots.shape[1] + 1:
            raise InvalidArgument("tokens", expected=f"{slots.shape[1] + 1} frames", got=tokens.shape[1])
        slots, tokens = slots[:, 1 - self.window :], tokens[:, -self.window :]
        past, rows = slots.shape[1], torch.arange(len(slots), device=slots.device)
        when = torch.tensor([[past - 1, past]], device=slots.device).expand(len(slots), -1)
        if self.training and past > 1:
            if noise is None:
                noise = torch.rand(len(slots), 2, device=slots.device, generator=generator)
            when = (noise * past).long().clamp(max=past - 1) + torch.tensor([0, 1], device=slots.device)
        lags = self.lag(past - when).unsqueeze(2)
        x = slots[rows, when[:, 0]].detach() + lags[:, 0]
        memory = self.to_memory(tokens[rows, when[:, 1]].detach()) + lags[:, 1]
        x = self.norm_slots(x + self._dropped(self.slots.of(x, x, slot_mask)[0]))
        x = self.norm_tokens(x + self._dropped(self.tokens.of(x, memory, None)[0]))
        hidden = self._dropped(F.gelu(self.expand(x)))
        return self.norm_mlp(x + self._dropped(self.contract(hidden)))

    def _dropped(self, change: Tensor) -> Tensor:
        return F.dropout(change, self.dropout, self.training)
