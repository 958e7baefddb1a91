"""Initial slots that have seen the tokens before slot attention begins (SmoothSA)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.layers.initialisation import draw_, reset_submodules
from narrows.layers.slot_decoders import Heads
from narrows.validation import check_generator, check_positive


class Preheated(NamedTuple):
    """What slots will be, guessed, and where slot attention begins.

    Args:
        guess: `[B, K, S]`, to be trained towards the slots that come out, without a gradient to these.
        start: `[B, K, S]`, the guess without a gradient; in training with noise of a learned spread.
    """

    guess: Float[Tensor, "B K S"]
    start: Float[Tensor, "B K S"]


class SlotPreheat(nn.Module):
    """Cold initial slots read the tokens once, in a block of a transformer that guesses what they will become.

    The block is trained by distillation from the slots themselves (Zhao et al. 2026): neither the tokens nor slot
    attention get a gradient through it. Slots read tokens, then each other, then go through an MLP; what reads the
    tokens is not normalised first.

    Args:
        dim: S, of slots and tokens.
        heads: of attention.
        device: where parameters are made.
        dtype: of the parameters.

    https://arxiv.org/abs/2508.05417
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads)
        factory = {"device": device, "dtype": dtype}
        self.to_memory = nn.Linear(dim, dim, **factory)
        self.tokens, self.slots = (Heads(dim, heads, **factory) for _ in range(2))
        self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim, bias=False, **factory) for _ in range(2))
        self.expand = nn.Linear(dim, 4 * dim, bias=False, **factory)
        self.contract = nn.Linear(4 * dim, dim, bias=False, **factory)
        self.log_scale = nn.Parameter(torch.empty(dim, **factory))
        self._reset_own()

    def _reset_own(self) -> None:
        draw_(self.log_scale, nn.init.zeros_)

    def reset_parameters(self) -> None:
        """Draw every parameter anew; the noise begins with a spread of 1."""
        reset_submodules(self)
        self._reset_own()

    def forward(
        self,
        slots: Float[Tensor, "B K S"],
        tokens: Float[Tensor, "B N S"],
        mask: Bool[Tensor, "B N"] | None = None,
        slot_mask: Bool[Tensor, "B K"] | None = None,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "B K S"] | None = None,
    ) -> Preheated:
        """What these slots will be on these tokens.

        Args:
            slots: `[B, K, S]`, drawn, learned or made of hints.
            tokens: `[B, N, S]`.
            mask: `[B, N]`, True at real tokens.
            slot_mask: `[B, K]`, True at real slots.
            generator: draws `noise` in training; torch's global one if None.
            noise: a normal sample `[B, K, S]`.
        """
        check_generator(generator)
        memory = self.to_memory(tokens.detach())
        guess = slots + self.tokens.of(slots, memory, mask)[0]
        normed = self.norm_slots(guess)
        guess = guess + self.slots.of(normed, normed, slot_mask)[0]
        guess = guess + self.contract(F.gelu(self.expand(self.norm_mlp(guess))))
        start = guess.detach()
        if self.training:
            if noise is None:
                noise = torch.randn(start.shape, device=start.device, generator=generator)
            start = start + self.log_scale.exp() * noise.to(start.dtype)
        return Preheated(guess, start)
