"""A number of slots for each sample: slots that are not needed are dropped (AdaSlot)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.layers.initialisation import reset_submodules
from narrows.validation import check_generator, check_mask, check_positive


class SlotGate(nn.Module):
    r"""Which slots of a sample are kept, from the slots themselves (Fan et al. 2024, section 3.3).

    An MLP gives each slot a logit \(l\). In training it is kept where \(l + \log u - \log(1 - u) > 0\) for \(u\) drawn
    evenly from (0, 1), the Gumbel softmax of two classes, whose gradient is that of its sigmoid (straight through). In
    evaluation it is kept where \(l > 0\), and nothing is drawn. The slot of the greatest logit is always kept.

    Args:
        dim: S.
        hidden_dim: of the MLP; `4 * dim` if None.
        device: where parameters are made.
        dtype: of the parameters.

    https://arxiv.org/abs/2406.09196
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.expand = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.contract = nn.Linear(hidden_dim, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_submodules(self)

    def forward(
        self,
        slots: Float[Tensor, "B K S"],
        slot_mask: Bool[Tensor, "B K"] | None = None,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K"]:
        """1 for slots that are kept and 0 for others, with a gradient; 0 for those that `slot_mask` leaves out.

        Args:
            slots: `[B, K, S]`.
            slot_mask: `[B, K]`, True at real slots.
            generator: draws `noise`; torch's global one if None.
            noise: u, in (0, 1).
        """
        check_mask("slot_mask", slot_mask, slots.shape[:2], layout="[B, K]")
        check_generator(generator)
        logits = self.contract(self.expand(self.norm(slots)).relu()).squeeze(-1).float()
        if self.training:
            if noise is None:
                noise = torch.rand(logits.shape, device=logits.device, generator=generator)
            even = noise.to(logits.dtype).clamp(1e-6, 1 - 1e-6)
            noisy = logits + even.log() - (1 - even).log()
        else:
            noisy = logits
        best = logits if slot_mask is None else logits.masked_fill(~slot_mask, -torch.inf)
        best = F.one_hot(best.argmax(-1), logits.shape[-1]).bool()
        kept, soft = (noisy > 0) | best, noisy.sigmoid()
        if slot_mask is not None:
            kept, soft = kept & slot_mask, soft * slot_mask
        return kept.float() + (soft - soft.detach())
